"""LEDITS++: nothing without concepts, each where it is strongest, and diffusers' pipeline does the same."""

import numpy as np
import pytest
import torch
from PIL import Image
from proofs import edited, pipeline, turns_red
from stubs import Counting, gaussian, latent
from tiny import box

from minidiffedit import StableDiffusion, Tokenizer, levels
from minidiffedit.attention import Site
from minidiffedit.methods import ledits as L
from minidiffedit.methods.edit_friendly import edit_friendly
from minidiffedit.methods.replay import replay
from minidiffedit.methods.words import words_of
from minidiffedit.run import plan

NULL, HORSE, ZEBRA = 0.0, latent(1, 4, 6, 5, seed=5), latent(1, 4, 6, 5, seed=6)


@pytest.fixture(scope="module")
def folder(deep_folder):
    return deep_folder


def path(x0=None, **options):
    x0 = latent(2, 4, 6, 5) if x0 is None else x0
    return edit_friendly(gaussian, x0, NULL, NULL, **{"steps": 10, "strength": 0.8} | options)


def edit(up, *edits, eps=gaussian, **options):
    words = [(None, None)] * len(edits)
    return L.ledits(eps, up, edits, words, 2, NULL, **{"concept_mask": "M2"} | options)


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
        M = L.largest(d.abs().sum(dim=1, keepdim=True), quantile)
        assert M.sum(dim=(1, 2, 3)).tolist() == [cells] * 3
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


def test_each_concept_has_numbers_of_its_own():
    up, pair = path(), (HORSE, ZEBRA)
    alone = [edit(up, pair, concept_scales=one, concept_threshold=0.0) for one in ("2,7", "2, -7", " -2,7 ")]
    for y, (one, other) in zip(alone, ((2, 7), (2, -7), (-2, 7))):
        first = up.step(up[8], gaussian(up[8], up.t[8], [NULL])[0], 8)
        e = [gaussian(up[8], up.t[8], [text])[0] for text in (NULL, HORSE, ZEBRA)]
        eps = Counting()
        assert torch.equal(edit(up, pair, eps=eps, concept_scales=f"{one},{other}", concept_threshold=0.0), y)
        step = up.step(up[8], e[0] - one * (e[1] - e[0]) + other * (e[2] - e[0]), 8)
        torch.testing.assert_close(eps.calls[1][0], step)
        assert (step - first).abs().max() > 0.1
    zebra = edit(up, (NULL, ZEBRA), concept_threshold=0.5)
    torch.testing.assert_close(edit(up, pair, concept_scales="0,5", concept_thresholds="0.9,0.5"), zebra)
    eps = Counting()
    edit(up, pair, eps=eps, warm_ups="2,0", cool_downs="0,3")
    assert [len(texts) for _, _, texts in eps.calls] == [2, 2, 3, 3, 3, 2, 2, 2]
    assert eps.calls[0][2][1] is ZEBRA and eps.calls[7][2][1] is HORSE


@pytest.mark.parametrize("options", [
    {"concept_scales": "5"}, {"concept_scales": "5,6,7"}, {"concept_scales": "5,x"}, {"concept_scales": ""},
    {"concept_thresholds": "0.5,1.5"}, {"concept_scales": "nan,1"}, {"warm_ups": "1.5,2"}, {"cool_downs": "1,-2"},
], ids=str)  # fmt: skip
def test_numbers_that_do_not_fit_the_concepts_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be 2 numbers .* for 2 concepts"):
        plan("ledits++", edits=[("a horse", "a zebra"), ("", "")], **options)
    assert plan("ledits++", edits=[("a horse", "a zebra")], concept_scales="-5, 1e1")


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
    assert done.evaluations == {"encode": 9, "decode": 36} and done.trajectory.sampler == "dpmsolver++"  # the paper's
    guided = edited(sd, picture, "ledits++", edits=[("", "a zebra")], source="a horse", mask=box())
    assert guided.evaluations == {"encode": 18, "decode": 18} and guided.verdict == "given"
    with pytest.warns(UserWarning, match="nothing is taken away or added"):
        still = edited(sd, picture, "ledits++", edits=[("", "")])
    assert (still.latent - still.x0).abs().max() <= 1e-5 and still.rows == 18


