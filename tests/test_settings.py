"""Settings of every method against what is published: defaults, bounds, rows of the table, constants. And the least
that can be asked for: no noise, and one step.

The numbers below are typed from the papers and their authors' code, not read from ours. A setting that is new, or is
another, stands here with its source, or this is red. "Ours": the source says nothing, or says it of another thing.
"""

import importlib
import inspect
import pkgutil
import re

import pytest
import test_cost

from minidiffedit import methods
from minidiffedit import run as R
from minidiffedit.methods.table import INVERSIONS, MASKS, SYSTEMS
from minidiffedit.options import options_of

PLACES = {*INVERSIONS.values(), *MASKS.values(), *(system.edit for system in SYSTEMS.values() if system.edit)}
MODULES = {
    name: importlib.import_module(f"minidiffedit.methods.{name}")
    for _, name, _ in pkgutil.iter_modules(methods.__path__)
    if name not in ("table", "system")
}
PROX = "guidance cfg, quantile .4, norm l0"  # ProxEdit's code has .7 of two rows, one of which is zero: .4 of the other

# function: its defaults, all but texts that may be left out
DEFAULTS = {
    # 2210.11427, 4.1: 50 steps, noise .5, 10 maps, threshold .5; 3 times the mean: diffusers' pipeline
    "diffedit:contrast":
        "steps 50, mask_strength .5, maps 10, mask_clip 3, mask_threshold .5, seed 0, chunk none",
    "diffedit_regions:contrasts":
        "steps 50, mask_strength .5, maps 10, mask_clip 3, mask_threshold .5, seed 0, chunk none",
    # 2308.08947, 4.1: 1.5 interquartile ranges; its code: noise .8, one map, threshold .5, 100 steps
    "diffedit:quartiles":
        "steps 50, mask_strength .5, maps 10, mask_fence 1.5, mask_threshold .5, seed 0, chunk none",
    "watch_your_steps:relevance": "steps 100, mask_strength .8, maps 1, mask_fence 1.5, mask_threshold .5, seed 0",
    # ours
    "word_maps:word_mask":
        "steps 50, mask_strength .5, maps 10, mask_levels 1, mask_clip none, mask_threshold .4, seed 0",
    # guidance 7.5 is Stable Diffusion's own, here and wherever nothing else is said
    "diffedit:decode": "guidance_scale 7.5, grey level, sampler ddim",
    "diffedit:decode_all": "guidance_scale 7.5, sampler ddim",
    "diffedit:reconstruct": "encode_text null",
    "diffedit_regions:decode_edits": "guidance_scale 7.5",
    "sige:sige": "steps 50, strength .8, guidance_scale 7.5, grey level, margin 2",  # margin: ours
    # 2108.01073: t0 of .3 to .6; VP; its code: one repeat
    "sdedit:sdedit":
        "steps 50, strength .5, guidance_scale 7.5, eta 0, repeats 1, form vp, grey level, sampler ddim, seed 0",
    "text_to_image:text_to_image": "steps 50, guidance_scale 7.5, sampler ddim",
    # 2206.02779's code: the first quarter is left out, noise inside; growing and fitting are asked for
    "blended_latent:blended_latent": "steps 50, strength .75, guidance_scale 7.5, start noise, grow 0, grey level,"
        "fit_steps 0, seed 0",
    # 2305.06710's code: 100 steps, guidance 10, from t = 400, Back-D of 200
    "null_text_guidance:null_text_guidance":
        "steps 100, strength .4, guidance_scale 10, disturb back, back 200, seed 0",
    # 2403.08840's code: 200 steps, level 140, cut at 2, 1.2, guidance 10
    "noise_diffusion:noise_diffusion":
        "fraction .5, steps 200, strength .7, guidance_scale 10, bound 2, signal 1.2",
    "replay:replay": f"guidance_scale 7.5, {PROX}, sampler ddim",
    # 2208.01626's notebooks: cross .8, self .4, up to 16 x 16, blend at .3
    "prompt_to_prompt:prompt_to_prompt": "mode refine, cross_steps .8, self_steps .4, self_levels 1,"
        f"blend_threshold .3, guidance_scale 7.5, {PROX}",
    # 2311.16711's code: scale 5, threshold .9, both masks
    "ledits:ledits": "concept_scale 5, concept_threshold .9, concept_mask both, warm_up 0, cool_down 0",
    "edict:edict": "steps 50, strength .8, guidance_scale 3, mixing .93",  # 2211.12446, 5
    # 2306.05414's code: below t = 400, at rate 1; of reconstruction guidance none
    "proxedit:proxedit": "guidance_scale 7.5, quantile .4, norm l0, inversion_guidance 1, reconstruction_guidance 0,"
        "guided_below 400, grow 0",
    # 2311.01410's code: .7 and 7.5; the drag: 100 steps, .6, patches of radius 5, times 1.1, .3 kept, guidance to 3
    "sde_diffedit:cycle_sde": "steps 50, strength .7, guidance_scale 7.5, sampler ddim, seed 0",
    "sde_diffedit:decode": "guidance_scale 7.5, grey level",
    "sde_drag:sde_drag":
        "steps 100, strength .6, guidance_scale 3, moves 5, radius 5, boost 1.1, keep .3, seed 0",
    # 2304.08465's code: from step 4, layer 10 (the two finest levels), objects at .1
    "masactrl:masactrl": "guidance_scale 7.5, first_step 4, finest 2, look source, null_look source,"
        f"object_threshold .1, {PROX}",
    "tic_inversion:tic":
        f"guidance_scale 7.5, first_step 4, finest 2, look source, object_threshold .1, {PROX}",
    # 2211.12572's code: features .8, attention .5
    "plug_and_play:plug_and_play": "feature_steps .8, attention_steps .5, negative_alpha 0,"
        f"negative_schedule constant, guidance_scale 7.5, {PROX}",
    "pfb_diff:pfb_diff": f"blend_steps .5, guidance_scale 7.5, {PROX}, grey level",  # 2306.16894's code
    # 2401.02126's code, of 50 steps: 25, 40, 4 to 40, 10 to 30, 40; guidance 5
    "ti_guided:ti_guided_edit": "structure_steps .5, feature_steps .8, appearance_after .08, appearance_until .8,"
        "adain_after .2, adain_until .6, blend_until .8, guidance_scale 5",
    # 2311.03335's code, of 100 steps: 10, 20; contrast 1.67, guidance 3.5
    "cross_image:cross_image_attention":
        "exchange_after .1, adain_after .2, contrast 1.67, swap_scale 3.5, seed 0",
    # 2307.12493's code: 20 steps of second order, .4, .8, guidance 5 across domains
    "tf_icon:tf_icon":
        "steps 20, inject_steps .4, hold_steps .8, guidance_scale 5, sampler dpmsolver++, seed 0",
    # 2304.07090's code: 200 steps of SGD at .1 on 2000 / 4096 of the difference; 2311.18608's: 3, 256 places
    "dds:dds": "iterations 200, rate .048828125, guidance_scale 7.5, seed 0",
    "dds:sds": "iterations 200, rate .048828125, guidance_scale 7.5, seed 0",
    "cds:cds": "iterations 200, rate .048828125, guidance_scale 7.5, contrast 3, positions 256, seed 0",
    "pix2pix_zero:pix2pix_zero": f"rate .1, guidance_scale 7.5, {PROX}",  # 2302.03027's code
    # 2312.11396's code, of 50 steps: 15 moves of 2.5 in the first 25, the last 15 kept; prompt-to-prompt .8, .5
    "mag_edit:mag_edit": "ratio token, nudges 15, nudge_steps .5, nudge_scale 2.5, cross_steps .8, self_steps .5,"
        "kept_steps .3, guidance_scale 7.5",
    # abstracts alone: ours
    "baret:baret":
        "steps 50, strength 1, guidance_scale 7.5, inner_steps 10, cross_steps .8, self_steps .5",
    "kv_inversion:kv_inversion":
        "steps 50, strength 1, guidance_scale 7.5, inner_steps 5, rate .001, first_step 4, finest 2",
    "latent_inversion:latent_inversion": "steps 50, strength 1, source_steps .3, guidance_scale 7.5, text_steps 500,"
        "text_rate .001, seed 0",
    # 2212.08698's code: the source's text in the first 10 to 20 of 50 steps
    "disentanglement:disentanglement": f"source_steps .3, late 0, guidance_scale 7.5, {PROX}",
    # 2306.14435's code: 35 of 50, 80 moves at .01, r 1 and 3, .1; LoRA: 80 steps of 4, rank 16, 5e-4. 2404.01050's: 60
    "drag_diffusion:drag_diffusion": "steps 50, strength .7, iterations 80, rate .01, patch 1, reach 3, outside .1,"
        "lora_steps 80, rank 16, lora_rate 5e-4, batch 4, seed 0",
    "drag_diffusion:drag_noise": "steps 50, strength .7, iterations 60, rate .01, patch 1, reach 3, outside .1,"
        "lora_steps 60, rank 16, lora_rate 5e-4, batch 4, seed 0",
    # 2307.02421's code: 2000 of .04, by our mean of 4 parts; 6 and .2 beside 4; the first 30 of 50, guidance 4
    "dragon_diffusion:dragon_diffusion":
        "energy 320, content 1.5, empty .05, energy_steps .6, square 2, guidance_scale 4",
    # 2210.09276: .6 to .8; its ports: 500 steps at 1e-3; by LoRA: ours
    "imagic:imagic": "share .7, steps 50, guidance_scale 7.5, text_steps 500, text_rate .001, lora_steps 250, rank 16,"
        "lora_rate 5e-4, batch 4, seed 0",
    # 2212.04489's code: 100 steps, guidance 10, down to t = 500, .4; by LoRA: ours
    "sine:sine": "learned .4, until 500, steps 100, guidance_scale 10, lora_steps 200, rank 16, lora_rate 5e-4,"
        "batch 4, seed 0",
    # 2211.09800's code: 100 steps, 7.5 and 1.5; 2211.13227's: 5
    "inpainting:inpaint": "steps 50, guidance_scale 7.5, seed 0",
    "instruct_pix2pix:instruct_pix2pix": "steps 100, guidance_scale 7.5, picture_scale 1.5, seed 0",
    "watch_your_steps:watch_your_steps":
        "steps 100, guidance_scale 7.5, picture_scale 1.5, grey level, seed 0",
    "paint_by_example:paint": "steps 50, guidance_scale 5, seed 0",
    # inversions go all the way up, at one call a level
    "inversions:ddim": "steps 50, strength 1, encode_text source, refine 1",
    "inversions:direct": "steps 50, strength 1, encode_text source, refine 1",
    "inversions:ddim_paper": "steps 50, strength 1, encode_text source",
    "inversions:aidi": "steps 50, strength 1, encode_text source, iterations 5",
    "inversions:noise": "steps 50, strength .8, seed 0",  # DiffEdit's level
    "inversions:negative_prompt": "steps 50, strength 1, refine 1",
    "null_text:null_text": "steps 50, strength 1, guidance_scale 7.5, inner_steps 10, refine 1",  # 2211.09794's code
    # 2304.06140's code: 36 of 100 left out, 3.5
    "edit_friendly:edit_friendly":
        "steps 50, strength .64, source_scale 3.5, zero_last false, sampler ddim, seed 0",
    # 2210.05559's code: eta .1, the source at guidance 1
    "cycle_diffusion:cycle": "steps 50, strength .8, source_scale 1, eta .1, sampler ddim, seed 0",
    # 2309.15664's code: 20 and 51; 2303.15649's: 100, and .6 of the steps
    "dpl:dpl": "steps 50, strength 1, guidance_scale 7.5, text_steps 20, inner_steps 51, refine 1",
    "style_diffusion:style_diffusion":
        "steps 50, strength 1, guidance_scale 7.5, inner_steps 100, learned_steps .6, refine 1",
}  # fmt: skip

