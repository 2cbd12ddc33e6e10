"""What a witness sees of a run: maps against maps that are built on diffusers' UNet, and nothing of the run changed.

`W` is exchanged by the mutants at the end.
"""

import base64
import io
import json
from functools import partial
from pathlib import Path

import explicit
import numpy as np
import pytest
import tiny
import torch
from commands import failed, ran
from explicit import maps, once
from mutants import mutant, run
from PIL import Image
from stubs import latent
from test_report import Page

from minidiffedit import run as R
from minidiffedit.attention import Site
from minidiffedit.views import witness as W
from minidiffedit.views.report import report_page

SD = tiny.model()
SOURCE, TARGET = "a horse, a horse's quokka", "a zebra on grass"
TEXTS = {"source": SOURCE, "target": TARGET, "steps": 5, "seed": 0}
WORDS = ("a", "horse", ",", "a", "horse", "'s", "quokka")
MINI = Path(__file__).parents[1] / "weights" / "mini"


def seen_by(picture, method, **more):
    texts = {name: TEXTS[name] for name in TEXTS if name in R.blank_plan(method).given or name in ("steps", "seed")}
    looks_on = W.Witness()
    return R.edit(SD, picture, method, witness=looks_on, **texts | more), looks_on


@pytest.mark.parametrize("method, more", [
    ("masactrl", {}), ("prompt-to-prompt", {"blend": "horse, zebra"}), ("plug-and-play", {}),
    ("sdedit", {"repeats": 2}), ("diffedit", {"maps": 2}), ("null-text+replay", {"inner_steps": 2}),
    ("words+diffedit", {"maps": 2}), ("pfb-diff", {"mask": tiny.box()}),
])  # fmt: skip
def test_a_witness_changes_nothing(picture, method, more):
    done, looks_on = seen_by(picture, method, **more)
    texts = {name: TEXTS[name] for name in TEXTS if name in R.blank_plan(method).given or name in ("steps", "seed")}
    alone = R.edit(SD, picture, method, **texts | more)
    assert torch.equal(done.latent, alone.latent) and done.image.tobytes() == alone.image.tobytes()
    assert done.evaluations == alone.evaluations and done.witness is looks_on and alone.witness is None
    assert looks_on.looks
    with pytest.raises(ValueError, match="a witness looks on at one run"):
        R.edit(SD, picture, method, witness=looks_on, **texts | more)


def test_without_one_nothing_is_asked(picture, monkeypatch):
    """The model gets the hooks of the method and no others, and no map is built."""
    handed = []

    def eps(x, t, texts, real=SD.eps, **hooks):
        handed.append({name: hook.__module__ for name, hook in hooks.items() if hook})
        return real(x, t, texts, **hooks)

    monkeypatch.setattr(W, "weights", None)
    monkeypatch.setattr(SD, "eps", eps)
    R.edit(SD, picture, "ddim+replay", **TEXTS)
    assert handed == [{}] * 10
    handed.clear()
    R.edit(SD, picture, "masactrl", first_step=2, **TEXTS)
    assert handed == [{}] * 7 + [{"tap": "minidiffedit.methods.masactrl"}] * 3


@once
@torch.no_grad()
def by_hand(x, t, text, at, level):
    """Mean over heads and sites of one level, the sum over positions, of diffusers' maps."""
    found = []

    def hook(name, cross, q, k, v):
        A = maps(q, k)
        block = {0: ("down_blocks.0", "up_blocks.3"), 1: ("down_blocks.1", "up_blocks.2")}
        if cross and name.startswith(block.get(level, ("down_blocks.2", "up_blocks.1"))):
            found.append(A[0, :, :, at].mean(0).sum(-1))
        return A @ v

    explicit.peer(SD, hook)(x, t, text)
    assert len(found) == 5  # two on the way down, three on the way up
    return torch.stack(found).mean(0)


