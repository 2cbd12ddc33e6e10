"""Each mistake that other implementations make, made here on purpose in the core, must turn a test red.

A mutant is the module's source with one piece replaced, run in the test's place of the real module (`mutants.py`). Those
of the methods, of the runner and of the costs stand beside their tests.
"""

import types

import pytest
import test_ddim
import test_diffedit
import test_grey
import test_parity
from mutants import lines_of, load, mutant, run, source, tokens

from minidiffedit.tokenizer import Tokenizer

E, P, S = test_diffedit, test_parity, test_ddim

# name: (where, what stands there, what a mistake would put, the test that must fail)
ALGORITHM = {
    "blend with the level just left": ("diffedit:masked_decode", "trajectory[j - 1]", "trajectory[j]",
        E.test_outside_the_mask_every_level_is_the_encoded_one),
    "grey joins a level early": ("diffedit:mask_at", "M * (K - 1) - j", "M * (K - 1) - j - 1",
        test_grey.test_a_cell_joins_below_its_level),
    "grey blends at each level": ("diffedit:masked_decode", "m = mask_at(M, j - 1, K, grey)", "m = M",
        test_grey.test_greys_effect_is_the_same_at_any_number_of_steps),
    "start one level up": ("diffedit:masked_decode", "range(K, 0, -1)", "range(K - 1, 0, -1)",
        E.test_full_mask_from_the_top_is_plain_sampling),
    "feed the level below's timestep": ("diffedit:masked_decode", "eps(y, t[j], [null, target])", "eps(y, t[j - 1], [null, target])",
        E.test_full_mask_from_the_top_is_plain_sampling),
    "an inversion step that is the identity": ("diffedit:encode", "math.sqrt(a[j + 1]) * predicted_x0 + math.sqrt(1 - a[j + 1]) * e",
        "math.sqrt(a[j]) * predicted_x0 + math.sqrt(1 - a[j]) * e", E.test_zero_predictor_scales_every_level),
    "invert at the level left": ("diffedit:encode", "eps(x_next, t[j + 1], [text])", "eps(x_next, t[j], [text])",
        E.test_encoding_asks_at_the_level_it_moves_to),
    "int() for rounding": ("ddim:level_at", 'math.floor(real("strength", strength, 0, 1) * steps + 0.5)', 'int(real("strength", strength, 0, 1) * steps)',
        S.test_level_warnings_and_errors),
    "drop abs": ("diffedit:find_mask", "(e_target - e_reference).abs().mean(dim=1)", "(e_target - e_reference).mean(dim=1)",
        E.test_the_sign_of_a_difference_does_not_matter),
    "share one noise": ("ddim:noises", "torch.cat([torch.randn((1, *shape), generator=generator, dtype=torch.float32) for _ in range(count)])",
        "torch.randn((1, *shape), generator=generator).repeat(count, 1, 1, 1)",
            E.test_maps_see_the_stated_noises_at_the_stated_level),
    "another noise for the reference": ("diffedit:find_mask", "e_target, e_reference = eps(x_t, t[j], [target, reference])",
        "(e_target,), (e_reference,) = eps(x_t, t[j], [target]), eps(x_t + 0.1, t[j], [reference])",
        E.test_maps_see_the_stated_noises_at_the_stated_level),
    "statistics of all images in the batch test": ("diffedit:threshold_maps", "low, high = m.min(), m.max()",
        "low, high = maps.mean(1).min(), maps.mean(1).max()", E.test_alone_in_a_batch_and_under_any_chunk),
    "swap the guidance halves": ("diffedit:masked_decode", "[null, target]", "[target, null]",
        E.test_full_mask_from_the_top_is_plain_sampling),
    "swap them in plain sampling": ("diffedit:sample", "[null, target]", "[target, null]",
        E.test_guidance_leads_to_the_target),
    "divide by a flat map's spread": ("diffedit:threshold_maps", "flat = bool(high - low <= least)", "flat = False",
        E.test_flat_maps_have_a_verdict),
    "call flat what is exactly flat only": ("diffedit:threshold_maps", "high - low <= least", "high - low <= 0",
        E.test_flat_maps_have_a_verdict),
    "one kappa for all dtypes": ("diffedit:find_mask", "KAPPA.get(e_target.dtype, KAPPA_FULL)", "KAPPA_FULL",
        E.test_flat_maps_have_a_verdict),
    "no answer for equal texts": ("diffedit:find_mask", "if target is reference:", "if False:",
        E.test_same_text_is_answered_without_a_call),
    "statistics of the whole batch": ("diffedit:threshold_maps", "low, high = m.min(), m.max()", "low, high = maps.mean(1).min(), maps.mean(1).max()",
        E.test_statistics_against_numpy),
    "no clip": ("diffedit:threshold_maps", "m = m.clamp(max=clip * m.mean())", "m = m", E.test_extreme_cells),
    "seed 0 is unset": ("diffedit:find_mask", 'whole("seed", seed, 0, 2**63 - b) + i', "(seed or 1) + i",
        E.test_seeds_lists_and_the_global_generator),
    "one seed for the batch": ("diffedit:find_mask", 'whole("seed", seed, 0, 2**63 - b) + i', "seed",
        E.test_maps_see_the_stated_noises_at_the_stated_level),
    "the global generator": ("ddim:noises", 'torch.Generator("cpu").manual_seed(whole', "torch.manual_seed(whole",
        E.test_seeds_lists_and_the_global_generator),
    "binarise soft masks": ("diffedit:checked_mask", "M = mask.to(x)", "M = (mask > 0.5).to(x)",
        E.test_soft_masks_blend_and_stay_soft),
    "overwrite the caller's mask": ("diffedit:checked_mask", "M = mask.to(x)", "M = mask.to(x)\n    mask.fill_(True)",
        E.test_arguments_are_left_alone_and_half_types_widen),
    "a null row at guidance 1": ("diffedit:masked_decode", "if g == 1:", "if False:",
        E.test_guidance_one_saves_the_null_rows),
    "alpha_bar of level 0 is 1": ("ddim:levels", "tuple(alpha_bar()[i] for i in t)", "(1.0, *(alpha_bar()[i] for i in t[1:]))",
        E.test_zero_predictor_scales_every_level),
    "no steps offset": ("ddim:levels", "1 + stride * j", "stride * j", S.test_levels_are_the_definition),
    "betas linear, not in their roots": ("ddim:alpha_bar", "torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2",
        "torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)", S.test_alpha_bar_is_the_float32_product),
    "refine without a guard": ("diffedit:encode", "~(change >= residual)", "change < math.inf",
        E.test_refining_stops_where_it_diverges),
}  # fmt: skip

