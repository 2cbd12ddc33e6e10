"""DPM-Solver++(2M): diffusers' scheduler step by step, second order, and every exact invariant of what it samples."""

import json
import math
import sys

import pytest
import torch
from commands import ran
from mutants import mutant
from proofs import TEXTS, edited
from stubs import ALPHA_BAR, Counting, constant, gaussian, latent
from tiny import box

from minidiffedit import levels, noises
from minidiffedit import path as Q
from minidiffedit.files.metadata import describe_result
from minidiffedit.files.states import packed, unpacked
from minidiffedit.methods.cycle_diffusion import cycle
from minidiffedit.methods.diffedit import decode
from minidiffedit.methods.edit_friendly import edit_friendly
from minidiffedit.methods.inversions import ddim
from minidiffedit.methods.ledits import ledits
from minidiffedit.methods.replay import replay
from minidiffedit.methods.sde_diffedit import cycle_sde
from minidiffedit.methods.sdedit import sdedit
from minidiffedit.methods.text_to_image import text_to_image

SECOND = {"sampler": "dpmsolver++"}


def scheduler(steps, kind="dpmsolver++"):
    from diffusers import DPMSolverMultistepScheduler

    made = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", final_sigmas_type="sigma_min",
        algorithm_type=kind,
    )  # fmt: skip
    made.set_timesteps(timesteps=list(levels(steps).t[:0:-1]))  # our levels, from the top
    return made