def test_m1_is_where_the_words_of_the_concept_are_looked_at():
    """A model whose attention at the coarsest level looks at one position in each cell: the mask is known by hand."""
    looked = torch.tensor([[1, 1, 2, 5], [1, 3, 2, 5]])  # which of 77 positions each of 2 x 4 cells looks at
    tokens = words_of(Tokenizer(), "a red horse"), words_of(Tokenizer(), "snow")  # at positions 1 to 3, and 1
    texts, asked = (latent(1, 4, 8, 16, seed=5), latent(1, 4, 8, 16, seed=6)), []

    def eps(x, t, given, tap=None):
        rows = len(given) * len(x)
        k = torch.eye(77).expand(rows, 2, 77, 77)
        q = 1e4 * k[:, :, looked.flatten()]
        for site in (Site("down", 2, 0, "cross"), Site("up", 2, 1, "cross")):
            assert torch.equal(tap(lambda site, q, k, v: v, site, q, k, k), k)
        for place, level, kind in (("mid", 2, "cross"), ("up", 1, "cross"), ("up", 2, "self")):
            tap(lambda site, q, k, v: v, Site(place, level, 0, kind), q.flip(2), k, k)
        asked.append(len(given))
        return gaussian(x, t, given)

    up, weight = path(latent(2, 4, 8, 16)), torch.tensor([[0.21194156, 0.57611688, 0.21194156]])
    for pair, tokens_of, positions in (((texts[0], NULL), tokens, (1, 2, 3)), ((NULL, texts[1]), tokens, (1,))):
        for threshold in (0.5, 0.8):
            y = L.ledits(eps, up, [pair], [tokens_of], 2, NULL, concept_mask="M1", concept_threshold=threshold)
            at = np.pad(np.isin(looked.numpy(), positions).astype(float), 1, mode="reflect")
            bell = (weight.T @ weight).double().numpy()
            map_ = np.array([[(at[i : i + 3, j : j + 3] * bell).sum() for j in range(4)] for i in range(2)])
            M = torch.from_numpy(np.kron(map_ >= np.quantile(map_, threshold) - 1e-9, np.ones((4, 4)))) > 0
            changed = ((y - up[0]).abs() > 1e-9).any(dim=1)
            assert torch.equal(changed, M.expand(2, -1, -1)) and 0 < M.float().mean() < 1
    assert set(asked) == {2}


def test_both_masks_act_below_t_800_and_attention_alone_above():
    calls = []

    def eps(x, t, given, tap=None):
        k = torch.eye(77).expand(len(given) * len(x), 1, 77, 77)
        tap(lambda site, q, k, v: v, Site("up", 1, 0, "cross"), 9 * k[:, :, [1, 1, 1, 5, 5, 5, 5, 5, 5]], k, k)
        calls.append(x.clone())
        return gaussian(x, t, given)

    up, words = path(steps=10, strength=1.0), [(None, words_of(Tokenizer(), "snow"))]
    y = L.ledits(eps, up, [(NULL, ZEBRA)], words, 1, NULL, concept_threshold=0.7, warm_up=0)
    assert [t > L.LATE for t in up.t[10:0:-1]] == [True, True] + [False] * 8
    acted = [((a - up.step(b, gaussian(b, up.t[j], [NULL])[0], j)).abs() > 1e-9).any(dim=1).float().mean()
             for a, b, j in zip([*calls[1:], y], calls, up.down())]  # fmt: skip
    assert acted[0] == acted[1] > max(acted[2:]) > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masks, concept_mask", [((False, False), "M2"), ((True, False), "M1"), ((True, True), "both")])
def test_it_is_what_diffusers_computes(folder, tmp_path, masks, concept_mask, monkeypatch):
    """Its last 8 of int(8 x 1.15) levels are our levels(9) up to 8. Two of its faults are mended: with DDIM it adds
    noise at float timesteps, and it takes padding for words of the concept, as fast tokenizers count it.
    """
    from diffusers import DDIMScheduler, LEditsPPPipelineStableDiffusion

    class Whole(DDIMScheduler):
        def add_noise(self, x, noise, t):
            return super().add_noise(x, noise, t.long())

    peer = pipeline(LEditsPPPipelineStableDiffusion, folder, tmp_path, scheduler=Whole)
    sd, tokenized = StableDiffusion.load(folder, dtype="float32"), type(peer.tokenizer).__call__

    def counted(self, *args, **options):
        found = tokenized(self, *args, **options)
        found["length"] = found["attention_mask"].sum(dim=1)
        return found

    monkeypatch.setattr(type(peer.tokenizer), "__call__", counted)
    image, size = (
        np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8),
        {"height": 128, "width": 128},
    )
    image = Image.fromarray(image)
    peer.invert(image, num_inversion_steps=8, skip=0.15, generator=torch.Generator().manual_seed(3), **size)
    x0 = peer.encode_image(image, dtype=torch.float32, **size)[0]
    null, *texts = (sd.text([text]) for text in ("", "a brown horse", "a zebra"))
    words = [words_of(sd.tokenizer, text) for text in ("a brown horse", "a zebra")]
    up = edit_friendly(sd.eps, x0, null, null, steps=9, strength=8 / 9, seed=3)
    assert (up[8] - peer.init_latents).norm() <= 1e-5 * up[8].norm()
    for j in range(1, 9):
        assert (up.noises[j] - peer.zs[8 - j]).norm() <= 1e-4 * up.noises[j].norm()
    theirs = peer(
        editing_prompt=["a brown horse", "a zebra"], reverse_editing_direction=[True, False], edit_guidance_scale=5.0,
        edit_threshold=0.7, output_type="latent", use_cross_attn_mask=masks[0], use_intersect_mask=masks[1],
    ).images  # fmt: skip
    ours = L.ledits(sd.eps, up, [texts], [words], 2, null, concept_threshold=0.7, concept_mask=concept_mask)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm() and (ours - x0).norm() > 0.05 * x0.norm()