# The numerical facts that implementations of the networks get wrong.
NETWORKS = {
    "UNet norms at 1e-6": ("unet", "self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)",
        "self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)",
        P.test_every_norm_has_its_eps),
    "the transformer's opening norm at 1e-5": ("unet",
        "self.norm = nn.GroupNorm(config.norm_num_groups, c, eps=1e-6)", "self.norm = nn.GroupNorm(config.norm_num_groups, c, eps=1e-5)",
        P.test_every_norm_has_its_eps),
    "VAE norms at 1e-5": ("vae", "self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)",
        "self.norm2 = nn.GroupNorm(groups, c_out)",
        P.test_every_norm_has_its_eps),
    "the gate first": ("unet", "value, gate = self.proj(x).chunk(2, dim=-1)",
        "gate, value = self.proj(x).chunk(2, dim=-1)",
        P.test_unet),
    "tanh GELU": ("unet", "F.gelu(gate)", "F.gelu(gate, approximate=\"tanh\")", P.test_unet),
    "sine before cosine": ("unet", "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]", P.test_unet),
    "frequencies over half - 1": ("unet", "device=t.device) / half)", "device=t.device) / (half - 1))", P.test_unet),
    "skips before the current": ("unet", "[x, fan_out(skips.pop(), len(x))]", "[fan_out(skips.pop(), len(x)), x]",
        P.test_unet),
    "no SiLU on the time": ("unet", "F.silu(self.time_embedding(time_features", "(self.time_embedding(time_features",
        P.test_unet),
    "VAE pads left and top": ("vae", "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))", P.test_vae_encoder),
    "VAE without its attention's residual": ("vae", "return x + tokens.transpose(1, 2)",
        "return tokens.transpose(1, 2)",
        P.test_vae_decoder),
    "no clamp of the log-variance": ("vae", "log_variance.clamp(-30.0, 20.0)", "log_variance",
        P.test_vae_bounds_the_log_variance),
    "GELU in CLIP": ("clip", "h * torch.sigmoid(1.702 * h)", "torch.nn.functional.gelu(h)", P.test_clip),
    "CLIP without its last norm": ("clip", "return self.final_layer_norm(x)", "return x", P.test_clip),
    "CLIP sees the future": ("clip", "Site(\"clip\", 0, index, \"causal\")", "Site(\"clip\", 0, index, \"self\")",
        P.test_clip),
}  # fmt: skip
ARGUMENTS = {P.test_unet: (8, 8, 481), P.test_vae_encoder: (64, 64), P.test_vae_decoder: (8, 8)}


