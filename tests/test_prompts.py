"""Weighted and long texts: A1111's own examples, compel's own numbers (tests/data/compel.json), what must not change.

tests/bench/addons.py made the numbers of compel 2.5.1, on the tiny model.
"""

import contextlib
import json
import sys
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from commands import ran
from mutants import mutant, run
from PIL import Image
from stubs import Model

from minidiffedit import StableDiffusion, cli, edit, load_state, resume, save_state
from minidiffedit.cost import cost
from minidiffedit.fast import CompiledUNet
from minidiffedit.prompts import check_texts, chunks_of, parts_of, same_length, spoken
from minidiffedit.run import execute, plan
from minidiffedit.tokenizer import BOS, EOS

COMPEL = json.loads((Path(__file__).parent / "data" / "compel.json").read_text())
# From the description of `parse_prompt_attention` in the web UI.
A1111 = {
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "(unbalanced": [("unbalanced", 1.1)],
    "\\(literal\\]": [("(literal]", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
    "[[a]] (b:-.5) c\\\\d": [("a", 1 / 1.21), (" ", 1), ("b", -0.5), (" c\\d", 1)],
    "x) ] : (y:2": [("x) ] : ", 1), ("y:2", 1.1)],
    "": [("", 1)],
}  # fmt: skip


@pytest.fixture(scope="module")
def sd(deep):
    return deep


@pytest.mark.parametrize("text", A1111)
def test_a1111s_own_examples(text):
    found = parts_of(text, "a1111")
    assert [one for one, _ in found] == [one for one, _ in A1111[text]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in A1111[text]])


def ids(sd, text, syntax):
    return [[token for token, _, _ in chunk] for chunk in chunks_of(sd.tokenizer, text, syntax)]


def tokens(sd, text):
    return sd.tokenizer.bpe.encode(text).ids[1:-1]


def test_a1111s_chunks(sd):
    """75 tokens; a full chunk ends at a comma among its last 20; BREAK ends one at once."""
    x, comma = tokens(sd, "x")[0], tokens(sd, ",")[0]
    assert ids(sd, "x " * 75, "a1111") == [[x] * 75]
    assert ids(sd, "x " * 80, "a1111") == [[x] * 75, [x] * 5]
    late = "x " * 60 + ", " + "x " * 20
    assert ids(sd, late, "a1111") == [[x] * 60 + [comma], [x] * 20]
    early = "x " * 54 + ", " + "x " * 26
    assert ids(sd, early, "a1111") == [[x] * 54 + [comma] + [x] * 20, [x] * 6]
    nearest = "x " * 55 + ", " + "x " * 25
    assert ids(sd, nearest, "a1111") == [[x] * 55 + [comma], [x] * 25]
    assert ids(sd, "x BREAK x x", "a1111") == [[x], [x, x]] and ids(sd, "x BREAK", "a1111") == [[x]]
    assert ids(sd, "x (BREAKx:1) BREAKING x", "a1111")[0][:1] == [x]
    assert len(ids(sd, "x (BREAKx:1) BREAKING x", "a1111")) == 1 and ids(sd, "", "a1111") == [[]]
    assert ids(sd, "x BREAK BREAK x", "a1111") == [[x], [], [x]]


def test_a1111s_weights_keep_the_mean(sd):
    """By hand: embeddings times weights, then times the ratio of the means, chunk by chunk."""
    plain = sd.text(["a big horse"])[0].double()
    w = torch.ones(77, 1, dtype=torch.float64)
    w[2], w[3] = 1.5, 1 / 1.1
    weighed = plain * w
    expected = weighed * plain.mean() / weighed.mean()
    assert (sd.text(["a (big:1.5) [horse]"], "a1111")[0] - expected).abs().max() < 1e-5
    two = sd.text(["a (big:1.5) [horse] BREAK a zebra"], "a1111")[0]
    assert (two[:77] - expected).abs().max() < 1e-5 and two[77:].equal(sd.text(["a zebra"])[0])


@pytest.mark.parametrize("case", COMPEL, ids=[repr(case["text"][:20]) for case in COMPEL])
def test_compels_own_numbers(case, sd):
    found = parts_of(case["text"], "compel")
    assert [one for one, _ in found] == [one for one, _ in case["parts"]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in case["parts"]])
    z = sd.text([case["text"]], "compel")[0]
    seen = z @ torch.cos(torch.arange(24, dtype=torch.float32))
    assert (seen - torch.tensor(case["embedding"])).abs().max() < 2e-3


