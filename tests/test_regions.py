"""Several edits in one call: the decoding on stubs, the counts and the command on the tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from mutants import mutant, run
from PIL import Image
from stubs import Counting, Model, gaussian, latent

from minidiffedit import cli, encode, find_mask, masked_decode
from minidiffedit import run as R
from minidiffedit.files.images import latent_mask
from minidiffedit.methods import diffedit_regions as G

QUICK = {"steps": 10, "maps": 2, "seed": 0}
PAIRS = [("a horse", "a zebra"), ("a horse", "snow"), ("grass", "sand")]


@pytest.fixture(scope="module")
def sd():
    return Model()


def regions(sd, picture, edits, **options):
    return R.edit(sd, picture, "diffedit-regions", edits=edits, **QUICK | options)


def halves():
    left = torch.zeros(1, 1, 6, 6)
    left[..., :3] = 1
    return left, 1 - left


@pytest.mark.parametrize("g", [1.0, 7.5])
@pytest.mark.parametrize("soft", [False, True])
def test_one_edit_is_masked_decode_bit_for_bit(g, soft):
    trajectory = encode(gaussian, latent(2, 4, 6, 6, dtype=torch.float32), 0.0, steps=10)
    mask = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) if soft else halves()[0]
    mask[..., 0] = 0
    one, other = Counting(gaussian), Counting(gaussian)
    expected = masked_decode(one, trajectory, mask, 2.0, 0.0, guidance_scale=g, grey="blend")  # regions only blend
    assert torch.equal(G.regional_decode(other, trajectory, [mask], [2.0], 0.0, guidance_scale=g), expected)
    assert one.rows == other.rows and [t for _, t, _ in one.calls] == [t for _, t, _ in other.calls]


@pytest.mark.parametrize("g, rows", [(1.0, 2), (3.0, 3)])
def test_each_region_goes_to_its_own_target(g, rows):
    """With a predictor that sees one cell at a time, regions side by side equal the edits one by one."""
    trajectory = encode(gaussian, latent(1, 4, 6, 6), 0.0, steps=10)
    left, right = halves()
    left[..., 0] = 0
    eps = Counting(gaussian)
    both = G.regional_decode(eps, trajectory, [left, right], [2.0, -1.0], 0.0, guidance_scale=g)
    assert eps.rows == rows * 8 and eps.calls[0][2] == ([2.0, -1.0] if g == 1 else [0.0, 2.0, -1.0])
    for mask, target in ((left, 2.0), (right, -1.0)):
        alone = masked_decode(gaussian, trajectory, mask, target, 0.0, guidance_scale=g)
        assert torch.allclose(both * mask, alone * mask, rtol=0, atol=1e-12)
    assert torch.equal(both[..., 0], trajectory[0][..., 0])


def test_overlaps_go_to_the_earlier():
    a, b, c = (torch.tensor(row)[None, None, None] for row in ([1, 1, 0, 0.3], [0, 1, 1, 0.9], [1, 1, 1, 1.0]))
    own = G.disjoint([a, b, c])
    assert torch.equal(own[0], a) and own[1].flatten().tolist() == pytest.approx([0, 0, 1, 0.7])
    assert torch.allclose(sum(own), torch.ones(1, 1, 1, 4)) and own[2].sum() < 1e-6
    trajectory = encode(gaussian, latent(1, 4, 1, 4), 0.0, steps=4)
    assert torch.isfinite(G.regional_decode(gaussian, trajectory, own, [1.0, 2.0, 3.0], 0.0)).all()
    for masks, targets in (([a, b], [1.0, 2.0]), ([], []), ([a], [1.0, 2.0]), ([torch.ones(3, 3)], [1.0])):
        with pytest.raises(ValueError):
            G.regional_decode(gaussian, trajectory, masks, targets, 0.0)


@pytest.mark.filterwarnings("ignore:.*to earlier edits", "ignore:the mask of image", "ignore:edit . has no cell")
def test_counts_and_masks(sd, picture):
    """(3 edits + 2 sources) n maps, one encoding, 4 rows a step; a mask is the pair's own, less the earlier ones'."""
    done = regions(sd, picture, PAIRS, mask_threshold=0.2)
    used = sum(bool(one.any()) for one in done.found.each)
    assert done.evaluations == {"mask": 10, "encode": 8, "decode": 8 * (used + 1)} and used >= 2
    left = torch.ones(1, 1, 8, 10)
    for (source, target), one, own in zip(PAIRS, done.found.found, done.found.each):
        alone = find_mask(sd.eps, done.x0, sd.text([target]), sd.text([source]), threshold=0.2, steps=10, maps=2)
        assert torch.allclose(one.heat, alone.heat, atol=1e-4)
        assert torch.equal(own, one.mask.float() * left)
        left -= own
    assert torch.equal(latent_mask(done.mask, picture.size, (80, 64)), 1 - left)
    assert torch.equal(done.latent_mask, 1 - left) and done.verdict == f"{used} found"
    assert torch.equal((done.latent * left)[0], (done.trajectory[0] * left)[0])


def test_one_pair_is_the_edit(sd, picture):
    one = regions(sd, picture, PAIRS[:1], negative_prompt="blurry")
    plain = R.edit(sd, picture, source="a horse", target="a zebra", negative_prompt="blurry", **QUICK)
    assert torch.equal(one.latent, plain.latent) and one.image.tobytes() == plain.image.tobytes()
    assert one.evaluations == plain.evaluations


@pytest.mark.filterwarnings("ignore:nothing to edit")
def test_pairs_that_find_nothing_drop_out(sd, picture):
    with pytest.warns(UserWarning, match="edit 1 has no cell left"):
        done = regions(sd, picture, [("x", "x"), PAIRS[0]])
    assert done.evaluations == {"mask": 4, "encode": 8, "decode": 16} and not done.found.each[0].any()
    alone = regions(sd, picture, [PAIRS[0]])
    assert torch.equal(done.latent, alone.latent) and done.verdict == "1 found"
    with pytest.warns(UserWarning, match="edit 2 has no cell left"):
        assert regions(sd, picture, [PAIRS[0], PAIRS[0]]).evaluations["decode"] == 16


def test_what_is_known_is_not_paid_again(sd, picture):
    first = regions(sd, picture, PAIRS[:1])
    assert regions(sd, picture, PAIRS[:1], guidance_scale=2.0, reuse=first).evaluations == {
        "mask": 0,
        "encode": 0,
        "decode": 16,
    }
    plain = R.edit(sd, picture, target="a zebra", source="a horse", reuse=first, **QUICK)
    assert plain.evaluations == {"mask": 4, "encode": 0, "decode": 16}


@pytest.mark.filterwarnings("ignore:.*to earlier edits", "ignore:edit . has no cell", "ignore:the mask of image")
def test_another_threshold_cuts_the_known_maps(sd, picture):
    """For no row, to the very masks of a run that knows nothing; another pair, or other maps, are sought anew."""
    first = regions(sd, picture, PAIRS)
    moved = {"mask_threshold": 0.2, "mask_clip": 2.0}
    again, anew = regions(sd, picture, PAIRS, reuse=first, **moved), regions(sd, picture, PAIRS, **moved)
    assert again.evaluations["mask"] == 0 and anew.evaluations["mask"] == 10
    for one, other in zip(again.found.each, anew.found.each, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(again.latent, anew.latent) and not torch.equal(again.latent_mask, first.latent_mask)
    assert regions(sd, picture, PAIRS[:2], reuse=first).evaluations["mask"] > 0
    assert regions(sd, picture, PAIRS, reuse=first, maps=1).evaluations["mask"] > 0


FAST = ["--steps", "10", "--maps", "2", "--seed", "0", "--mask-threshold", "0.7"]


@pytest.mark.filterwarnings("ignore:edit . has no cell")
def test_the_command_and_its_record(tmp_path, monkeypatch, picture, folder, capsys):
    import tiny

    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    command = ["edit", "in.png", "--edit", "a horse=>a zebra", "--edit", " grass => sand ", *FAST, "--json", "--quiet"]
    assert cli.main([*command, "--dry-run", "--model", "no-such-model"]) == 0
    planned = json.loads(capsys.readouterr().out)["evaluations"]
    assert cli.main([*command, "-o", "o.png", "--save-mask", "m.png", "--model", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["evaluations"] == planned == {"mask": 8, "encode": 8, "decode": 24} and result["mask"] == "m.png"
    assert result["method"] == "diffedit-regions" and result["coverage"] > 0
    with Image.open("o.png") as file:
        said, pixels = json.loads(file.text["minidiffedit"]), file.tobytes()
    assert said["edits"] == [["a horse", "a zebra"], ["grass", "sand"]] and said["edited"] is True
    arguments = {name: said[name] for name in ("method", "edits", "steps", "maps", "seed", "mask_threshold")}
    assert R.edit(tiny.model(unet=tiny.QUICK), picture, **arguments).image.tobytes() == pixels


@pytest.mark.parametrize("options, code, word", [
    (["--edit", "a to b"], 2, "SOURCE=>TARGET"), (["--edit", "a=>b", "--target", "c"], 2, "--target"),
    (["--edit", "a=>b", "--mask", "in.png"], 2, "--mask"), (["--edit", "a=>b", "--dilate", "0"], 2, "--dilate"),
    (["--edit", "a=>b", "--steps", "0"], 1, "steps"), (["--edit", "a=>b", "--edit", "a=>\udcff"], 1, "UTF-8"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_before_the_model_is_loaded(
    tmp_path, monkeypatch, picture, capsys, options, code, word
):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    try:
        assert cli.main(["edit", "in.png", "--model", "no-such-model", *options]) == code
    except SystemExit as exit:
        assert exit.code == code
    out, err = capsys.readouterr()
    assert out == "" and word in err and Path("in.png").exists()


# name: (where in methods/diffedit_regions.py, what stands there, what a mistake would put, the test that must fail)
MUTATIONS = {
    "a cell is everybody's": ("disjoint", "torch.minimum(mask.float(), free)", "mask.float()",
        test_overlaps_go_to_the_earlier),
    "the later edit wins": ("disjoint", "for mask in masks:", "for mask in masks[::-1]:",
        test_overlaps_go_to_the_earlier),
    "each source predicted anew": ("contrasts", "known_reference=known.get(id(source)),", "", test_counts_and_masks),
    "one source's prediction for all": ("contrasts", "known.get(id(source))", "next(iter(known.values()), None)",
        test_counts_and_masks),
    "known maps as they were cut": ("contrasts", "threshold_maps(one.maps, one.flat_below, **cut)", "one",
        test_another_threshold_cuts_the_known_maps),
    "rows for an edit without a cell": ("decode_edits", "if own.any()", "", test_pairs_that_find_nothing_drop_out),
    "towards the source": ("decode_edits", "own, (_, target)", "own, (target, _)", test_one_pair_is_the_edit),
    "guided from the null text": ("decode_edits", "targets, own_null", "targets, targets[0]",
        test_one_pair_is_the_edit),
    "each target in full": ("regional_decode", "share * (one - e_null)", "one - e_null",
        test_each_region_goes_to_its_own_target),
    "shares that are masks": ("regional_decode", "torch.where(M > 0, mask / M, 0)", "mask",
        test_one_edit_is_masked_decode_bit_for_bit),
    "blend with the level just left": ("regional_decode", "trajectory[j - 1]", "trajectory[j]",
        test_one_edit_is_masked_decode_bit_for_bit),
    "null rows at guidance 1": ("regional_decode", "if guidance_scale == 1", "if False",
        test_each_region_goes_to_its_own_target),
    "masks that overlap": ("regional_decode", "M > 1 + 1e-6", "M > 3", test_overlaps_go_to_the_earlier),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, picture, monkeypatch):
    function, old, new, test = MUTATIONS[name]
    changed = mutant(f"methods.diffedit_regions:{function}", old, new, monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "G", changed)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(test, sd=sd, picture=picture)
