"""Grey in masks: what a value between 0 and 1 does, that it does so whatever the number of steps, and the paste."""

import numpy as np
import pytest
import torch
from PIL import Image
from stubs import Model, gaussian, latent

from minidiffedit import diffedit as D
from minidiffedit import edit
from minidiffedit.files.images import paste_mask
from minidiffedit.methods.table import SYSTEMS
from minidiffedit.run import blank_plan

FEW = {"target": "a zebra", "seed": 0}


def test_a_cell_joins_below_its_level():
    """Below 1 + v (K - 1), in closed form: whole levels, and of the one between two a part."""
    M = torch.tensor([0.0, 1 / 255, 0.25, 0.5, 0.55, 1.0])
    shares = torch.stack([D.mask_at(M, j, 10) for j in range(10)])
    torch.testing.assert_close(shares.sum(0), 9 * M + torch.minimum(10 * M, torch.ones(6)))
    assert torch.equal(shares[:, 0], torch.zeros(10)) and torch.equal(shares[:, -1], torch.ones(10))
    assert shares[:5, 3].eq(1).all() and shares[5, 3] == 0.5 and shares[6:, 3].eq(0).all() and 0 < shares[0, 1] < 0.1
    assert torch.equal(D.mask_at(M, 0, 1), M)
    assert torch.equal(D.mask_at(M, 7, 10, "blend"), M)
    with pytest.raises(ValueError, match="level or blend"):
        D.mask_at(M, 0, 10, "both")


def moved(eps, x0, target, null, steps, value, grey):
    """How far a mask of one value moves the latent, by white's way."""
    path = D.encode(eps, x0, null, steps=steps)
    ends = [D.masked_decode(eps, path, torch.full((1, 1, 3, 3), v), target, null, grey=grey) for v in (value, 1.0)]
    return float((ends[0] - x0).norm() / (ends[1] - x0).norm())


@pytest.mark.parametrize("value", [0.25, 0.5, 0.75])
def test_greys_effect_is_the_same_at_any_number_of_steps(value):
    """Within .1 of white's, under the exact score of a distribution; a blend at each level is not."""
    shares = [moved(gaussian, latent(1, 4, 3, 3), 2.0, 0.0, steps, value, "level") for steps in (10, 25, 50)]
    assert max(shares) - min(shares) < 0.1 and min(shares) > 0.02 and max(shares) < 0.98, shares
    blended = [moved(gaussian, latent(1, 4, 3, 3), 2.0, 0.0, steps, value, "blend") for steps in (10, 25, 50)]
    assert value == 0.75 or max(blended) > 2 * min(blended), blended


WITH_GREY = [name for name, row in SYSTEMS.items() if row.edit and "grey" in blank_plan(name).options]
OTHERS = {"diffedit-regions", "ledits++", "sd-inpainting", "inpaint-anything", "sde-drag"}  # no blend of grey
OTHERS |= {"paint-by-example"}
OTHERS |= {"drag-diffusion", "drag-noise", "dragon-diffusion", "mag-edit", "tf-icon", "ti-guided-edit"}  # nor these


@pytest.mark.parametrize("method", WITH_GREY)
def test_masks_of_0_and_1_give_the_same_bits_in_both_ways(method):
    """And grey does not."""
    sd = Model(SYSTEMS[method].weights)
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    needs = {name: "a zebra" for name in blank_plan(method).needs if name != "mask"}
    given = blank_plan(method).given
    if "mask" not in given:
        return  # without a mask there is none to be grey
    options = {"steps": 10, "seed": 0} | needs | ({"target": "a zebra"} if "target" in given else {})
    binary, soft = (torch.zeros(1, 1, 8, 8) for _ in range(2))
    binary[..., 2:6, 1:7], soft[..., 2:6, 1:7] = 1, 0.5

    def latents(mask):
        return [edit(sd, picture, method, mask=mask, grey=grey, **options).latent for grey in ("level", "blend")]

    one, other = latents(binary)
    assert torch.equal(one, other)
    one, other = latents(soft)
    assert not torch.equal(one, other)