def exchange(name: str, module: types.ModuleType, monkeypatch) -> None:
    if name in ("unet", "vae", "clip"):
        monkeypatch.setattr(P, name, module)
    else:
        page = module if name == "diffedit" else load("diffedit", source("diffedit"), monkeypatch)
        monkeypatch.setattr(E, "D", page)
        monkeypatch.setattr(test_grey, "D", page)
        if name == "ddim":
            monkeypatch.setattr(S, "ddim", module)


def run_core(test) -> None:
    """The test itself, through all its parameters; of those that diffusers is asked for, one."""
    if test is P.test_clip:
        test(types.SimpleNamespace(tokenizer=Tokenizer()))
    elif test in ARGUMENTS:
        test(*ARGUMENTS[test])
    else:
        run(test)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*ALGORITHM, *NETWORKS])
def test_mutation_turns_a_test_red(name, monkeypatch):
    place, old, new, test = (ALGORITHM | NETWORKS)[name]
    exchange(place.partition(":")[0], mutant(place, old, new, monkeypatch), monkeypatch)
    with pytest.raises((AssertionError, IndexError, pytest.fail.Exception)):
        run_core(test)


@pytest.mark.parametrize("test", sorted({m[3] for m in (ALGORITHM | NETWORKS).values()}, key=lambda t: t.__name__))
@pytest.mark.filterwarnings("ignore")
def test_unchanged_sources_pass_in_the_same_harness(test, monkeypatch):
    """A mutant must fail for its mutation, not for how it is loaded."""
    for name in ("ddim", "unet", "vae", "clip"):
        exchange(name, load(name, source(name), monkeypatch), monkeypatch)
    run_core(test)


# ---------------------------------------------------------------- how a piece is found


@pytest.mark.parametrize("place, old", [
    ("ddim", "no such piece"), ("diffedit", "[null, target]"), ("diffedit:masked_decode", "maps.mean(dim=1)"), ("ddim:move", "x"),
])  # fmt: skip
def test_a_piece_that_does_not_stand_there_once_fails_loudly(place, old, monkeypatch):
    with pytest.raises(AssertionError, match=r"no longer applies: .* stands \d+ times"):
        mutant(place, old, "", monkeypatch)
    with pytest.raises(ValueError):
        mutant("ddim:no_such_function", "x", "y", monkeypatch)


def test_layout_comments_and_quotes_are_no_part_of_a_piece():
    plain = [word for word, *_ in tokens("f(a, 'b', [1, 2])  # why\n")]
    assert plain == [
        word for word, *_ in tokens('f(\n    a,  # that\n    "b",\n    [\n        1,\n        2,\n    ],\n)')
    ]
    assert plain != [word for word, *_ in tokens("f(a, 'c', [1, 2])")] and "(1,)" not in plain
    text = source("ddim")
    start, end = lines_of(text, "Trajectory.prefix")
    assert text[start:].lstrip().startswith("def prefix(") and text[:end].endswith("self.steps)\n")