def test_the_maps_are_the_means_of_the_maps(picture):
    done, looks_on = seen_by(picture, "prompt-to-prompt")
    looks = {(one.stage, one.prompt): one for one in looks_on.looks}
    assert [*looks] == [("encode", SOURCE), ("decode", SOURCE), ("decode", TARGET)]
    encode = looks["encode", SOURCE]
    assert encode.words == WORDS and encode.steps == [1, 201, 401, 601, 801] and [*encode.maps] == [2, 1, 0]
    path, text, (h, w) = done.trajectory, SD.text([SOURCE]), done.latent.shape[2:]
    positions = looks_on.known[SOURCE][0].spans
    for i, t in ((0, 1), (3, 601)):  # the encoding asks at the level that it comes from
        for level in (2, 1, 0):
            for word in (1, 6):
                truth = by_hand(path[i], t, text, [*positions[word]], level)
                ours = encode.maps[level][i, word]
                assert ours.shape == (-(-h // 2**level), -(-w // 2**level))
                assert torch.allclose(ours.flatten(), truth, atol=2e-6, rtol=1e-4)
    shares = encode.maps[2].sum(1)
    assert bool((shares > 0).all() and (shares < 1).all())  # the rest is the begin's, the end's and the padding's


def test_rows_are_told_by_their_text(picture):
    """Two pairs of texts in one run; a null text that was learned is no prompt's."""
    _, looks_on = seen_by(picture, "diffedit-regions", edits=[("a horse", "a zebra"), ("grass", "sand")], maps=2)
    found = {(one.stage, one.prompt) for one in looks_on.looks}
    prompts = {"a horse", "a zebra", "grass", "sand"}
    assert {("mask", prompt) for prompt in prompts} <= found and {prompt for _, prompt in found} == prompts
    assert {prompt for stage, prompt in found if stage == "decode"} == {"a zebra", "sand"}


def test_the_map_is_read_before_the_method_changes_anything(picture):
    """An attention that is replaced as a whole has the maps of the one that it replaces."""
    looks_on, text = W.Witness(), SD.text([SOURCE])
    looks_on.meet({SOURCE: text}, partial(R.function_at("words:words_of"), SD.tokenizer))
    x = latent(1, 4, 8, 8, dtype=torch.float32)

    def tap(plain, site, q, k, v):
        return torch.zeros_like(q) if site == Site("up", 0, 2, "cross") else plain(site, q, k, v)

    for stage, hooks in (("plain", {}), ("changed", {"tap": tap})):
        SD.eps(x, 401, [text], **looks_on.hooks(stage, x, 401, [text], hooks))
    plain, changed = (looks_on.sums[stage, SOURCE, 401] for stage in ("plain", "changed"))
    assert all(torch.equal(plain[level][0], changed[level][0]) for level in plain)
    assert {stage: {site: what for site, what in sites.items()} for stage, sites in looks_on.touched.items()} == {
        "changed": {Site("up", 0, 2, "cross"): {401: "row 1: put together by the method"}}
    }


# ---------------------------------------------------------------- what a method touches

FIRST = [True] * 3 + [False] * 2


def found(picture, method, **more):
    done, looks_on = seen_by(picture, method, **more)
    assert {one.stage for one in W.reaches(looks_on, (8, 8))} <= {"decode"}
    return [(one.where, one.what, one.steps) for one in W.reaches(looks_on, tuple(done.latent.shape[2:]))]


def test_masactrl_touches_keys_and_values_late(picture):
    late, what = [False] * 2 + [True] * 3, "row 2: keys and values of row 1; row 4: keys and values of row 3"
    assert found(picture, "masactrl", first_step=2) == [
        (f"decoder, {size}, self-attention 1, 2, 3", what, late) for size in ("5 x 4", "10 x 8")
    ]
    _, looks_on = seen_by(picture, "masactrl", first_step=2)
    assert looks_on.roles == {"decode": ("", "", SOURCE, TARGET)}


def test_plug_and_play_touches_queries_keys_and_a_feature(picture):
    touched = found(picture, "plug-and-play", attention_steps=0.6, feature_steps=0.2)
    assert [(what, steps) for _, what, steps in touched] == [
        ("row 2, 3: output of row 1", [True] + [False] * 4), *[("row 2, 3: queries and keys of row 1", FIRST)] * 3
    ]  # fmt: skip
    assert touched[0][0].endswith("convolution 2") and touched[1][0].endswith("self-attention 2, 3")


def test_prompt_to_prompt_touches_the_targets_row_in_its_steps_alone(picture):
    """Its tap is there at every step; what it hands on unchanged, in slices of the same rows, is no exchange."""
    looked, mixed = "row 3: queries and keys of row 2", ", values changed, put together by the method"
    touched = found(picture, "prompt-to-prompt", cross_steps=0.6, self_steps=0.2)
    assert {(where.partition(", ")[2].rpartition(" 1")[0].rpartition(", ")[2], what, sum(steps)) for where, what, steps
            in touched} == {("text attention", looked + mixed, 3), ("self-attention", looked, 1)}  # fmt: skip
    assert all(steps == sorted(steps, reverse=True) for _, _, steps in touched)


def test_steps_are_those_on_the_way_down(picture):
    """TF-ICON goes up under its own prompt and down again in one stage; its exchange is in the first steps down."""
    more = {"mask": tiny.box(), "reference": picture, "inject_steps": 0.4}
    assert {(what, *steps) for _, what, steps in found(picture, "tf-icon", **more)} == {
        ("row 3, 4: put together by the method", True, True, False, False, False)
    }
    touched = found(picture, "ti-guided-edit", reference=picture, feature_steps=0.6, structure_steps=0.2)
    assert [steps for where, _, steps in touched if "convolution" in where] == [FIRST]


def test_a_blend_of_features_is_told_from_a_replacement(picture):
    touched = found(picture, "pfb-diff", mask=tiny.box())
    assert {what for where, what, _ in touched if "block" in where} <= {
        "row 2, 3: output of row 1, in part", "row 2, 3: output changed", "row 2, 3: output of row 1",
    }  # fmt: skip
    assert ("row 3: put together by the method", [True] * 5) in [one[1:] for one in touched]  # its own words, by parts


def test_learned_texts_are_looked_on_too(picture):
    """A source's text in pairs, keys and values (see Path.texts), and null texts of each level."""
    _, looks_on = seen_by(picture, "style-diffusion", inner_steps=1)
    assert {one.prompt for one in looks_on.looks if one.stage == "decode"} == {SOURCE, TARGET}
    _, looks_on = seen_by(picture, "null-text-inversion", inner_steps=1)
    assert looks_on.roles["decode"] == (None, None, SOURCE, TARGET)


def test_the_objects_of_masactrl_are_kept(picture):
    for method in ("masactrl", "tic-inversion"):
        done, _ = seen_by(picture, method, object_words="horse, zebra", first_step=1)
        for name in ("object_source", "object_target"):
            mask = done.tensors[name]
            assert mask.shape == done.latent[:, :1].shape and {*mask.unique().tolist()} == {0.0, 1.0}
        assert "object target" in report_page(done)
        alone, _ = seen_by(picture, method, first_step=1)
        assert "object_source" not in alone.tensors


def test_methods_that_work_with_predictions_touch_nothing(picture):
    for method in ("sdedit", "diffedit", "replay"):
        assert found(picture, method) == [], method
    assert found(picture, "words+diffedit") == []  # it reads maps


# ---------------------------------------------------------------- in the page


def opened(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))), dtype=float)


