"""Masks from words against maps that are built on diffusers' UNet. `W` is exchanged by the mutants at the end."""

import json
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
from stubs import ALPHA_BAR, latent

from minidiffedit import cli
from minidiffedit import run as R
from minidiffedit.methods import word_maps as W
from minidiffedit.methods.words import words_of

SD = tiny.model()
X0 = latent(1, 4, 8, 32, dtype=torch.float32)
SOURCE, TARGET = "a photo of a horse on grass", "a photo of a zebra on grass"


def found(x0=X0, source=SOURCE, target=TARGET, **options):
    words = [words_of(SD.tokenizer, one) for one in (source, target)]
    return W.word_mask(
        SD.eps, x0, SD.text([source]), *words, SD.coarsest, **{"steps": 10, "maps": 2, "seed": 5} | options
    )


@once
@torch.no_grad()
def by_hand(x0, at, t, seeds, levels):
    """Mean over noises, sites and heads of the maps at some positions; levels: cells of each -> its rows, columns."""
    seen = []

    def hook(name, cross, q, k, v):
        A = maps(q, k)
        if cross and q.shape[2] in levels and not name.startswith("mid"):
            one = A[0, :, :, at].mean(0).sum(-1).reshape(1, 1, *levels[q.shape[2]])
            seen.append(torch.nn.functional.interpolate(one, x0.shape[2:], mode="bilinear")[0, 0])
        return A @ v

    net, a, generator = explicit.peer(SD, hook), ALPHA_BAR[t], torch.Generator().manual_seed(seeds)
    for _ in range(2):
        x = a**0.5 * x0 + (1 - a) ** 0.5 * torch.randn(1, *x0.shape[1:], generator=generator)
        net(x.float(), t, SD.text([SOURCE]))
    total = torch.stack(seen).mean(0)
    return ((total - total.min()) / (total.max() - total.min())).numpy()


COARSE, BOTH = {16: (2, 8)}, {16: (2, 8), 64: (4, 16)}


@pytest.mark.parametrize("options, at, t, levels", [
    ({}, [5], 401, COARSE), ({"mask_words": "horse"}, [5], 401, COARSE), ({"mask_levels": 2}, [5], 401, BOTH),
    ({"mask_words": "a photo, Grass", "mask_strength": 0.8}, [1, 2, 7], 701, COARSE),
])  # fmt: skip
def test_it_is_the_mean_of_the_maps(options, at, t, levels):
    done, heat = found(**options), by_hand(X0, at, t, 5, levels)
    assert np.allclose(done.heat[0, 0].numpy(), heat, atol=1e-3) and done.verdict == ("found",)
    assert ((done.mask[0, 0].numpy() == (heat > 0.4)) | (np.abs(heat - 0.4) < 2e-3)).all()
    assert 0 < done.coverage[0] < 1 and done.maps.shape == (1, 2, 8, 32)


def test_pictures_in_a_batch_are_as_alone():
    pair = torch.cat([X0, latent(1, 4, 8, 32, seed=3, dtype=torch.float32)])
    together = found(pair)
    for i in range(2):
        assert torch.allclose(together.maps[i], found(pair[i : i + 1], seed=5 + i).maps[0], atol=1e-6)


def test_no_map_of_self_attention_is_built(monkeypatch):
    shapes = []

    def weights(q, k, real=W.weights):
        shapes.append((q.shape[2], k.shape[2]))
        return real(q, k)

    monkeypatch.setattr(W, "weights", weights)
    found(maps=1, mask_levels=3)
    assert set(shapes) == {(16, 77), (64, 77), (256, 77)} and len(shapes) == 15


@pytest.mark.parametrize("options, why", [
    ({"mask_words": "cow"}, "the prompt has no 'cow'; its words are a, photo"), ({"mask_words": " "}, "has no ''"),
    ({"mask_words": "zebra"}, "no 'zebra'"), ({"target": SOURCE}, "the target has all words of the source .a photo"),
    ({"target": SOURCE + " and a tree"}, "give mask_words"), ({"source": "", "target": "x"}, r"source \(none\)"),
])  # fmt: skip
def test_words_that_are_not_there(options, why):
    before = SD.evaluations
    with pytest.raises(ValueError, match=why):
        found(**options)
    assert SD.evaluations == before
    with pytest.raises(ValueError, match=why):
        R.plan("words+diffedit", **{"source": SOURCE, "target": TARGET} | options)
    given = {"source": SOURCE, "target": TARGET} | options | {"mask": np.ones((8, 8))}
    assert R.plan("words+diffedit", **given).given["mask"] is not None  # under one's own mask nothing is looked up