def test_compel_masks_what_weighs_less(sd):
    """By hand through transformers' text encoder, whose attention mask is not ours."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**{k: v for k, v in tiny.CONFIGS["text_encoder"].items() if k[-8:] != "token_id"})
    peer = CLIPTextModel(config).eval()
    own = {name.replace("text_model.", ""): name for name in peer.state_dict()}
    peer.load_state_dict({own[name]: one for name, one in sd.clip.state_dict().items()}, strict=False)
    ids = torch.full((1, 77), EOS)
    ids[0, :4] = torch.tensor([BOS, *tokens(sd, "a big horse")])
    keep, w = torch.ones(1, 77, dtype=torch.long), torch.ones(77, 1)
    keep[0, 2], w[2] = 0, 0.5
    with torch.no_grad():
        plain, without = (peer(ids, attention_mask=one).last_hidden_state[0] for one in (torch.ones_like(keep), keep))
    empty = sd.text([""])[0]
    plain, without = (empty + w * (one - empty) for one in (plain, without))
    assert (sd.text(["a (big)0.5 horse"], "compel")[0] - (plain + without) / 2).abs().max() < 1e-5  # tan 45 degrees: 1


ONES = {
    "a1111": ["(a horse:1)", "a (big:1.0) horse", "a \\(big\\) horse"],
    "compel": ["(a horse)1", "a (big)1.0 horse", "a \\(big\\) horse"],
}


@pytest.mark.parametrize("syntax", ONES)
def test_weights_of_one_are_the_plain_text_bit_for_bit(syntax, sd):
    for text, plain in zip(ONES[syntax], ("a horse", "a big horse", "a (big) horse")):
        assert sd.text([text], syntax).equal(sd.text([plain]))
    assert sd.text([""], syntax).equal(sd.text([""])) and sd.text(["a", "b c"], syntax).equal(
        torch.cat([sd.text(["a"]), sd.text(["b c"])])
    )


def test_a_repeated_text_is_the_same_text(sd):
    """Attention is a mean over positions, so that a1111 may make texts equally long by repeating them."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    null, long = sd.text([""]), sd.text(["a horse BREAK a (zebra:1.4) BREAK x"], "a1111")
    (alone,) = sd.eps(x, 500, [null])
    same, made = same_length([null, long], "a1111")
    together = sd.eps(x, 500, [same, made])
    assert long.shape[1] == 231 == same.shape[1] and (together[0] - alone).abs().max() < 1e-5
    assert (together[1] - sd.eps(x, 500, [long])[0]).abs().max() < 1e-5
    three, two = same_length([long, sd.text(["a BREAK b"], "a1111")], "a1111")
    assert three.shape == two.shape == (1, 462, 24)
    filled = same_length([null, long], "compel")
    assert filled[0].equal(null.repeat(1, 3, 1)) and filled[1] is long
    assert sd.text(["a horse", "x " * 90], "compel").shape == (2, 154, 24)


