"""LEDITS++: nothing without concepts, each where it is strongest, and diffusers' pipeline does the same."""

import numpy as np
import pytest
import torch
from PIL import Image
from proofs import edited, pipeline, turns_red
from stubs import Counting, gaussian, latent
from tiny import box

from minidiffedit import StableDiffusion
from minidiffedit.methods import ledits as L
from minidiffedit.methods.edit_friendly import edit_friendly
from minidiffedit.methods.replay import replay

NULL, HORSE, ZEBRA = 0.0, latent(1, 4, 6, 5, seed=5), latent(1, 4, 6, 5, seed=6)


def path(x0=None, **options):
    x0 = latent(2, 4, 6, 5) if x0 is None else x0
    return edit_friendly(gaussian, x0, NULL, NULL, **{"steps": 10, "strength": 0.8} | options)


def edit(up, *edits, eps=gaussian, **options):
    return L.ledits(eps, up, edits, NULL, **options)


def test_without_concepts_the_picture_comes_back():
    up, eps = path(), Counting()
    for edits, options in (((), {}), (((NULL, NULL),), {}), (((HORSE, ZEBRA),), {"warm_up": 8}),
                           (((HORSE, ZEBRA),), {"cool_down": 8}), (((HORSE, ZEBRA),), {"concept_scale": 0.0}),
                           (((HORSE, ZEBRA),), {"mask": torch.zeros(1, 1, 6, 5)})):  # fmt: skip
        torch.testing.assert_close(edit(up, *edits, **options), latent(2, 4, 6, 5), rtol=1e-10, atol=1e-10)
    edit(up, eps=eps)
    assert eps.rows == 2 * 8 and all(texts == [NULL] for _, _, texts in eps.calls)


def test_one_concept_everywhere_is_plain_guidance():
    up = path()
    for pair, scale in (((NULL, ZEBRA), 5.0), ((ZEBRA, NULL), -5.0)):
        ours = edit(up, pair, concept_threshold=0.0)
        torch.testing.assert_close(ours, replay(gaussian, up, ZEBRA, guidance_scale=scale))


def test_texts_are_taken_away_and_added_in_order():
    eps, up = Counting(), path()
    e = [eps.eps(up[8], up.t[8], [text])[0] for text in (NULL, HORSE, ZEBRA)]
    edit(up, (HORSE, NULL), (NULL, ZEBRA), eps=eps, concept_threshold=0.0)
    assert [len(texts) for _, _, texts in eps.calls] == [3] * 8 and eps.rows == 3 * 2 * 8
    assert eps.calls[0][2][1] is HORSE and eps.calls[0][2][2] is ZEBRA
    torch.testing.assert_close(eps.calls[1][0], up.step(up[8], e[0] - 5 * (e[1] - e[0]) + 5 * (e[2] - e[0]), 8))
    together = edit(up, (HORSE, ZEBRA))
    torch.testing.assert_close(edit(up, (HORSE, NULL), (NULL, ZEBRA)), together)


def test_each_acts_on_the_cells_where_it_is_strongest():
    d = latent(3, 4, 6, 5) * torch.tensor([1.0, 50.0, 0.1]).double()[:, None, None, None]
    for quantile, cells in ((0.0, 30), (0.5, 15), (0.9, 3), (1.0, 1)):
        M = L.strongest(d, quantile)
        assert M.shape == (3, 1, 6, 5) and M.sum(dim=(1, 2, 3)).tolist() == [cells] * 3
        for i in range(3):
            size = d[i].abs().sum(dim=0)
            assert size[M[i, 0] == 1].min() >= size[M[i, 0] == 0].max() if cells < 30 else True
    up = path()
    changed = [
        (edit(up, (HORSE, ZEBRA), concept_threshold=q) != edit(up)).any(dim=1).float().mean() for q in (0.9, 0.5)
    ]
    assert 0 < changed[0] < changed[1] <= 1


def test_warm_up_and_cool_down_are_steps_without_concepts():
    eps = Counting()
    edit(path(), (NULL, ZEBRA), eps=eps, warm_up=2, cool_down=3)
    assert [len(texts) for _, _, texts in eps.calls] == [1, 1, 2, 2, 2, 1, 1, 1]