# What a row of the table asks for beside its function's own: the settings of its paper or its authors' code.
ROWS = {
    **{name: {"encode_text": "null", "strength": 0.8} for name in ("diffedit", "diffedit-regions", "user-mask",
       "encode-only", "reconstruction", "instructedit", "direct-inversion")},
    "null-text-inversion": {"self_steps": 0.5, "self_levels": 2},
    "negative-prompt-inversion": {"self_levels": 2},
    "dpl": {"self_levels": 2},
    "pnp-inversion": {"cross_steps": 0.4, "self_steps": 0.6, "self_levels": 2},
    "style-diffusion": {"cross_steps": 0.6, "self_steps": 0.8, "self_levels": 2},
    "edit-friendly-ddpm": {"steps": 100, "guidance_scale": 15.0},
    "cycle-diffusion": {"steps": 100, "guidance_scale": 2.0},
    "ledits++": {"steps": 40, "strength": 0.85, "sampler": "dpmsolver++"},
    "masactrl-union": {"look": "union", "null_look": "union"},
    "prox-masactrl": {"guidance": "prox"},
    "cross-image-attention": {"steps": 100, "strength": 0.68},
}  # fmt: skip

# (lowest, highest): the options; a function before the name where another has it otherwise
BOUNDS = {
    (0, 1): """strength mask_strength mask_threshold quantile eta fraction cross_steps self_steps blend_threshold
        concept_threshold inversion_guidance reconstruction_guidance keep object_threshold feature_steps keep learned
        attention_steps negative_alpha blend_steps structure_steps appearance_after appearance_until adain_after
        adain_until blend_until exchange_after inject_steps hold_steps nudge_steps kept_steps source_steps lora_rate
        energy_steps text_rate learned_steps""",
    (0.5, 1): "mixing",  # less than half would exchange the two latents
    (0.001, 1): "cycle_diffusion:cycle.eta",  # no noise can be found where none is added
    (1, 999): "steps",
    (-1000, 1000): "guidance_scale source_scale concept_scale swap_scale picture_scale",
    (0, 2**63 - 1): "seed",
    (1, 100): "repeats moves refine inversions:aidi.iterations cross_image:cross_image_attention.contrast",
    (1, 1000): "maps chunk",
    (1, 1e9): "mask_clip",
    (0, 1e9): "mask_fence",
    (1, 10): "mask_levels",
    (0, 64): "grow",
    (1, 64): "radius batch",
    (0, 1000): "back bound guided_below outside content empty until cds:cds.contrast",  # timesteps, weights
    (0, 10): "signal self_levels boost finest rate",
    (-10, 10): "late imagic:imagic.share",
    (0, 999): "warm_up cool_down first_step",
    (0, 128): "margin",
    (1, 2000): "iterations",
    (0, 2000): "drag_diffusion:drag_diffusion.iterations drag_diffusion:drag_noise.iterations",
    (0, 100): "dds:dds.rate dds:sds.rate cds:cds.rate",
    (2, 4096): "positions",  # one place is told apart from none
    (0, 200): "inner_steps text_steps nudges",
    (0, 10_000): "nudge_scale fit_steps",
    (0, 32): "patch square",
    (1, 32): "reach",
    (0, 5000): "lora_steps imagic:imagic.text_steps latent_inversion:latent_inversion.text_steps",
    (1, 1024): "rank",
    (0, 100_000): "energy",
}

