"""Several edits in one call: the decoding on stubs, the counts and the command on the tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stubs import Counting, gaussian, latent

from minidiffedit import cli, edit, edit_regions, encode, masked_decode, regional_decode
from minidiffedit.files.images import latent_mask
from minidiffedit.regions import disjoint

QUICK = {"steps": 10, "maps": 2, "seed": 0}
PAIRS = [("a horse", "a zebra"), ("a horse", "snow"), ("grass", "sand")]


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 93, 3), dtype=np.uint8))


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
    expected = masked_decode(one, trajectory, mask, 2.0, 0.0, guidance_scale=g)
    assert torch.equal(regional_decode(other, trajectory, [mask], [2.0], 0.0, guidance_scale=g), expected)
    assert one.rows == other.rows and [t for _, t, _ in one.calls] == [t for _, t, _ in other.calls]


@pytest.mark.parametrize("g, rows", [(1.0, 2), (3.0, 3)])
def test_each_region_goes_to_its_own_target(g, rows):
    """With a predictor that sees one cell at a time, regions side by side equal the edits one by one."""
    trajectory = encode(gaussian, latent(1, 4, 6, 6), 0.0, steps=10)
    left, right = halves()
    left[..., 0] = 0
    eps = Counting(gaussian)
    both = regional_decode(eps, trajectory, [left, right], [2.0, -1.0], 0.0, guidance_scale=g)
    assert eps.rows == rows * 8 and eps.calls[0][2] == ([2.0, -1.0] if g == 1 else [0.0, 2.0, -1.0])
    for mask, target in ((left, 2.0), (right, -1.0)):
        alone = masked_decode(gaussian, trajectory, mask, target, 0.0, guidance_scale=g)
        assert torch.allclose(both * mask, alone * mask, rtol=0, atol=1e-12)
    assert torch.equal(both[..., 0], trajectory[0][..., 0])


def test_overlaps_go_to_the_earlier():
    a, b, c = (torch.tensor(row)[None, None, None] for row in ([1, 1, 0, 0.3], [0, 1, 1, 0.9], [1, 1, 1, 1.0]))
    own = disjoint([a, b, c])
    assert torch.equal(own[0], a) and own[1].flatten().tolist() == pytest.approx([0, 0, 1, 0.7])
    assert torch.allclose(sum(own), torch.ones(1, 1, 1, 4)) and own[2].sum() < 1e-6
    trajectory = encode(gaussian, latent(1, 4, 1, 4), 0.0, steps=4)
    assert torch.isfinite(regional_decode(gaussian, trajectory, own, [1.0, 2.0, 3.0], 0.0)).all()
    for masks, targets in (([a, b], [1.0, 2.0]), ([], []), ([a], [1.0, 2.0]), ([torch.ones(3, 3)], [1.0])):
        with pytest.raises(ValueError):
            regional_decode(gaussian, trajectory, masks, targets, 0.0)


def test_counts_and_masks(sd, picture):
    """(3 edits + 2 sources) n maps, one encoding, 4 rows a step; a mask is the pair's own, less the earlier ones'."""
    with pytest.warns(UserWarning, match="to earlier edits"):
        done = edit_regions(sd, picture, PAIRS, **QUICK)
    used = sum(c > 0 for c in done.coverage)
    assert done.evaluations == {"mask": 10, "encode": 8, "decode": 8 * (used + 1)} and used >= 2
    left = torch.ones(1, 1, 8, 10)
    for (source, target), one, own in zip(PAIRS, done.found, done.latent_masks):
        alone = edit(sd, picture, source=source, target=target, **QUICK | {"steps": 10})
        assert torch.allclose(one.heat, alone.heat, atol=1e-4)
        assert torch.equal(own, one.mask.float() * left)
        left -= own
    assert torch.equal(latent_mask(done.mask, picture.size, (80, 64)), 1 - left)
    assert torch.equal((done.latent * left)[0], (done.trajectory[0] * left)[0])


def test_one_pair_is_the_edit(sd, picture):
    one = edit_regions(sd, picture, PAIRS[:1], **QUICK)
    plain = edit(sd, picture, source="a horse", target="a zebra", **QUICK)
    assert torch.equal(one.latent, plain.latent) and one.image.tobytes() == plain.image.tobytes()
    assert one.evaluations == plain.evaluations


@pytest.mark.filterwarnings("ignore:'x' to 'x'")
def test_pairs_that_find_nothing_drop_out(sd, picture):
    with pytest.warns(UserWarning, match="'x' to 'x' has no cell"):
        done = edit_regions(sd, picture, [("x", "x"), PAIRS[0]], **QUICK)
    assert done.evaluations == {"mask": 4, "encode": 8, "decode": 16} and done.coverage[0] == 0
    for options, why in (({}, "no pair"), ({"strength": 0.0}, "level 0")):
        with pytest.warns(UserWarning, match=f"nothing to edit: .*{why}"):
            none = edit_regions(sd, picture, [("x", "x")], **QUICK | options)
        assert none.image.tobytes() == picture.tobytes() and sum(none.evaluations.values()) == 0
    for edits in ([], ["ab"], [("a", "b", "c")], [("a", None)]):
        with pytest.raises(ValueError):
            edit_regions(sd, picture, edits, **QUICK)


FAST = ["--steps", "10", "--maps", "2", "--seed", "0", "--mask-threshold", "0.7"]


@pytest.mark.filterwarnings("ignore:'grass' to")
def test_the_command_and_its_record(tmp_path, monkeypatch, picture, folder, sd, capsys):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    command = ["edit", "in.png", "--edit", "a horse=>a zebra", "--edit", " grass => sand ", *FAST, "--json", "--quiet"]
    assert cli.main([*command, "--dry-run", "--model", "no-such-model"]) == 0
    planned = json.loads(capsys.readouterr().out)["evaluations"]
    assert cli.main([*command, "-o", "o.png", "--save-mask", "m.png", "--model", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (
        result["evaluations"] == planned == {"mask": 8, "encode": 8, "decode": 24}
        and result["mask"] == "m.png"
        and result["coverage"] > 0
    )
    with Image.open("o.png") as file:
        said, pixels = json.loads(file.text["minidiffedit"]), file.tobytes()
    assert said["edits"] == [["a horse", "a zebra"], ["grass", "sand"]] and said["edited"] is True
    assert said["prompt"] == "a zebra; sand"
    arguments = {name: said[name] for name in ("edits", "steps", "maps", "seed", "mask_threshold")}
    assert edit_regions(sd, picture, **arguments).image.tobytes() == pixels


@pytest.mark.parametrize("options, code, word", [
    (["--edit", "a to b"], 2, "SOURCE=>TARGET"), (["--edit", "a=>b", "--target", "c"], 2, "not allowed"),
    (["--edit", "a=>b", "--mask", "in.png"], 1, "--mask goes with --target"),
    (["--edit", "a=>b", "--save-state", "a.safetensors"], 1, "--save-state"),
    (["--edit", "a=>b", "--dilate", "0"], 1, "--dilate"), (["--edit", "a=>b", "--encode-text", "source"], 1, "encode"),
    (["--edit", "a=>b", "--steps", "0"], 1, "steps"),
    (["--edit", "a=>b", "--edit", "a=>\udcff"], 1, "UTF-8"),
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