# ---------------------------------------------------------------- as the mask of any editor

TEXTS = {"source": SOURCE, "target": TARGET, "steps": 5, "seed": 0}


@pytest.mark.parametrize("method, needs", [
    ("words+diffedit", ["source", "target"]), ("direct+words+diffedit", ["source", "target"]),
    ("words+direct+diffedit", ["source", "target"]), ("words+user-mask", ["source", "target"]),
    ("words+sdedit", ["source", "target"]), ("contrast+user-mask", ["target"]),
])  # fmt: skip
def test_masks_have_names_as_inversions_have(method, needs):
    made = R.blank_plan(method)
    assert sorted(made.needs) == needs and made.functions["mask"].startswith(("word_maps:", "diffedit:contrast"))
    assert made.method == ("direct+words+diffedit" if "direct" in method else method)
    assert R.plan(made.method, **{name: name for name in needs}).functions == made.functions
    assert R.known_system(method) is R.known_system(method.rpartition("+")[2])


def test_by_name(picture):
    done = R.edit(SD, picture, "words+diffedit", maps=3, **TEXTS)
    assert done.evaluations == {"mask": 3, "encode": 4, "decode": 8} and done.settings["method"] == "words+diffedit"
    assert done.coverage and torch.equal(done.latent_mask, done.found.mask.float()) and done.heat is not None
    cut = R.resume(done, mask_threshold=0.6)
    assert cut.evaluations["mask"] == 0 and cut.coverage < done.coverage
    other = R.resume(done, mask_words="grass")
    assert other.evaluations == {"mask": 3, "encode": 0, "decode": 8} and other.method == "words+diffedit"
    assert R.edit(SD, picture, "contrast+diffedit", **TEXTS).method == "diffedit"  # its own


@pytest.mark.parametrize("method", ["diffedit", "sdedit", "user-mask", "blended-latent-diffusion", "pfb-diff"])
def test_the_source_of_a_mask_by_itself(method, picture):
    """words:horse is the method's name with words, and mask_words."""
    named = R.plan(f"words+{method}", mask_words="horse", **TEXTS)
    made = R.plan(method, mask_from="words:horse", **TEXTS)
    assert made.record == named.record and made.functions == named.functions
    assert R.plan(method, mask_from="words", mask_words="horse", **TEXTS).record == named.record
    assert R.plan(f"words+{method}", mask_from="words:horse", **TEXTS).record == named.record