CONSTANTS = {
    ("cds", "SHARE"): 4096 / 2000,  # as DDS's loss is 2000 / 4096 of the difference
    ("cds", "TEMPERATURE"): 0.07,  # 2007.15651
    ("cross_image", "AT_ONCE"): 2**19,  # ours: 4 MB of a map and two heads
    ("cross_image", "FIFTHS"): 0.4,  # its code: below step 40 of 100
    ("dds", "LOWEST"): 50,  # its code: 50 .. 948
    ("dds", "HIGHEST"): 948,
    ("dds", "RATE"): 0.048828125,
    ("decoder_fit", "RATE"): 0.0001,  # 2206.02779's code
    ("decoder_fit", "OUTSIDE"): 100,
    ("drag", "FINE"): 4,  # 2306.14435's code: features at half the picture's size, a goal is reached within 2
    ("drag", "NEAR"): 2,
    ("dragon_diffusion", "ALONE"): 0.1,
    ("edict", "MOST"): 1e12,  # ours: float64 keeps 16 digits
    ("ledits", "LATE"): 800,  # its code
    ("lora", "DECAY"): 0.01,  # AdamW's
    ("null_text", "RATE"): 0.01,  # its code: 1e-2, 1e-5 + 2e-5 i
    ("null_text", "ENOUGH"): 0.00001,
    ("null_text", "ENOUGH_MORE"): 0.00002,
    ("prompt_to_prompt", "BLEND_STEPS"): 0.2,  # its code
    ("ti_guided", "CONTRAST"): 1.67,  # its code
}
# Of functions that are no method's: what they take where nothing is said.
HELPERS = {
    ("descent", "Adam", "decay"): 0.0,
    ("diffedit_regions", "regional_decode", "guidance_scale"): 7.5,
    ("sdedit", "denoise", "eta"): 0.0,
    ("sdedit", "denoise", "guidance_scale"): 7.5,
    ("edit_friendly", "visited", "scale"): 1.0,
    ("edit_friendly", "visited", "eta"): 1.0,  # DDPM
    ("guidance", "prox", "quantile"): 0.4,
    ("masactrl", "masactrl", "coarsest"): 2,  # SD v1's, 16 x 16 of 512
    ("tic_inversion", "tic", "coarsest"): 2,
    ("words", "numbered", "low"): -1000,
    ("words", "numbered", "high"): 1000,
    ("lora", "lora", "lora_steps"): 80,  # 2306.14435's code
    ("lora", "lora", "rank"): 16,
    ("lora", "lora", "lora_rate"): 0.0005,
    ("lora", "lora", "batch"): 4,
    ("lora", "lora", "seed"): 0,
}