def test_the_page_shows_words_and_touches(picture):
    done, looks_on = seen_by(picture, "prompt-to-prompt", blend="horse, zebra")
    page = Page(report_page(done))
    assert {"looked", "seen", "touched"} <= {*page.all("main")[0]["class"].split()}
    assert [(one["stage"], one["prompt"]) for one in page.data["looks"]] == [
        (one.stage, one.prompt) for one in looks_on.looks
    ]
    for shown, look in zip(page.data["looks"], looks_on.looks):
        assert shown["words"] == [*look.words]
        for level, truth in zip(shown["levels"], look.maps.values()):
            assert level["steps"] == look.steps
            (w, h), sheet, n = level["cells"], opened(level["sheet"]), len(look.words)
            for step, word in ((0, 0), (4, n - 1), (2, 1)):
                i = step * n + word
                y, x = i // level["columns"] * h, i % level["columns"] * w
                ours = level["top"] * (sheet[y : y + h, x : x + w] / 255) ** 2
                assert np.allclose(ours, truth[step, word].numpy(), atol=level["top"] / 120)
    assert "row 3: queries and keys of row 2" in page.text and "of 5" in page.text
    assert f"1 no text, 2 “{SOURCE}”, 3 “{TARGET}”" in page.text and "Hertz et al., 2208.01626" in page.text
    assert [one["alt"] for one in page.all("img") if "of the method" in one["alt"]] == ["the mask blend of the method"]
    alone = Page(report_page(R.edit(SD, picture, "prompt-to-prompt", **TEXTS)))
    assert not {"looked", "seen", "touched"} & {*alone.all("main")[0]["class"].split()} and alone.data["looks"] == []
    nowhere = Page(report_page(seen_by(picture, "sdedit")[0]))
    assert "touched" not in nowhere.all("main")[0]["class"].split() and "Nowhere" in nowhere.text


def test_a_page_holds_a_bounded_number_of_cells():
    from minidiffedit.views.report import MOST_WORD_CELLS, word_maps

    shares = torch.rand(50, 12, 64, 64) / 77
    shown = word_maps(W.Looks("decode", "x", ("w",) * 12, [*range(50)], {0: shares, 2: shares[..., :16, :16]}))
    fine, coarse = shown["levels"]
    assert len(fine["steps"]) * 12 * 4096 <= MOST_WORD_CELLS and fine["steps"][0] == 0 and fine["steps"][-1] == 49
    assert coarse["steps"] == [*range(50)] and len(json.dumps(shown)) < 1_000_000


# ---------------------------------------------------------------- the command


def words(*more):
    return ["words", MINI / "scenes" / "horse-zebra" / "source.png", "--model", MINI, "--source", *more]


