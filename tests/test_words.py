"""Where the words of a prompt stand, and how two prompts correspond. `W` is exchanged by the mutants at the end."""

import itertools
import random

import pytest
import torch
from mutants import mutant, run

from minidiffedit.methods import words as W
from minidiffedit.tokenizer import BOS, EOS, Tokenizer

TOKENIZER = Tokenizer()


def words(prompt):
    return W.words_of(TOKENIZER, prompt)


def pairs(found):
    """What corresponds before the padding, as {target position: {source position: share}}."""
    return {j: {i: float(found[i, j]) for i in range(77) if found[i, j]} for j in range(77) if found[:, j].any()}


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("prompt, names, spans", [
    ("a photo of a Horse, on grass.", "a photo of a Horse , on grass .", [(i,) for i in range(1, 10)]),
    ("a  striped\tzebra!?", "a striped zebra !?", [(1,), (2,), (3,), (4,)]),
    ("Straße seahorse horse's 24", "Straße seahorse horse 's 2 4", [(1, 2, 3, 4), (5, 6), (7,), (8,), (9,), (10,)]),
    ("日本 horse", "日本 horse", [(1, 2, 3), (4,)]), ("", "", []), (" ", "", []),
    ("<|endoftext|> horse", "<|endoftext|> horse", [(1,), (2,)]),
])  # fmt: skip
def test_words_and_their_positions(prompt, names, spans):
    found = words(prompt)
    assert list(found.names) == names.split() and [tuple(span) for span in found.spans] == spans
    ids = TOKENIZER([prompt])[0].tolist()
    assert list(found.ids) == ids[: found.end + 1] and ids[found.end :] == [EOS] * (77 - found.end) and ids[0] == BOS


@pytest.mark.parametrize("phrase, at", [
    ("horse", [5, 12]), ("HORSE", [5, 12]), ("  horse ", [5, 12]), ("a", [1, 4]), ("a horse", [4, 5]), (",", [6]),
    ("horse,", [5, 6]), ("seahorse", [9, 10]), ("sea", []), ("se", []), ("horses", []), ("", []), (" ", []),
    ("seahorse and horse", [9, 10, 11, 12]), ("zebra", []), ("horse a", []),
])  # fmt: skip
def test_words_and_phrases_are_found(phrase, at):
    """Whole words alone: the second half of 'seahorse' is spelled as 'horse' is."""
    found = words("a photo of a horse, on my seahorse and horse")
    assert found.find(phrase) == at
    if at:
        assert found.positions(phrase) == at
    else:
        with pytest.raises(ValueError, match=r"the prompt has no .*its words are a, photo, of, a, horse, ,, on"):
            found.positions(phrase)


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_of_a_long_prompt_only_what_is_encoded_counts():
    found = words("x " * 74 + "horse " + "zebra " * 9)
    assert found.end == 76 and found.find("horse") == [75] and found.find("zebra") == []
    assert list(found.ids) == TOKENIZER(["x " * 74 + "horse " + "zebra " * 9])[0].tolist()
    cut = words("x " * 74 + "seahorse and more")  # one of the two halves of a word is left
    assert cut.end == 76 and cut.find("seahorse") == cut.find("horse") == []
    with pytest.raises(ValueError, match="words are none"):
        words("").positions("horse")


# ---------------------------------------------------------------- correspondence


def test_replaced_goes_word_by_word():
    """Positions from a reading of the token lists: seahorse takes 2 and Straße 4 of them."""
    one_one = pairs(W.replaced(words("a horse, here"), words("a zebra, there")))
    assert one_one == {j: {j: 1.0} for j in range(77)}
    assert [len(span) for span in words("seahorse Straße").spans] == [2, 4]
    found = W.replaced(words("a horse here"), words("a seahorse here"))
    own = {0: {0: 1.0}, 1: {1: 1.0}, 2: {2: 0.5}, 3: {2: 0.5}, 4: {3: 1.0}}
    assert pairs(found) == own | {j: {j - 1: 1.0} for j in range(5, 77)}  # the end token and padding follow
    found = W.replaced(words("a seahorse here"), words("a horse here"))
    own = {0: {0: 1.0}, 1: {1: 1.0}, 2: {2: 1.0, 3: 1.0}, 3: {4: 1.0}}
    assert pairs(found) == own | {j: {j + 1: 1.0} for j in range(4, 76)}  # the last has no counterpart
    found = pairs(W.replaced(words("my seahorse"), words("my Straße")))
    assert [found[j] for j in (2, 3, 4, 5)] == [{2: 0.25, 3: 0.25}] * 4