REFUSED = {
    ("a1111", "[cat:dog:0.5] x"): "changes a text between steps",
    ("a1111", "[cat|dog] x"): "changes a text between steps",
    ("a1111", "a cat AND a dog"): "changes a text between steps",
    ("a1111", "a <lora:style:0.8>"): "give the file with --lora",
    ("compel", "a <lora:style:0.8>"): "give the file with --lora",
    ("compel", 'a cat.swap(dog)'): "is not supported; its weights",
    ("compel", '("a", "b").blend(1, 1)'): "is not supported; its weights",
    ("compel", "(" * 5000 + "a" + ")" * 5000): "nested too deeply",
    ("a1111", "(a:99999)"): "beyond 1000",
    ("a1111", "(" * 200 + "a"): "beyond 1000",
    ("compel", "(a)1001.0"): "beyond 1000",
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=[f"{syntax} {text[:20]}" for syntax, text in REFUSED])
def test_what_a_syntax_has_and_this_program_has_not(case):
    syntax, text = case
    with pytest.raises(ValueError, match=REFUSED[case]):
        plan("diffedit", target=text, source="a horse", prompt_syntax=syntax)


def test_too_long_for_any_common_length(sd):
    with pytest.raises(ValueError, match="room for 24 chunks"):
        sd.text(["x " * 75 * 25], "a1111")
    with pytest.raises(ValueError, match="no common length of at most 24"):
        same_length([torch.zeros(1, 77 * n, 4) for n in (1, 4, 5, 7)], "a1111")


def said(*texts, **options):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        plan("diffedit", source=texts[-1], target=texts[0], **options)
    return [str(one.message) for one in found]


@pytest.mark.parametrize(
    "text", ["(zebra:1.3)", "((zebra))", "[zebra]", "a BREAK b", "x <lora:y:.8>", "(a zebra)++", "zebra++", "(a)1.2"]
)
def test_one_warning_where_plain_text_looks_weighted(text):
    (line,) = said(text, text)
    assert "looks weighted" in line and "prompt_syntax" in line
    if "lora" not in text:
        assert not said(text, text, prompt_syntax="a1111")


@pytest.mark.parametrize("text", ["a zebra AND a horse", "a {red|blue} zebra"])
def test_other_signs_of_neighbours_are_told_too(text):
    (line,) = said(text, text)
    assert "looks weighted" in line and not said("R and D, {a}", "x")


@pytest.mark.parametrize("text", ["一匹斑马", "зебра", "ζέβρα", "シマウマ", "a 猫", "얼룩말", "ม้าลาย"])
def test_one_warning_where_clip_knows_no_word(text):
    (line,) = said(text, text)
    assert "hardly knows" in line and "English" in line


@pytest.mark.parametrize(
    "text", ["a horse (brown), 8k: sharp", "piñata, Łódź", "5 µm", "an \u03b1 particle", "a-b c--d", ""]
)
def test_ordinary_texts_pass_in_silence(text):
    assert said(text, "a horse") == []


def test_spoken():
    assert spoken("a (big:1.3) [horse] BREAK (x)", "a1111").split() == ["a", "big", "horse", "x"]
    assert spoken("a (big)+ horse--", "compel") == "a big horse" and spoken("(a:1)", "plain") == "(a:1)"


# ---------------------------------------------------------------- in runs

QUICK = {"source": "a horse", "steps": 10, "maps": 2, "seed": 0}


def test_a_long_weighted_text_edits_and_costs_as_predicted(sd, picture):
    long = {"target": "a (zebra:1.4) BREAK on a meadow", "negative_prompt": "(bad)", "prompt_syntax": "a1111"}
    settled = plan("diffedit", **QUICK | long)
    done = execute(settled, sd, picture)
    assert done.evaluations == cost(settled) and done.settings["prompt_syntax"] == "a1111"
    assert not done.latent.equal(edit(sd, picture, **QUICK | long | {"target": "a zebra BREAK on a meadow"}).latent)
    same = edit(sd, picture, **QUICK, target="(a zebra:1)", prompt_syntax="a1111")
    assert same.latent.equal(edit(sd, picture, **QUICK, target="a zebra").latent)