def test_words_from_the_shell(tmp_path, capsys, monkeypatch):
    """On the miniature "horse" is looked for where the horse is."""
    monkeypatch.chdir(tmp_path)
    said = ran(capsys, *words("a photo of a horse on a grass field", "--steps", 5))
    assert said["rows"] == {"predicted": 5, "paid": 5} and said["output"] == "source-words.png"
    assert [one["word"] for one in said["words"]][:5] == ["a", "photo", "of", "a (4)", "horse"]
    page = Image.open("source-words.png")
    assert page.width > 1000 and page.height > 1500
    mask = np.asarray(Image.open(MINI / "scenes" / "horse-zebra" / "mask.png").convert("L")) > 0
    for one in said["words"]:
        for level in one["levels"]:
            heat = np.asarray(level["mean"])
            assert heat.shape == tuple(reversed(level["cells"])) and len(level["steps"]) == 5
            x, y = level["peak"]
            if one["word"] == "horse":
                assert mask[int(y * len(mask)), int(x * len(mask))]
                cells = np.asarray(Image.fromarray(mask).resize(level["cells"], Image.BOX)) > 0
                assert heat[cells].mean() > 1.25 * heat[~cells].mean()
    assert "minidiffedit" in "".join(page.info)


def test_some_words_and_what_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "a photo of a horse on a grass field"
    said = ran(capsys, *words(text, "--steps", 2, "--words", "horse, grass field", "-o", "page.png"))
    assert [one["word"] for one in said["words"]] == ["horse", "grass field"]
    alone = ran(capsys, *words(text, "--steps", 2, "-o", "page.png"))
    share = {one["word"]: one["levels"][0]["share"] for one in alone["words"]}
    assert said["words"][1]["levels"][0]["share"] == pytest.approx(share["grass"] + share["field"], rel=1e-3)
    assert "the prompt has no 'cow'; its words are a, photo" in failed(capsys, *words(text, "--words", "cow"))
    assert "its words are none" in failed(capsys, *words(""))
    assert ran(capsys, *words(text, "--dry-run"))["rows"] == {"predicted": 50, "paid": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["page.png"]


def test_words_with_a_page_of_every_step(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = ran(capsys, *words("a photo of a horse on a grass field", "--steps", 5, "--report", "page.html"))
    assert said["report"] == "page.html" and said["rows"]["paid"] == 5
    page = Page(Path("page.html").read_text())
    (look,) = page.data["looks"]
    assert look["stage"] == "encode" and [len(level["steps"]) for level in look["levels"]] == [5, 5]
    assert "only the way up was asked for" in page.text and "no pair of prompts" not in page.text
    assert "must end in .html" in failed(capsys, *words("a horse", "--report", "page.png"))


def test_edit_with_a_report_looks_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scene = MINI / "scenes" / "horse-zebra" / "source.png"
    told = ["edit", scene, "--model", MINI, "--method", "masactrl", "--target", "a photo of a zebra"]
    told += ["--steps", 2, "--first-step", 1]
    plain = ran(capsys, *told, "--seed", 0, "-o", "a.png")
    with_page = ran(capsys, *told, "--seed", 0, "-o", "b.png", "--report", "b.html")
    assert plain["rows"] == with_page["rows"] and Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    page = Page(Path("b.html").read_text())
    assert "keys and values" in page.text and page.data["looks"][-1]["prompt"] == "a photo of a zebra"


# ---------------------------------------------------------------- mutants

MEANS, LATE = test_the_maps_are_the_means_of_the_maps, test_masactrl_touches_keys_and_values_late
MUTATIONS = {
    "the middle too": ('site.kind != "cross" or site.place == "mid"', 'site.kind != "cross"', MEANS),
    "sums over sites": ("one[at][0] / one[at][1]", "one[at][0]", MEANS),
    "all rows": ("same.nonzero().flatten().tolist()", "[*range(len(same))]", MEANS),
    "a word's first position": ("columns[list(span), i] = 1", "columns[span[0], i] = 1", MEANS),
    "queries for values": ('("queries", "keys", "values")', '("values", "keys", "queries")', LATE),
    "a step for all": ("at.get(t) == what for t", "True for t", LATE),
    "steps as they first come": ("[*(one for one in times if one != t), t]", "[*times, *[t] * (t not in times)]",
                                 test_steps_are_those_on_the_way_down),
    "slices are exchanges": ("if one.equal(was[s])", "if one is was", LATE),
    "the method left out": ("out = tap(noted, site, q, k, v)", "out = noted(site, q, k, v)",
                            test_a_witness_changes_nothing),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, picture, monkeypatch):
    old, new, test = MUTATIONS[name]
    monkeypatch.setitem(globals(), "W", mutant("views.witness", old, new, monkeypatch))
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        run(test, picture=picture)