def test_every_method_and_constant_is_here():
    assert {*DEFAULTS} == PLACES
    asked = {name: row.options for name, row in SYSTEMS.items() if row.edit and row.options}
    assert asked == ROWS


@pytest.mark.parametrize("place", DEFAULTS)
def test_defaults(place):
    found = options_of(R.function_at(place))
    said = dict(one.split() for one in DEFAULTS[place].split(","))
    assert said.keys() <= found.keys()
    assert {name: found[name].parse(text) for name, text in said.items()} == {
        name: one.default for name, one in found.items() if one.type is not str or one.choices
    }


def test_bounds():
    said = {name: pair for pair, names in BOUNDS.items() for name in names.split()}
    for place in PLACES:
        for name, one in options_of(R.function_at(place)).items():
            if one.numeric and not one.choices:
                wanted = said.get(f"{place}.{name}", said.get(name))
                assert (one.low, one.high) == wanted, (place, name)
                assert all(isinstance(edge, int | float) and one.check(one.type(edge)) == edge for edge in wanted)


def test_constants():
    found = {}
    for module, one in MODULES.items():
        for names in re.findall(r"^([A-Z_]+(?:, [A-Z_]+)*) = ", inspect.getsource(one), re.M):
            found |= {(module, name): getattr(one, name) for name in names.split(", ")}
    assert {name: value for name, value in found.items() if type(value) in (int, float)} == CONSTANTS