def test_every_method_under_a_mask_says_what_grey_does():
    masked = [name for name, row in SYSTEMS.items() if row.edit and "mask" in blank_plan(name).given]
    assert {*masked} - {*WITH_GREY} <= OTHERS


def test_the_paste_follows_the_masks_value():
    """Of haze at most its share; beside a white cell the rim, elsewhere never more than the cell's own value."""
    M = torch.full((1, 1, 8, 8), 1 / 255)
    M[..., :3, :3], M[..., 6, 6], M[..., 0, 6:] = 1.0, 0.5, 0.0
    pasted = np.asarray(paste_mask(M, (64, 64)))
    cells = pasted.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3)  # row, column, pixels
    assert (cells[:3, :3] == 255).all() and cells[3, 3].max() > 128  # grown by one cell, then faded
    assert (cells[0, 6:] == 0).all() and cells[7, 7].max() == cells[5, 0].max() == 1
    assert 100 < cells[6, 6].max() <= 128 and cells[6, 7].max() == 1
    hard = (M == 1).float()
    ring = np.asarray(paste_mask(hard, (64, 64)))
    assert (pasted >= ring).all() and (paste_mask(hard > 0, (64, 64)).tobytes() == ring.tobytes())


@pytest.mark.parametrize("haze", [1, 3])
def test_haze_changes_nothing_visible(haze):
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    mask = Image.new("L", (64, 64), haze)
    mask.paste(255, (16, 16, 40, 40))
    with pytest.warns(UserWarning, match=r"reach from 0\.0\d+ to 1 .*nothing is kept wholly"):
        done = edit(Model(), picture, mask=mask, steps=10, **FEW)
    with pytest.warns(UserWarning, match="nothing is kept wholly"):
        plain = edit(Model(), picture, mask=mask, steps=10, paste=False, **FEW)
    far = np.asarray(done.paste_mask) <= haze
    before, after, decoded = (np.asarray(one, int)[far] for one in (picture, done.image, plain.image))
    assert far.mean() > 0.3 and (abs(after - before) <= abs(decoded - before) * haze / 255 + 0.5).all()


@pytest.mark.slow
@pytest.mark.long
def test_grey_on_the_miniature():
    """The table of bench/grey.py at .5: the share of white's way that grey moves the latent, the mean of four scenes.
    On a network it is not one number, as an object comes or does not; but it is steadier than a blend's at each level.
    """
    import json
    from pathlib import Path

    from minidiffedit import StableDiffusion

    folder, shares = Path(__file__).parent.parent / "weights" / "mini", {"level": [], "blend": []}
    known = {one["folder"]: one for one in json.loads((folder / "scenes/scenes.json").read_text(encoding="utf-8"))}
    sd, scenes = StableDiffusion.load(folder), ("horse-zebra", "dog-cat", "lemon-strawberry", "salad-cake")
    grey, white = (torch.full((1, 1, 24, 24), v) for v in (0.5, 1.0))
    for steps in (10, 25, 50):
        found = {"level": [], "blend": []}
        for scene in scenes:
            options = {"target": known[scene]["target"], "steps": steps, "seed": 0, "paste": False}
            picture = folder / "scenes" / scene / "source.png"
            whole = edit(sd, picture, "user-mask", mask=white, **options)
            for way, some in found.items():
                half = edit(sd, picture, "user-mask", mask=grey, grey=way, reuse=whole, **options)
                some.append(float((half.latent - half.x0).norm() / (whole.latent - whole.x0).norm()))
        for way, some in found.items():
            shares[way].append(sum(some) / len(some))
    assert max(shares["level"]) < 1.5 * min(shares["level"]) and max(shares["blend"]) > 3 * min(shares["blend"]), shares
    assert min(shares["level"]) > 0.4, shares
