"""SDE-Drag: patches and where they go, the way back by the chain's own noises, the picture outside; points."""

import pytest
import torch
from proofs import edited, turns_red
from stubs import ALPHA_BAR, Counting, gaussian, latent
from tiny import box

from minidiffedit import levels, noises
from minidiffedit import run as R
from minidiffedit.methods import sde_drag as D
from minidiffedit.methods.edit_friendly import visited

POINTS = [((2, 1), (3, 3))]
OPTIONS = {"steps": 10, "moves": 1, "radius": 1, "seed": 3}


def dragged(eps=gaussian, points=POINTS, x0=None, mask=None, **options):
    x0 = latent(2, 4, 6, 5) if x0 is None else x0
    return D.sde_drag(eps, x0, points, 0.0, 0.3, mask, **OPTIONS | options)


def drawn(count):
    return torch.stack([noises((4, 6, 5), count, 3 + i) for i in range(2)], dim=1).double()


def test_a_patch_goes_to_its_place_and_leaves_noise():
    x, noise = torch.arange(60.0).view(1, 1, 6, 10), torch.full((1, 1, 6, 10), 1000.0)
    y = D.copied(x, [((2, 2), (3, 6))], noise, radius=2, boost=2.0, keep=0.6)
    expected = x.clone()
    expected[..., 0:4, 0:4] = 0.6 * x[..., 0:4, 0:4] + 0.8 * 1000
    expected[..., 1:5, 4:8] = 2 * x[..., 0:4, 0:4]
    torch.testing.assert_close(y, expected)
    over = D.copied(x, [((2, 2), (2, 3))], noise, radius=2, boost=1.0, keep=0.6)  # over itself: the copy wins
    assert torch.equal(over[..., 0:4, 1:5], x[..., 0:4, 0:4]) and (over[..., 0:4, 0] > 799).all()
    corner = D.copied(x, [((0, 9), (5, 1))], noise, radius=2, boost=1.0, keep=1.0)  # nothing above one, below the other
    changed = (corner != x).nonzero()[:, 2:]
    assert torch.equal(corner[0, 0, 5, 0:2], x[0, 0, 0, 8:10]) and set(map(tuple, changed.tolist())) == {(5, 0), (5, 1)}
    assert torch.equal(D.copied(x, [((2, 2), (2, 2))], noise, 2, 2.0, 0.6), x)
    assert torch.equal(x.flatten(), torch.arange(60.0))  # left as it was


def test_the_way_is_cut_into_equal_moves():
    assert [D.along((10, 4), (0, 5), i / 5) for i in range(6)] == [(10, 4), (8, 4), (6, 4), (4, 4), (2, 4), (0, 5)]


def test_the_way_back_adds_the_noises_that_lead_the_chain_back():
    """Written with the noises themselves, unguided, for one move."""
    x, t = latent(2, 4, 6, 5), levels(10).t
    chain, noise = [x], drawn(7)
    for j in range(1, 7):
        kept = float(ALPHA_BAR[t[j]] / ALPHA_BAR[t[j - 1]])
        chain.append(kept**0.5 * chain[-1] + (1 - kept) ** 0.5 * noise[j - 1])
    up = visited(gaussian, chain, 0.0, 0.3, steps=10)
    y = D.copied(chain[6], POINTS, noise[6], 1, 1.1, 0.3)
    for j in range(6, 0, -1):
        y = up.step(y, gaussian(y, t[j], [0.3])[0], j)
    torch.testing.assert_close(dragged(guidance_scale=1.0), y, rtol=1e-4, atol=1e-5)
    assert (y - x).abs().max() > 0.5


def test_guidance_falls_to_one():
    """With a predictor of constants only guidance tells the levels apart: e cancels between chain and result."""
    asked = []

    def eps(x, t, texts):
        asked.append(t)
        return [torch.zeros_like(x), x]

    dragged(eps, guidance_scale=3.0)
    assert asked == [levels(10).t[j] for j in range(6, 0, -1)]
    x, a, noise = latent(2, 4, 6, 5), levels(10).a, drawn(7)
    chain = [x]
    for j in range(1, 7):
        chain.append((a[j] / a[j - 1]) ** 0.5 * chain[-1] + (1 - a[j] / a[j - 1]) ** 0.5 * noise[j - 1])
    y = D.copied(chain[6], POINTS, noise[6], 1, 1.1, 0.3)
    for j in range(6, 0, -1):  # e = w x, so that a step multiplies what differs from the chain
        w, sigma2 = 1 + 2 * j / 6, (1 - a[j - 1]) / (1 - a[j]) * (1 - a[j] / a[j - 1])
        gain = (a[j - 1] / a[j]) ** 0.5 * (1 - (1 - a[j]) ** 0.5 * w) + (1 - a[j - 1] - sigma2) ** 0.5 * w
        y = chain[j - 1] + gain * (y - chain[j])
    torch.testing.assert_close(dragged(eps, guidance_scale=3.0), y)