def test_the_source_of_a_mask_from_the_shell(folder, sd, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    told = ["in.png", "--model", folder, "--source", SOURCE, "--maps", 2, "--seed", 0, "--steps", 5]
    target, asked = ["--target", TARGET], ["--mask-from", "words:horse"]
    said = ran(capsys, "edit", *told, *target, *asked, "-o", "out.png")
    same = R.edit(sd, picture, "words+diffedit", mask_words="horse", maps=2, **TEXTS)
    assert said["method"] == "words+diffedit" and said["settings"]["mask_words"] == "horse"
    assert said["coverage"] == same.coverage and said["rows"]["paid"] == same.rows
    assert ran(capsys, "edit", *told, *target, *asked, "--method", "sdedit", "-o", "b.png")["method"] == "words+sdedit"
    found = ran(capsys, "mask", *told, *target, *asked, "-o", "m.png")
    assert found["coverage"] == same.coverage and found["rows"]["paid"] == 2
    line = failed(capsys, "edit", *told, *target, "--mask-from", "words:cow", "-o", "c.png")
    assert "the prompt has no 'cow'" in line


def test_the_source_of_a_mask_in_a_sheet_and_in_a_manifest(folder, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    told = ["--model", folder, "--source", SOURCE, "--target", TARGET, "--maps", 2, "--seed", 0, "--steps", 5]
    ran(capsys, "edit", "in.png", *told, "--mask-from", "words:horse", "-o", "one.png")
    one = Image.open("one.png").tobytes()
    axes = ["--rows", "strength=0.4,0.8", "--columns", "mask_threshold=0.4,0.9"]
    sheet = ran(capsys, "sheet", "in.png", *told, "--mask-from", "words:horse", *axes, "--save-edits", "edits")
    assert sheet["settings"]["method"] == "words+diffedit" and sheet["settings"]["mask_words"] == "horse"
    assert Image.open("edits/strength-0.8-mask-threshold-0.4.png").tobytes() == one
    line = failed(capsys, "sheet", "in.png", *told, "--mask-from", "words:horse", "--rows", "method=diffedit,sdedit")
    assert "mask_from goes with one method" in line
    (tmp_path / "m.csv").write_text(
        "image,output,method,mask_from\nin.png,a.png,,\nin.png,b.png,sdedit,words\nin.png,c.png,,words:grass\n"
        "in.png,d.png,masactrl,words:horse\n"
    )
    assert cli.main([str(one) for one in ("batch", "m.csv", *told, "--mask-from", "words:horse", "-o", "out")]) == 1
    lines = {one["output"]: one for one in map(json.loads, Path("out/results.jsonl").read_text().splitlines())}
    assert Image.open("out/a.png").tobytes() == one
    assert {name: (one["method"], one["settings"]["mask_words"]) for name, one in lines.items() if "method" in one} == {
        "a.png": ("words+diffedit", "horse"), "b.png": ("words+sdedit", None), "c.png": ("words+diffedit", "grass"),
    }  # fmt: skip
    assert "masactrl takes no mask of another source" in lines["d.png"]["error"]


@pytest.mark.parametrize("method, asked, why", [
    ("masactrl", "words:horse", "masactrl takes no mask of another source, got 'words'"),
    ("diffedit", "word", "a mask can come from contrast, .*got 'word' .did you mean 'words'"),
    ("contrast+user-mask", "words", "asks for the mask 'contrast', and besides 'words' is given"),
    ("user-mask", "contrast:horse", "a mask from contrast is told by no text, got 'contrast:horse'"),
    ("diffedit", "words:", "the prompt has no ''"),
])  # fmt: skip
def test_sources_that_mean_nothing(method, asked, why):
    with pytest.raises(ValueError, match=why):
        R.plan(method, mask_from=asked, **TEXTS)


@pytest.mark.parametrize("method, why", [
    ("words+masactrl", "masactrl takes no mask of another source, got 'words'"), ("words+zzz", "no method 'zzz'"),
    ("words+diffedit-regions", "diffedit-regions takes no mask"), ("words+contrast+diffedit", "a name has one mask"),
    ("ddim+direct+replay", "a name has one inversion .*got 'ddim' and 'direct'"),
    ("word+diffedit", "must be one of ddim"),
])  # fmt: skip
def test_names_that_mean_nothing(method, why):
    with pytest.raises(ValueError, match=why):
        R.plan(method, target="a")


# ---------------------------------------------------------------- mutants

MEAN = test_it_is_the_mean_of_the_maps
MUTATIONS = {
    "the middle too": ("range(finest, coarsest + 1)", "range(finest, coarsest + 2)", MEAN),
    "finer levels": ("coarsest - mask_levels + 1, coarsest", "coarsest - mask_levels, coarsest", MEAN),
    "the loudest head": (".mean(1).sum(-1)", ".amax(1).sum(-1)", MEAN),
    "one position": (".mean(1).sum(-1)", ".mean(1)[..., -1]", MEAN),
    "what both have": ("if not kept[at]", "if kept[at]", MEAN),
    "one seed": ("seed + i", "seed", test_pictures_in_a_batch_are_as_alone),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    old, new, test = MUTATIONS[name]
    monkeypatch.setitem(globals(), "W", mutant("methods.word_maps", old, new, monkeypatch))
    with pytest.raises((AssertionError, RuntimeError)):
        run(test)