def test_a_mask_says_where_concepts_may_act():
    mask = torch.zeros(1, 1, 6, 5)
    mask[..., :2] = 1
    y = edit(path(), (HORSE, ZEBRA), mask=mask, concept_threshold=0.5) - latent(2, 4, 6, 5)
    assert y[..., 2:].abs().max() < 1e-10 and y[..., :2].abs().max() > 0.1


def test_two_pictures_are_each_alone():
    together = edit(path(), (HORSE, ZEBRA), concept_threshold=0.5)
    alone = edit(path(latent(2, 4, 6, 5)[1:], seed=1), (HORSE, ZEBRA), concept_threshold=0.5)
    assert torch.equal(together[1], alone[0])


def test_on_a_picture(sd, picture):
    done = edited(sd, picture, "ledits++", edits=[("a horse", "a zebra"), ("", "snow")])
    assert done.evaluations == {"encode": 9, "decode": 36}
    guided = edited(sd, picture, "ledits++", edits=[("", "a zebra")], source="a horse", mask=box())
    assert guided.evaluations == {"encode": 18, "decode": 18} and guided.verdict == "given"
    still = edited(sd, picture, "ledits++", edits=[("", "")])
    assert (still.latent - still.x0).abs().max() <= 1e-5 and still.rows == 18


@pytest.mark.filterwarnings("ignore")
def test_it_is_what_diffusers_computes(folder, tmp_path):
    """Its last 8 of int(8 x 1.15) levels are our levels(9) up to 8; with DDIM it adds noise at float timesteps."""
    from diffusers import DDIMScheduler, LEditsPPPipelineStableDiffusion

    class Whole(DDIMScheduler):
        def add_noise(self, x, noise, t):
            return super().add_noise(x, noise, t.long())

    peer = pipeline(LEditsPPPipelineStableDiffusion, folder, tmp_path, scheduler=Whole)
    sd = StableDiffusion.load(folder, dtype="float32")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    peer.invert(
        image, num_inversion_steps=8, skip=0.15, generator=torch.Generator().manual_seed(3), height=64, width=64
    )
    x0 = peer.encode_image(image, dtype=torch.float32, height=64, width=64)[0]
    null, horse, zebra = (sd.text([text]) for text in ("", "a horse", "a zebra"))
    up = edit_friendly(sd.eps, x0, null, null, steps=9, strength=8 / 9, seed=3)
    assert (up[8] - peer.init_latents).norm() <= 1e-5 * up[8].norm()
    for j in range(1, 9):
        assert (up.noises[j] - peer.zs[8 - j]).norm() <= 1e-3 * up.noises[j].norm()
    theirs = peer(
        editing_prompt=["a horse", "a zebra"], reverse_editing_direction=[True, False], edit_guidance_scale=5.0,
        edit_threshold=0.8, output_type="latent", use_cross_attn_mask=False, use_intersect_mask=False,
    ).images  # fmt: skip
    ours = L.ledits(sd.eps, up, [(horse, zebra)], null, concept_threshold=0.8)
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm() and (ours - x0).norm() > 0.05 * x0.norm()


MUTATIONS = {
    "all is added": ("ledits:ledits", "zip(pair, (-1, 1))", "zip(pair, (1, 1))",
        test_one_concept_everywhere_is_plain_guidance),
    "one quantile for the batch": ("ledits:strongest", "size.flatten(1), quantile, dim=1)[:, None, None, None]",
        "size.flatten(), quantile)", test_each_acts_on_the_cells_where_it_is_strongest),
    "the weakest cells": ("ledits:strongest", "size >= least", "size <= least",
        test_each_acts_on_the_cells_where_it_is_strongest),
    "relative to the sum so far": ("ledits:ledits", "e_concept - e_null", "e_concept - e",
        test_texts_are_taken_away_and_added_in_order),
    "no mask": ("ledits:ledits", "(e_concept - e_null) * allowed", "(e_concept - e_null)",
        test_a_mask_says_where_concepts_may_act),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    turns_red(__name__, "L", *MUTATIONS[name], monkeypatch)
