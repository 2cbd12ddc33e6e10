"""Inversions without gradients, and replay: closed forms, their papers' exact limits, and as rows of the table."""

import math

import pytest
import torch
from proofs import TEXTS, edited, turns_red
from stubs import Counting, constant, gaussian, latent
from tiny import box

from minidiffedit import levels
from minidiffedit import run as R
from minidiffedit.cost import cost
from minidiffedit.methods import inversions as V
from minidiffedit.methods.replay import replay
from minidiffedit.methods.table import INVERSIONS, SYSTEMS


@pytest.mark.parametrize("g", [-2.0, 1.0, 7.5, 30.0])
def test_after_negative_prompt_inversion_guidance_under_the_source_text_does_nothing(g):
    x0 = latent(2, 4, 6, 5)
    up = V.negative_prompt(gaussian, x0, 0.3, steps=10)
    plain = replay(gaussian, V.ddim(gaussian, x0, 0.0, 0.3, steps=10), 0.3, guidance_scale=1.0)
    torch.testing.assert_close(replay(gaussian, up, 0.3, guidance_scale=g), plain, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(up[j], V.ddim(gaussian, x0, 0.0, 0.3, steps=10)[j]) for j in up)
    away = replay(gaussian, up, 0.8, guidance_scale=g) - plain
    assert (away.mean() - 0.5 * g) * math.copysign(1, g) < 0 < away.mean() * math.copysign(1, g)


def test_the_papers_convention_asks_at_the_level_left():
    eps, x0 = Counting(), latent(2, 4, 6, 5)
    up = V.ddim_paper(eps, x0, 0.0, 0.3, steps=10, strength=0.8)
    assert [t for _, t, _ in eps.calls] == list(levels(10).t[:8]) and eps.rows == 16 and len(up) == 9
    assert all(torch.equal(x, up[j]) for j, (x, _, _) in enumerate(eps.calls)) and torch.equal(up[0], x0)
    null = Counting()
    V.ddim_paper(null, x0, 0.0, 0.3, steps=10, encode_text="null")
    assert null.calls[0][2] == [0.0] and eps.calls[0][2] == [0.3]


def test_both_conventions_come_back_and_near_one_another_with_more_steps():
    """Exactly where eps does not depend on x; else with an error that falls like one over the steps."""
    x0 = latent(1, 4, 6, 5)
    for invert in (V.ddim, V.ddim_paper):
        noise = constant(latent(1, 4, 6, 5, seed=1))
        y = replay(noise, invert(noise, x0, 0.0, 0.3, steps=10), 0.3)
        torch.testing.assert_close(y, x0, rtol=1e-12, atol=1e-12)
        errors = []
        for steps in (50, 100, 200):
            up = invert(gaussian, x0, 0.0, 0.3, steps=steps, strength=0.8)
            errors.append(float((replay(gaussian, up, 0.3, guidance_scale=1.0) - x0).norm() / x0.norm()))
        assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[1] and errors[0] < 0.5
    tops = [[invert(gaussian, x0, 0.0, 0.3, steps=n)[n] for invert in (V.ddim, V.ddim_paper)] for n in (20, 200)]
    assert (tops[1][0] - tops[1][1]).norm() < 0.2 * (tops[0][0] - tops[0][1]).norm()


def test_acceleration_finds_the_fixed_point_of_a_linear_step_in_two_calls():
    """Where each picture's step is one line, a secant meets it: the way back is exact, and by going on alone is not."""
    x0, eps = latent(2, 4, 6, 5), Counting()
    errors = {}
    for n in (1, 2, 3, 4):
        up = V.aidi(eps if n == 3 else gaussian, x0, 0.0, 0.3, steps=20, strength=0.8, iterations=n)
        refined = V.ddim(gaussian, x0, 0.0, 0.3, steps=20, strength=0.8, refine=n)
        errors[n] = [float((replay(gaussian, one, 0.3, guidance_scale=1.0) - x0).norm()) for one in (up, refined)]
    assert errors[1][0] == pytest.approx(errors[1][1])
    assert errors[2][0] < 1e-8 < 1e-2 < errors[2][1] and errors[3][0] < 1e-8 and errors[4][0] < 1e-8
    assert eps.rows == 2 * 16 * 3 and [t for _, t, _ in eps.calls[:4]] == [1, 1, 1, 51]


@pytest.mark.parametrize("method, given, evaluations", [
    ("aidi+replay", TEXTS, {"encode": 50, "decode": 20}),
    ("negative-prompt-inversion", TEXTS, {"encode": 10, "decode": 40}),
    ("direct-inversion", {"target": "a zebra"}, {"encode": 8, "decode": 16}),
    ("ddim-paper+replay", TEXTS, {"encode": 10, "decode": 20}),
    ("ddim-paper+diffedit", TEXTS | {"strength": 0.8}, {"mask": 20, "encode": 8, "decode": 16}),
    ("negative-prompt+masactrl", TEXTS | {"guidance": "prox"}, {"encode": 10, "decode": 40}),
], ids=lambda case: case if isinstance(case, str) else "")  # fmt: skip
def test_as_rows(sd, picture, method, given, evaluations):
    assert edited(sd, picture, method, **given).evaluations == evaluations