@pytest.mark.parametrize("source, target", [
    ("a horse on grass", "a seahorse on grass!"), ("seahorse 2024", "Straße 1999"), ("", ""), ("a b c", "c b a"),
])  # fmt: skip
def test_replacing_loses_no_attention_of_a_word(source, target):
    one, other = words(source), words(target)
    if len(one.names) == len(other.names):
        assert torch.allclose(W.replaced(one, other)[: one.end].sum(1), torch.ones(one.end))
    else:
        with pytest.raises(ValueError, match=r"got 4 \(a horse on grass\) and 5 \(a seahorse on grass !\); use mode"):
            W.replaced(one, other)


def test_refined_keeps_what_both_prompts_have():
    found = W.refined(words("a photo of a horse on grass"), words("a photo of a striped zebra on the grass"))
    kept = {0: {0: 1.0}, **{j: {j: 1.0} for j in (1, 2, 3, 4)}, 7: {6: 1.0}, 9: {7: 1.0}, 10: {8: 1.0}}
    assert pairs(found) == kept | {j: {j - 2: 1.0} for j in range(11, 77)}
    assert pairs(W.refined(words("a b"), words("")))[1] == {3: 1.0}  # the end token takes the end token's
    for prompt in ("a horse", "", "a, a, a horse!"):
        assert torch.equal(W.refined(words(prompt), words(prompt)), torch.eye(77))
        assert torch.equal(W.replaced(words(prompt), words(prompt)), torch.eye(77))


def longest(a, b):
    """Length of the longest common subsequence, by trying all of a's."""

    def within(part):
        rest = iter(b)
        return all(one in rest for one in part)

    return max(n for n in range(len(a) + 1) if any(map(within, itertools.combinations(a, n))))


def test_refined_is_a_longest_common_subsequence():
    chance = random.Random(0)
    for _ in range(60):
        source, target = (" ".join(chance.choices("abcd", k=chance.randrange(7))) for _ in range(2))
        one, other = words(source), words(target)
        found = W.refined(one, other)
        at = [(i, j) for j in range(1, other.end) for i in range(1, one.end) if found[i, j]]
        assert all(one.ids[i] == other.ids[j] for i, j in at) and at == sorted(at)
        assert len({i for i, _ in at}) == len({j for _, j in at}) == len(at) == longest(one.ids[1:-1], other.ids[1:-1])
        assert set(found.sum(0).tolist()) <= {0.0, 1.0} and found.sum(1).max() == 1


# ---------------------------------------------------------------- lists in options


def test_lists():
    assert W.listed(" horse, grass field ,") == ["horse", "grass field"] and W.listed(None) == W.listed(" ") == []
    assert W.numbered("reweight", "zebra=2, grass field=-.5") == {"zebra": 2.0, "grass field": -0.5}
    assert W.numbered("reweight", None) == W.numbered("reweight", "") == {}
    for wrong in ("zebra", "zebra=", "=2", "zebra=x", "zebra=nan", "zebra=1e9", "a=1,b"):
        with pytest.raises(ValueError, match="reweight must be WORD=NUMBER"):
            W.numbered("reweight", wrong)


def test_a_word_of_either_prompt():
    prompts = words("a horse here"), words("a zebra here")
    assert W.in_one_of("horse", prompts) == [[2], []] and W.in_one_of("here", prompts) == [[3], [3]]
    with pytest.raises(ValueError, match="no prompt has 'cow'; their words are: a horse here; a zebra here"):
        W.in_one_of("cow", prompts)


# ---------------------------------------------------------------- mutants

MUTATIONS = {
    "inside of words": ("words:Words.find", "for start in self.starts if wanted else ()",
                        "for start in range(1, self.end) if wanted else ()", test_words_and_phrases_are_found),
    "the last place only": ("words:Words.find", "found += range(start, start + len(wanted))",
                            "found = [*range(start, start + len(wanted))]", test_words_and_phrases_are_found),
    "a long prompt's end": ("words", "[*ids, EOS] if len(encoding.ids) > LENGTH else encoding.ids", "encoding.ids",
                            test_of_a_long_prompt_only_what_is_encoded_counts),
    "shares of p, not q": ("words", "1 / len(other)", "1 / len(one)", test_replaced_goes_word_by_word),
    "padding by position": ("words", "range(target.end, target.end + count)", "range(source.end, source.end + count)",
                            test_replaced_goes_word_by_word),
    "greedy": ("words", "best[i + 1][j] >= best[i][j + 1]", "True", test_refined_is_a_longest_common_subsequence),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    place, old, new, test = MUTATIONS[name]
    monkeypatch.setitem(globals(), "W", mutant(f"methods.{place}", old, new, monkeypatch))
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        run(test)