def test_what_is_not_dragged_stays():
    eps, x0 = Counting(), latent(2, 4, 6, 5)
    assert torch.equal(dragged(eps, points=[((2, 1), (2, 1))]), x0) and eps.rows == 0
    assert torch.equal(dragged(mask=torch.zeros(1, 1, 6, 5)), x0)
    mask = torch.ones(1, 1, 6, 5)
    mask[..., 4] = 0
    y = dragged(mask=mask, moves=2)
    assert torch.equal(y[..., 4], x0[..., 4]) and (y != x0)[..., 3].any()
    alone = dragged()  # a predictor that sees one cell at a time changes the patches' cells alone
    assert ((alone - x0).abs() > 1e-9).any(dim=1)[0].nonzero().tolist() == [
        [r, c] for r in (1, 2, 3) for c in range(4) if (r < 3 and c < 2) or (r > 1 and c > 1)
    ]


def test_rows_and_texts():
    eps = Counting()
    dragged(eps, moves=3)
    assert eps.rows == 3 * 6 * 2 * 2 * 2 and all(texts == [0.0, 0.3] for _, _, texts in eps.calls)


def test_at_no_noise_nothing_is_copied():
    eps = Counting()
    assert torch.equal(dragged(eps, strength=0.0), latent(2, 4, 6, 5)) and eps.rows == 0


def test_two_pictures_are_each_alone():
    together, alone = dragged(), dragged(x0=latent(2, 4, 6, 5)[1:], seed=4)
    assert torch.equal(together[1], alone[0])


# ---------------------------------------------------------------- points


def test_points_are_places_in_pixels(sd, picture):
    """The picture of 93 x 75 pixels is worked on at 80 x 64, 10 x 8 cells."""
    seen = []
    for given in ("10,20=>92.5,74; 0,0=>50,9", [((10, 20), (92.5, 74)), ([0, 0], [50, 9])]):
        settled = R.plan("sde-drag", points=given, seed=0)
        assert settled.given["points"] == "10,20=>92.5,74; 0,0=>50,9" == settled.record["points"]
        seen.append(R.begin(settled, sd, picture).input("points")[0])
    assert seen[0] == seen[1] == [((2, 1), (7, 9)), ((0, 0), (0, 5))]
    for method, given in (("sde-drag", "1,1=>2,2"), ("drag-diffusion", "1,1=>1,1")):
        with pytest.warns(UserWarning, match="nothing to edit: no point goes to another cell of 8 pixels"):
            done = R.edit(sd, picture, method, points=given, seed=0, steps=10, mask=box())
        assert done.rows == 0 and done.image.tobytes() == picture.tobytes()
    with pytest.raises(ValueError, match="points must lie in the picture of 93 x 75 pixels, got '93,0=>1,1'"):
        R.execute(R.plan("sde-drag", points="93,0=>1,1"), sd, picture)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "1,2",
        "1,2=>3",
        "1,2=>3,4=>5,6",
        "a,b=>c,d",
        "1,2=>3,nan",
        "-1,2=>3,4",
        5,
        [],
        [(1, 2)],
        [[(1, 2), (3, 10**400)]],
    ],
)
def test_what_is_no_place(given):
    with pytest.raises(ValueError, match="points must be places"):
        R.plan("sde-drag", points=given)


def test_on_a_picture(sd, picture):
    done = edited(sd, picture, "sde-drag", points="30,30=>60,40", source="a horse", moves=2, radius=2)
    assert done.evaluations == {"decode": 2 * 6 * 4} and not torch.equal(done.latent, done.x0)
    masked = edited(sd, picture, "sde-drag", points="30,30=>60,40", mask=box(), moves=1)
    outside = (masked.latent_mask == 0).expand_as(masked.x0)
    assert torch.equal(masked.latent[outside], masked.x0[outside]) and masked.verdict == "given"


MUTATIONS = {
    "the chain's noises are not added": ("sde_drag:sde_drag", "chain[j - 1] + M * (mean_y - mean_x)",
        "M * mean_y + (1 - M) * chain[j - 1]", test_the_way_back_adds_the_noises_that_lead_the_chain_back),
    "patches without noise": ("sde_drag:sde_drag", "moves if K and any", "moves if any",
        test_at_no_noise_nothing_is_copied),
    "guidance rises": ("sde_drag:sde_drag", "(guidance_scale - 1) * j / K",
        "(guidance_scale - 1) * (K - j) / K", test_guidance_falls_to_one),
    "the copy first": ("sde_drag:copied",
        "x[here] = keep * patch + math.sqrt(1 - keep**2) * noise[here]\n"
        "            x[there] = boost * patch",
        "x[there] = boost * patch\n            x[here] = keep * patch + math.sqrt(1 - keep**2) * noise[here]",
        test_a_patch_goes_to_its_place_and_leaves_noise),
    "columns for rows": ("sde_drag:along", "goal[1] - start[1]", "goal[0] - start[0]",
        test_the_way_is_cut_into_equal_moves),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    turns_red(__name__, "D", *MUTATIONS[name], monkeypatch)