def test_on_a_network_negative_prompt_inversion_returns_the_reconstruction(sd, picture):
    same = {"source": "a horse", "target": "a horse"}
    plain = edited(sd, picture, "replay", **same, guidance_scale=1.0)
    far = edited(sd, picture, "negative-prompt-inversion", **same, guidance_scale=20.0)
    assert (far.latent - plain.latent).norm() <= 2e-5 * plain.latent.norm()


def test_our_reading_of_direct_inversion_is_the_arm_without_a_mask(sd, picture):
    one, other = (edited(sd, picture, method, target="a zebra") for method in ("direct-inversion", "encode-only"))
    assert (one.latent - other.latent).norm() <= 1e-5 * other.latent.norm()


EDITORS = [name for name, row in SYSTEMS.items() if row.inversion and row.edit and row.weights == "base"]
GIVEN = TEXTS | {
    "mask": box(),
    "reference": box().convert("RGB"),
    "edits": [("a horse", "a zebra")],
    "points": "9,9=>40,30",
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inversion", INVERSIONS)
def test_any_inversion_feeds_any_editor(sd, picture, inversion):
    seen = set()
    for editor in EDITORS:
        blank = R.blank_plan(editor, inversion)
        few = {"steps": 4, "strength": 0.75, "maps": 1, "inner_steps": 1, "iterations": 2, "text_steps": 1, "nudges": 1}
        given = {name: GIVEN[name] for name in {*blank.needs, "target"} & blank.given.keys()}
        options = {name: value for name, value in few.items() if name in blank.options}
        plan = R.plan(editor, inversion=inversion, seed=0, **given, **options)
        if tuple(plan.functions.values()) not in seen:
            seen.add(tuple(plan.functions.values()))
            done, predicted = R.execute(plan, sd, picture), cost(plan)
            assert torch.isfinite(done.latent).all() and done.verdict != "strength 0", editor
            empty = done.latent_mask is not None and not done.latent_mask.any()
            early = inversion == "dpl" and done.rows <= sum(predicted.values())  # its nouns were found
            assert done.evaluations == predicted or empty or early, editor
    assert len(seen) > 5


MUTATIONS = {
    "the last value alone": ("inversions:aidi", "reached - share *", "reached - 0 * share *",
        test_acceleration_finds_the_fixed_point_of_a_linear_step_in_two_calls),
    "one share for the batch": ("inversions:aidi", "(missed * change).sum((1, 2, 3), keepdim=True)",
        "(missed * change).sum()", test_acceleration_finds_the_fixed_point_of_a_linear_step_in_two_calls),
    "the null text stays": ("inversions:negative_prompt", ".values()], steps, source)", ".values()], steps, 0.0)",
        test_after_negative_prompt_inversion_guidance_under_the_source_text_does_nothing),
    "asked at the level reached": ("inversions:ddim_paper", "eps(x[j], t[j], [text])", "eps(x[j], t[j + 1], [text])",
        test_the_papers_convention_asks_at_the_level_left),
    "moved by a level less": ("inversions:ddim_paper", "a[j], a[j + 1]))", "a[j], a[j]))",
        test_both_conventions_come_back_and_near_one_another_with_more_steps),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    turns_red(__name__, "V", *MUTATIONS[name], monkeypatch)


EDITORS = sorted(
    {s.edit: name for name, s in SYSTEMS.items() if s.inversion and s.edit and s.weights == "base"}.values()
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("editor", EDITORS)
def test_an_editor_walks_by_what_the_inversion_made(editor, sd):
    """Noises and null texts of a path count: with them the result is another than after plain DDIM."""
    picture, mask = box(), torch.ones(1, 1, 8, 10)
    texts = TEXTS | {"edits": [["a horse", "a zebra"]], "reference": box(), "points": "9,9=>40,30"}

    def latent_after(inversion):
        plan = R.blank_plan(f"{inversion}+{editor}")
        given = {name: value for name, value in texts.items() if name in plan.given}
        given |= {"mask": mask} if "mask" in plan.needs else {}
        few = {"steps": 3, "strength": 1.0, "seed": 0} | ({"maps": 1} if "maps" in plan.options else {})
        return R.edit(sd, picture, plan.method, **given, **few).latent

    base = latent_after("ddim")
    if editor != "reconstruction":  # which has no null text
        assert not torch.equal(latent_after("negative-prompt"), base)
    assert (latent_after("edit-friendly") - base).abs().max() > 1e-3