@pytest.mark.parametrize("steps", [1, 2, 10, 14, 15, 50])
def test_generating_is_diffusers_scheduler_step_by_step(sd, steps):
    null, text, g = *(sd.text([one]) for one in ("", "a zebra")), 3.0
    x_T, peer, seen = noises((4, 8, 8), 1, 0), scheduler(steps), []

    def eps(x, t, texts):
        seen.append(x)
        return sd.eps(x, t, texts)

    y = text_to_image(eps, x_T, text, null, steps=steps, guidance_scale=g, **SECOND)
    x = x_T
    for ours, t in zip([*seen[1:], y], peer.timesteps):
        e_null, e_text = sd.eps(x, int(t), [null, text])
        x = peer.step(e_null + g * (e_text - e_null), t, x).prev_sample
        assert (ours - x).norm() <= 1e-5 * x.norm()
    plain = text_to_image(sd.eps, x_T, text, null, steps=steps, guidance_scale=g)
    assert torch.equal(y, plain) if steps <= 2 else (y - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("steps", [10, 20])
def test_with_noises_it_is_diffusers_stochastic_form(steps):
    x, peer = latent(2, 4, 6, 5, dtype=torch.float32), scheduler(steps, "sde-dpmsolver++")
    zs = {j: latent(2, 4, 6, 5, seed=j, dtype=torch.float32) for j in range(1, steps + 1)}
    path = Q.Path([x] * (steps + 1), steps, noises=zs, **SECOND)
    y, step, other = x, path.walk(), path.walk()  # two walks at once know nothing of one another
    for j, t in zip(path.down(), peer.timesteps):
        x = peer.step(gaussian(x, int(t), [0.3])[0], t, x, variance_noise=zs[j]).prev_sample
        other(-y, y, j)
        y = step(y, gaussian(y, path.t[j], [0.3])[0], j)
        assert (y - x).norm() <= 1e-5 * x.norm()


def test_its_error_falls_faster_than_with_the_steps():
    """Against the exact way through the probability flow of N(.3, .7^2): x keeps its deviations from the mean."""
    x_T, errors = latent(1, 4, 6, 5), {"ddim": [], "dpmsolver++": []}
    for steps in (40, 80, 160):
        top, low = (float(ALPHA_BAR[t]) for t in (levels(steps).t[-1], 0))
        spread = [math.sqrt(a * 0.7**2 + 1 - a) for a in (low, top)]
        exact = low**0.5 * 0.3 + spread[0] / spread[1] * (x_T - top**0.5 * 0.3)
        for sampler, found in errors.items():
            y = text_to_image(gaussian, x_T, 0.3, steps=steps, guidance_scale=1, sampler=sampler)
            found.append(float((y - exact).norm() / exact.norm()))
    first, second = errors.values()
    for coarse, fine in ((0, 1), (1, 2)):  # not the full square, as the last step is far longer in lambda than others
        assert first[fine] > first[coarse] / 2.2 and second[fine] < second[coarse] / 2.8
    assert second[0] < first[0] and second[2] < first[2] / 3


def test_a_prediction_that_does_not_change_needs_no_second_order():
    noise = constant(latent(1, 4, 6, 5, seed=1))
    both = [text_to_image(noise, latent(1, 4, 6, 5), 0.3, 0.0, steps=10, sampler=s) for s in ("ddim", "dpmsolver++")]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("invert", [edit_friendly, cycle, cycle_sde])
def test_noises_made_for_it_return_the_picture(invert):
    x0 = latent(2, 4, 6, 5)
    up = invert(gaussian, x0, 0.0, 0.3, steps=20, strength=0.8, seed=3, **SECOND)
    scale = {"edit_friendly": 3.5, "cycle": 1.0, "cycle_sde": 7.5}[invert.__name__]
    same = {"guidance_scale": scale}
    torch.testing.assert_close(replay(gaussian, up, 0.3, **same), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(replay(gaussian, up.by("ddim"), 0.3, **same, **SECOND), x0, rtol=1e-9, atol=1e-9)
    walked = Q.Path([*up.values()], 20, 0.0, noises=up.noises, eta=up.eta)  # they hold for this sampler alone
    assert (replay(gaussian, walked, 0.3, **same) - x0).norm() > 1e-3 * x0.norm()
    alone = invert(gaussian, x0[1:], 0.0, 0.3, steps=20, strength=0.8, seed=4, **SECOND)
    assert torch.equal(replay(gaussian, alone, 0.8), replay(gaussian, up, 0.8)[1:])
    assert torch.equal(replay(gaussian, up, 0.8), replay(gaussian, up, 0.8))  # a second walk begins anew


def test_ledits_without_concepts_returns_the_picture():
    up = edit_friendly(gaussian, latent(2, 4, 6, 5), 0.0, 0.0, steps=20, strength=0.8, **SECOND)
    torch.testing.assert_close(
        ledits(gaussian, up, [], [], 2, 0.0, concept_mask="M2"), latent(2, 4, 6, 5), rtol=1e-9, atol=1e-9
    )


def test_under_a_mask_the_outside_is_held_and_all_inside_is_a_plain_run():
    x0 = latent(2, 4, 6, 5)
    up, M, inside = (
        ddim(gaussian, x0, 0.0, 0.3, steps=20, strength=0.8),
        torch.zeros(1, 1, 6, 5),
        torch.ones(1, 1, 6, 5),
    )
    M[..., :2] = 1
    eps = Counting()
    y = decode(eps, M, up, 0.0, 0.8, 0.0, **SECOND)
    assert torch.equal(y[..., 2:], x0[..., 2:]) and eps.rows == 2 * 2 * 16
    assert all(torch.equal(x[..., 2:], up[15 - i][..., 2:]) for i, (x, _, _) in enumerate(eps.calls[1:]))
    assert torch.equal(decode(gaussian, 0 * M, up, 0.0, 0.8, 0.0, **SECOND), x0)
    plain = replay(gaussian, up, 0.8, **SECOND)
    assert torch.equal(decode(gaussian, inside, up, 0.0, 0.8, 0.0, **SECOND), plain)
    assert not torch.equal(plain, replay(gaussian, up, 0.8))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sdedit_in_both_forms(eta):
    x0, M = latent(2, 4, 6, 5), torch.zeros(1, 1, 6, 5)
    M[..., :2] = 1
    options = {"steps": 20, "eta": eta} | SECOND
    y = sdedit(gaussian, x0, 0.8, 0.0, **options)
    torch.testing.assert_close(sdedit(gaussian, x0, 0.8, 0.0, form="ve", **options), y, rtol=1e-9, atol=1e-9)
    assert (y - sdedit(gaussian, x0, 0.8, 0.0, steps=20, eta=eta)).norm() > 1e-3 * y.norm()
    held = sdedit(gaussian, x0, 0.8, 0.0, M, **options)
    assert torch.equal(held[..., 2:], x0[..., 2:]) and torch.equal(sdedit(gaussian, x0, 0.8, 0.0, 0 * M, **options), x0)
    if eta == 0:
        top = levels(20).a[10] ** 0.5 * x0 + (1 - levels(20).a[10]) ** 0.5 * torch.cat(
            [noises((4, 6, 5), 1, i) for i in range(2)]
        )
        torch.testing.assert_close(y, replay(gaussian, Q.Path([x0] * 10 + [top], 20, 0.0), 0.8, **SECOND))


@pytest.mark.parametrize("method, given", [
    ("replay", TEXTS), ("diffedit", TEXTS), ("sdedit", {"target": "a zebra", "mask": box()}),
    ("ledits++", {"edits": [("a horse", "a zebra")]}), ("cycle-diffusion", TEXTS), ("sde-diffedit", TEXTS),
    ("edit-friendly+masactrl", TEXTS),
], ids=lambda case: case if isinstance(case, str) else "")  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_as_rows_and_in_what_a_picture_says(sd, picture, method, given):
    done, plain = (edited(sd, picture, method, **given, sampler=s, strength=0.8) for s in ("dpmsolver++", "ddim"))
    assert done.rows == plain.rows and not torch.equal(done.latent, plain.latent)
    for one, named in ((done, {"DPM++ 2M", "DPM++ 2M SDE"}), (plain, {"DDIM", "DDPM"})):
        said = describe_result(one)
        assert said["parameters"].partition("Sampler: ")[2].partition(",")[0] in named
        assert json.loads(said["minidiffedit"])["sampler"] == one.settings["sampler"]


def test_a_sheet_of_it(folder, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    words = ["in.png", "--method", "edit-friendly+replay", "--target", "a zebra", "--seed", 3, "--model", folder]
    words += ["--sampler", "dpmsolver++", "--rows", "steps=3,4", "--columns", "strength=0.5,1"]
    said = ran(capsys, "sheet", *words, "-o", "s.png")
    assert said["rows"]["paid"] == said["rows"]["predicted"] > 0 and (tmp_path / "s.png").exists()


def test_a_saved_path_is_walked_as_before():
    up, tensors = edit_friendly(gaussian, latent(1, 4, 6, 5), torch.zeros(1), torch.zeros(1), steps=20, **SECOND), {}
    again = unpacked(packed(up, "path", tensors), Q.Path, tensors.__getitem__)
    for one in (again, up.prefix(12)):
        assert one.sampler == "dpmsolver++" and one.noises.keys() == up.noises.keys() and one.pinned
    assert torch.equal(replay(gaussian, again, 0.8), replay(gaussian, up, 0.8))


MUTATIONS = {
    "the weight of the change": ("2 * (here - above)", "(here - above)",
        test_with_noises_it_is_diffusers_stochastic_form, {"steps": 20}),
    "of few steps the last is of second order too": ("(steps < 15 and a_to == alpha_bar()[0])", "False",
        test_with_noises_it_is_diffusers_stochastic_form, {"steps": 10}),
    "of many the last is not": ("steps < 15", "steps > 15",
        test_with_noises_it_is_diffusers_stochastic_form, {"steps": 20}),
    "a walk of first order": ("improve(x, e, self.a[j], self.a[j - 1])", "e",
        test_noises_made_for_it_return_the_picture, {"invert": edit_friendly}),
    "what was before goes on into the next walk": ("before: list[tuple[float, Tensor]] = []",
        "before = improvement.__dict__.setdefault('before', [])",
        test_with_noises_it_is_diffusers_stochastic_form, {"steps": 20}),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    old, new, test, case = MUTATIONS[name]
    broken = mutant("path", old, new, monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "Q", broken)
    for module in ("edit_friendly", "replay"):
        known = sys.modules[f"minidiffedit.methods.{module}"]
        monkeypatch.setattr(known, "Path", broken.Path)
    with pytest.raises((AssertionError, ZeroDivisionError, pytest.fail.Exception)):
        test(**case)