def test_reuse_knows_whose_text_it_was(sd, picture):
    """The same letters under another syntax are another text; of another length, another path."""
    first = edit(sd, picture, **QUICK, target="(a zebra:1.4)", prompt_syntax="a1111")
    with pytest.warns(UserWarning, match="looks weighted"):
        again = edit(sd, picture, **QUICK, target="(a zebra:1.4)", reuse=first)
        fresh = edit(sd, picture, **QUICK, target="(a zebra:1.4)")
    assert again.latent.equal(fresh.latent) and not again.latent.equal(first.latent)
    free = edit(sd, picture, **QUICK, target="(a zebra:1.4)", prompt_syntax="a1111", reuse=first)
    assert free.evaluations["mask"] == free.evaluations["encode"] == 0


def test_methods_that_look_at_words(sd, picture):
    """Places are those of the words without their weights; a text of several chunks is refused before any weights."""
    weighed = {"target": "a (zebra:1.4)", "source": "a (horse:1)", "steps": 5, "seed": 0, "prompt_syntax": "a1111"}
    done = edit(sd, picture, "prompt-to-prompt", blend="horse, zebra", **weighed)
    plain = edit(
        sd,
        picture,
        "prompt-to-prompt",
        blend="horse, zebra",
        **weighed | {"target": "a zebra", "source": "a horse"},
    )
    assert not done.latent.equal(plain.latent)
    with pytest.raises(ValueError, match="must be one chunk of 75 tokens, not 2"):
        plan("prompt-to-prompt", **weighed | {"target": "a zebra BREAK x"})
    with pytest.raises(ValueError, match="as many words"):
        plan("prompt-to-prompt", **weighed | {"target": "a (big:1.2) zebra", "mode": "replace"})
    plan("prompt-to-prompt", **weighed | {"target": "one (zebra:1.2)", "mode": "replace"})


LONG = {"masactrl": {"steps": 4}, "sdedit": {"steps": 4}, "edit-friendly-ddpm": {"steps": 10}, "dds": {"iterations": 2}}
LONG |= {"plug-and-play": {"steps": 4}, "null-text+replay": {"steps": 4, "inner_steps": 1}}


@pytest.mark.parametrize("method", LONG)
def test_other_methods_take_long_texts(method, sd, picture):
    given = {"target": "a (zebra:1.4) BREAK x", "source": "a horse", "seed": 0, "prompt_syntax": "a1111"}
    given = {name: one for name, one in given.items() if (method, name) != ("sdedit", "source")}
    settled = plan(method, **given, **LONG[method])
    done = execute(settled, sd, picture)
    assert done.evaluations == cost(settled)
    short = edit(sd, picture, method, **given | {"target": "a (zebra:1.4)"}, **LONG[method])
    again = edit(sd, picture, method, **given, **LONG[method], reuse=short)  # whose null text is a shorter one
    assert again.latent.equal(done.latent) and not short.latent.equal(done.latent)


def test_a_compiled_unet_takes_longer_texts(sd):
    plain = tiny.networks(unet=tiny.SHALLOW)[0]
    compiled = CompiledUNet(plain, backend="eager")
    x, text = torch.randn(1, 4, 8, 8), sd.text(["a horse BREAK x"], "a1111")
    for one in (sd.text(["a horse"]), text):
        with torch.no_grad():
            assert (compiled(x, 500, one) - plain(x, 500, one)).abs().max() < 1e-5