def test_what_helpers_take():
    found = {}
    for module, one in MODULES.items():
        for name, function in vars(one).items():
            ours = callable(function) and getattr(function, "__module__", "") == one.__name__
            options = options_of(function) if f"{module}:{name}" in PLACES else {}
            for key, parameter in inspect.signature(function).parameters.items() if ours else ():
                if type(parameter.default) in (int, float) and key not in options:
                    found[module, name, key] = parameter.default
    assert found == HELPERS


LEAST = ({"strength": 0.0}, {"steps": 1}, {"steps": 1, "strength": 1.0}, {"steps": 2})
ASKED = [(name, one) for name in test_cost.WORKING for one in LEAST if one.keys() <= R.blank_plan(name).options.keys()]


@pytest.mark.filterwarnings("ignore:.*(rounds to level 0|do not divide|leaves)")
@pytest.mark.parametrize("method, options", ASKED)
def test_the_least_that_can_be_asked_for(method, options, picture):
    """One level, two, or none: what is paid is what is predicted, and without noise the picture comes back."""
    plan = test_cost.planned(method, **options)
    done = test_cost.paid(plan, picture)
    assert test_cost.counted(plan, done) and done.latent.isfinite().all()
    assert options.get("strength") != 0 or done.latent.equal(done.x0)