@pytest.mark.filterwarnings("ignore")
def test_the_second_order_solver_is_what_diffusers_computes(folder, tmp_path):
    """Its sde-dpmsolver++ on our levels, from 14 of 16 down, each concept with numbers of its own."""
    from diffusers import DPMSolverMultistepScheduler, LEditsPPPipelineStableDiffusion

    class OnOurLevels(DPMSolverMultistepScheduler):
        def set_timesteps(self, steps, device=None):
            super().set_timesteps(timesteps=list(levels(steps).t[:0:-1]), device=device)

    peer = pipeline(LEditsPPPipelineStableDiffusion, folder, tmp_path)
    own = {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"}
    peer.scheduler = OnOurLevels.from_config(dict(peer.scheduler.config) | own)
    sd, size = StableDiffusion.load(folder, dtype="float32"), {"height": 64, "width": 64}
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    peer.invert(image, num_inversion_steps=14, skip=0.15, generator=torch.Generator().manual_seed(3), **size)
    x0 = peer.encode_image(image, dtype=torch.float32, **size)[0]
    null, *texts = (sd.text([text]) for text in ("", "a brown horse", "a zebra"))
    up = edit_friendly(sd.eps, x0, null, null, steps=16, strength=14 / 16, seed=3, sampler="dpmsolver++")
    for j in range(1, 15):
        assert (up.noises[j] - peer.zs[14 - j]).norm() <= 1e-4 * up.noises[j].norm()
    theirs = peer(
        editing_prompt=["a brown horse", "a zebra"], reverse_editing_direction=[True, False], edit_warmup_steps=[2, 0],
        edit_guidance_scale=[3.0, 6.0], edit_threshold=[0.5, 0.8], edit_cooldown_steps=[14, 9],
        output_type="latent", use_cross_attn_mask=False, use_intersect_mask=False,
    ).images  # fmt: skip
    words = [words_of(sd.tokenizer, text) for text in ("a brown horse", "a zebra")]
    numbers = {"concept_scales": "3,6", "concept_thresholds": "0.5,0.8", "warm_ups": "2,0", "cool_downs": "0,5"}
    ours = L.ledits(sd.eps, up, [texts], [words], 2, null, concept_mask="M2", **numbers)
    # Fourteen steps of guidance by 3 and 6 let rounding grow: .9e-4 with torch 2.13, 1.1e-4 with 2.14.
    assert (ours - theirs).norm() <= 3e-4 * theirs.norm() and (ours - x0).norm() > 0.05 * x0.norm()
    first = edit_friendly(sd.eps, x0, null, null, steps=16, strength=14 / 16, seed=3)
    assert (L.ledits(sd.eps, first, [texts], [words], 2, null, concept_mask="M2", **numbers) - ours).norm() > 1e-3


MUTATIONS = {
    "one scale for all": ("ledits:ledits", "one.sign * one.scale", "one.sign * concept_scale",
        test_each_concept_has_numbers_of_its_own),
    "one threshold for all": ("ledits:ledits", "keepdim=True), one.threshold", "keepdim=True), concept_threshold",
        test_each_concept_has_numbers_of_its_own),
    "all is added": ("ledits:ledits", "(-1, 1)", "(1, 1)",
        test_one_concept_everywhere_is_plain_guidance),
    "one quantile for the batch": ("ledits:largest", "flatten(1), quantile, dim=1)[:, None, None, None]",
        "flatten(), quantile)", test_each_acts_on_the_cells_where_it_is_strongest),
    "the weakest cells": ("ledits:largest", "maps.float() >= least", "maps.float() <= least",
        test_each_acts_on_the_cells_where_it_is_strongest),
    "relative to the sum so far": ("ledits:ledits", "e_concept - e_null", "e_concept - e",
        test_texts_are_taken_away_and_added_in_order),
    "no mask": ("ledits:ledits", "(e_concept - e_null) * allowed", "(e_concept - e_null)",
        test_a_mask_says_where_concepts_may_act),
    "all positions": ("ledits:ledits", "1 : one.words.end", "1:",
        test_m1_is_where_the_words_of_the_concept_are_looked_at),
    "every level": ("ledits:ledits", "and site.level == coarsest", "",
        test_m1_is_where_the_words_of_the_concept_are_looked_at),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    turns_red(__name__, "L", *MUTATIONS[name], monkeypatch)