def test_states_pictures_and_batches_tell_the_syntax(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    tiny.picture().save("in/a.png")
    texts = ["--source", "a horse", "--target", "a (zebra:1.4) BREAK x", "--seed", "0", "--steps", "10", "--maps", "2"]
    model = ["--model", folder]
    done = ran(
        capsys,
        "edit",
        "in/a.png",
        "-o",
        "o.png",
        "--save-state",
        "s.safetensors",
        *texts,
        *model,
        "--prompt-syntax",
        "a1111",
    )
    assert json.loads(Image.open("o.png").text["minidiffedit"])["prompt_syntax"] == "a1111"
    assert done["settings"]["prompt_syntax"] == "a1111" and done["rows"]["paid"] == done["rows"]["predicted"]
    more = ran(capsys, "resume", "s.safetensors", "--guidance-scale", "3", *model)
    assert more["evaluations"]["mask"] == more["evaluations"]["encode"] == 0
    assert more["settings"]["prompt_syntax"] == "a1111"
    (tmp_path / "in" / "manifest.csv").write_text(
        "image,target,prompt_syntax\na.png,(a zebra:1.4),a1111\na.png,(a zebra)1.4,compel\n"
    )
    assert ran(capsys, "batch", "in", "-o", "made", "--source", "a horse", *texts[4:], *model)["made"] == 2
    with pytest.raises(SystemExit):
        cli.main(["edit", "in/a.png", *texts, "--prompt-syntax", "comfy"])
    assert "a1111" in capsys.readouterr().err


def test_a_state_of_a_long_text_comes_back(folder, picture, tmp_path):
    sd = StableDiffusion.load(folder, device="cpu")
    options = {"source": "a horse", "target": "a zebra BREAK y", "prompt_syntax": "a1111", "steps": 5, "seed": 0}
    done = edit(sd, picture, "masactrl", **options)
    save_state(done, tmp_path / "s.safetensors")
    again = resume(load_state(tmp_path / "s.safetensors", sd))
    assert again.latent.equal(done.latent) and again.evaluations["encode"] == 0


def test_a_stand_in_takes_the_syntax(picture):
    assert edit(Model(), picture, **QUICK, target="a (zebra:1.4)", prompt_syntax="a1111").image.size == picture.size


@pytest.mark.parametrize("syntax", ["plain", "a1111", "compel"])
@pytest.mark.parametrize("text", [
    ":" + "1" * 100_000, "[" + "|" * 100_000, "{" + "|" * 100_000, "<lora:" * 20_000, "a" + " " * 100_000 + "b",
    "[" * 100_000, "(a" * 30_000, "(a[" * 60 + "b" * 100_000, "[a:" * 30_000, "\\" * 100_000, '"' * 100_000,
    "a,b" * 30_000, "<lora:x" + "a" * 100_000,
], ids=lambda text: text[:9])  # fmt: skip
def test_hostile_texts_are_read_in_a_time_that_grows_as_they_do(text, syntax):
    """A millisecond for each of these, some minutes where it grows with the square of their length."""
    start = time.process_time()
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_texts([text], syntax)
    assert time.process_time() - start < 5


def test_brackets_that_are_nested_too_deeply():
    assert len(parts_of("(a" * 70, "a1111")) == 70
    assert parts_of("([" * 100 + "a", "a1111") == [("a", pytest.approx(1))]
    with pytest.raises(ValueError, match=r"the brackets of .* are nested too deeply"):
        parts_of("([" * 100 + "(a", "a1111")


# ---------------------------------------------------------------- each test can fail

BREAKS = {
    "the mean is not restored": ("weighed * ratio", "weighed", "test_a1111s_weights_keep_the_mean"),
    "the mask is left out": ("keep.view(-1)[found[0] : found[-1] + 1] = False", "pass",
                             "test_compel_masks_what_weighs_less"),
    "a comma at any distance": ("ROOM - comma <= NEAR", "comma >= 0", "test_a1111s_chunks"),
    "a comma not looked for": ("ROOM - comma <= NEAR", "False", "test_a1111s_chunks"),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_a_mistake_turns_a_test_red(case, sd, monkeypatch):
    old, new, test = BREAKS[case]
    broken = mutant("prompts", old, new, monkeypatch)
    monkeypatch.setattr("minidiffedit.sd.many", broken.many)
    monkeypatch.setattr(sys.modules[__name__], "chunks_of", broken.chunks_of)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(getattr(sys.modules[__name__], test), sd=sd)
