"""Predicted rows are the rows paid: every row of the table, every inversion under every editor that takes a path.

`C` is exchanged by the mutants. The stand-in is one of a few lines; the default edit also runs on the tiny network.
"""

import sys
import warnings

import numpy as np
import pytest
from mutants import mutant, run
from PIL import Image
from stubs import Model
from tiny import box

from minidiffedit import cost as C
from minidiffedit import run as R
from minidiffedit.methods.table import INVERSIONS, MASKS, SYSTEMS
from minidiffedit.unet import UNetConfig

EMPTY, DOT = Image.new("L", (93, 75)), Image.new("L", (93, 75))
DOT.putpixel((40, 30), 1)
GIVEN = {
    "target": "a zebra", "source": "a horse", "mask": box(), "edits": [("a horse", "a zebra"), ("grass", "sand")],
    "negative_prompt": "blurry", "reference": box(), "points": [((30, 20), (40, 30))],
}  # fmt: skip
SMALL = {"steps": 5, "maps": 3, "seed": 0, "inner_steps": 3, "chunk": 2}
SMALL |= {"iterations": 3, "lora_steps": 2, "text_steps": 2, "nudges": 2}
WORKING = [name for name, system in SYSTEMS.items() if system.edit and name != "text-to-image"]
EDITORS = {system.edit: name for name, system in SYSTEMS.items() if system.inversion}  # one name for each function
PAIRS = [f"{inversion}+{name}" for inversion in INVERSIONS for name in EDITORS.values()]
MASKED = {SYSTEMS[name].edit: name for name in WORKING if R.blank_plan(name).steerable}
OTHER_MASKS = [f"{mask}+{name}" for mask in MASKS for name in MASKED.values()]

pytestmark = pytest.mark.filterwarnings("ignore:.*do not divide", "ignore:edit 2 leaves", "ignore:the mask of image")
MODELS = {kind: Model(kind) for kind in ("base", "inpainting", "instruct", "example")}


@pytest.fixture(scope="module")
def sd():
    return MODELS["base"]


def planned(method, **options):
    """With what the method needs, and small numbers where it has them."""
    blank = R.blank_plan(method)
    small = {name: value for name, value in SMALL.items() if name in blank.options}
    return R.plan(method, **{name: GIVEN.get(name, f"some {name}") for name in blank.needs} | small | options)


def paid(plan, picture, **options):
    sd = MODELS[plan.system.weights]
    before = sd.evaluations
    done = R.execute(plan, sd, picture, **options)
    assert sd.evaluations - before == done.rows
    return done


def counted(plan, done):
    """Whether the prediction is what was paid; DPL's nouns may be found before their last step."""
    predicted = C.cost(plan)
    if plan.functions.get("path") == "dpl:dpl":
        return all(rows <= predicted[stage] for stage, rows in done.evaluations.items())
    return predicted == done.evaluations


@pytest.mark.parametrize("method", WORKING)
def test_each_row_of_the_table(method, picture):
    for options in ({}, {"strength": 0.4}, {"guidance_scale": 1.0}, {"source": "a horse"}, {"negative_prompt": "b"},
                    {"encode_text": "source", "source": "x"}, {"chunk": 1}, {"repeats": 3}, {"size": 128}):  # fmt: skip
        blank = R.blank_plan(method)
        if options.keys() <= blank.options.keys() | blank.given.keys():
            plan = planned(method, **options)
            assert counted(plan, paid(plan, picture)), options


@pytest.mark.parametrize("method", PAIRS)
def test_each_inversion_under_each_editor(method, picture):
    plan = planned(method)
    assert counted(plan, paid(plan, picture))


@pytest.mark.parametrize("method", OTHER_MASKS)
def test_each_mask_under_each_editor(method, picture):
    """Where the mask's function is for weights that the editor's are not, counting refuses what the model would."""
    plan = planned(method)
    try:
        done = paid(plan, picture)
    except ValueError as error:
        assert "given must be" in str(error)
        with pytest.raises(ValueError, match="needs other weights than"):
            C.cost(plan)
    else:
        assert C.cost(plan) == done.evaluations and done.evaluations["mask"]


def test_the_default_edit_on_a_network(sd, picture):
    import tiny

    plan = R.plan(target="a zebra", source="a horse", seed=0)
    assert (
        C.cost(plan) == {"mask": 20, "encode": 40, "decode": 80} == R.execute(plan, tiny.model(), picture).evaluations
    )
    assert C.cost(plan, UNetConfig(block_out_channels=(32, 64), layers_per_block=1)) == C.cost(plan)


def test_where_a_method_may_stop_early_it_is_the_most_it_pays(picture):
    for plan in (planned("diffedit", refine=4), planned("direct+replay", refine=4), planned("masactrl", refine=2)):
        predicted, done = C.cost(plan), paid(plan, picture)
        most = plan.settings["refine"] * (len(done.stages["encode"]) - 1)
        assert done.evaluations["encode"] <= predicted["encode"] == most
        assert {**done.evaluations, "encode": 0} == {**predicted, "encode": 0}
    for scale in (7.5, 1.0, 0.1):
        plan = planned("null-text-inversion", guidance_scale=scale, inner_steps=20)
        assert paid(plan, picture).evaluations["encode"] <= C.cost(plan)["encode"] == 5 + 5 + 5 * 20 + 5


@pytest.mark.parametrize(
    "method", ["diffedit", "user-mask", "sdedit", "direct+diffedit", "null-text+user-mask", "sd-inpainting"]
)
@pytest.mark.parametrize(
    "mask", [box(), EMPTY, DOT, np.eye(8, 10, dtype=np.float32)], ids=["box", "empty", "dot", "cells"]
)
def test_given_masks_cost_by_whether_they_hold_a_cell(method, mask, picture):
    options = {"source": "a horse"} if method == "null-text+user-mask" else {}
    plan = planned(method, target="a zebra", mask=mask, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = paid(plan, picture)
    assert C.cost(plan) == done.evaluations and bool(done.rows) == (mask is not EMPTY)


@pytest.mark.parametrize("method, options", [
    ("diffedit", {"source": "a zebra"}), ("diffedit", {"strength": 0.0}), ("diffedit", {"mask_threshold": 1.0}),
    ("mask-only", {"source": "a zebra"}), ("masactrl", {"strength": 0.0}), ("sdedit", {"strength": 0.0}),
    ("diffedit-regions", {"edits": [("a", "a"), ("b", "b")]}),
    ("diffedit-regions", {"edits": [("a", "a"), ("b", "c")]}),
    ("diffedit-regions", {"edits": [("a", "b")]}), ("sdedit", {"target": ""}),
    ("sdedit", {"target": "x", "negative_prompt": "x"}),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:nothing to edit", "ignore:edit 1 has no cell")
def test_where_nothing_or_less_is_to_do(method, options, picture):
    plan = planned(method, **options)
    assert C.cost(plan) == paid(plan, picture).evaluations


def test_generation():
    for options, rows in (({}, 10), ({"guidance_scale": 1.0}, 5)):
        plan = R.plan("text-to-image", target="a horse", steps=5, seed=0, **options)
        done = R.generate(MODELS["base"], "a horse", steps=5, seed=0, **options)
        assert C.cost(plan) == done.evaluations == {"generate": rows}


def test_plans_in_a_row_pay_what_is_new(picture):
    """The same plans executed one after another, each reusing what came before it."""
    plans = [
        planned("diffedit"), planned("diffedit", target="a cow"),
        planned("diffedit", target="a cow", mask_threshold=0.3),
        planned("diffedit", strength=0.4), planned("encode-only"), planned("user-mask"), planned("reconstruction"),
        planned("sd-inpainting"), planned("diffedit", target="a dog"), planned("mask-only"), planned("sdedit"),
        planned("masactrl"), planned("masactrl", target="a cow"), planned("direct+replay"), planned("replay"),
        planned("null-text-inversion"), planned("null-text-inversion", target="a cow"), planned("diffedit", seed=3),
    ]  # fmt: skip
    done = []
    for plan in plans:
        done.append(paid(plan, picture, reuse=[one for one in done if one.sd is MODELS[plan.system.weights]]))
    predicted = C.costs(plans)
    assert predicted == [one.evaluations for one in done]
    encoded = [one.get("encode") for one in predicted]
    assert encoded == [4, 0, 0, 0, 0, 0, 0, None, 0, 0, None, 5, 0, 0, 5, 30, 0, 0]
    assert [one["mask"] for one in predicted if "mask" in one] == [6, 3, 0, 0, 3, 0, 6]
    assert sum(sum(one.values()) for one in predicted) < sum(sum(C.cost(plan).values()) for plan in plans)


def test_many_plans_forget_the_oldest_as_results_do(picture):
    """More than a result keeps, and then the first again."""
    plans = [planned("diffedit", seed=seed, strength=0.4) for seed in range(R.MOST_CALLS + 1)] + [
        planned("diffedit", seed=0)
    ]
    done = None
    for plan in plans:
        done = paid(plan, picture, reuse=[done] if done else [])
    assert C.costs(plans)[-1] == done.evaluations and done.evaluations["mask"] == 6


def test_a_resumed_edit(picture):
    """`changed` plans what `resume` runs."""
    for method, changes in (
        ("diffedit", {"target": "a cow"}), ("diffedit", {"mask_threshold": 0.3}), ("diffedit", {"strength": 1.0}),
        ("diffedit", {"guidance_scale": 1.0}), ("masactrl", {"target": "a cow"}), ("sdedit", {"eta": 1.0}),
        ("null-text-inversion", {"target": "a cow"}), ("null-text-inversion", {"guidance_scale": 2.0}),
    ):  # fmt: skip
        first = paid(planned(method), picture)
        plan, _ = R.changed(first.plan, changes)
        assert C.costs([first.plan, plan])[1] == R.resume(first, **changes).evaluations, (method, changes)


def test_the_rows_at_the_defaults():
    """Those of every row of the table are counted in tests/test_table.py."""
    expected = {
        "diffedit": 140, "diffedit-regions": 140, "user-mask": 120, "encode-only": 120, "mask-only": 100,
        "reconstruction": 80, "sdedit": 50, "masactrl": 250, "null-text-inversion": 50 + 50 + 500 + 50 + 200,
        "replay": 150, "sd-inpainting": 100, "text-to-image": 100, "dpl": 50 + 50 * (20 + 1 + 51 + 1) + 200,
    }  # fmt: skip
    assert {method: C.rows_at_defaults(method) for method in expected} == expected


def test_counting_touches_no_generator_and_no_clock(picture):
    import torch

    state = torch.random.get_rng_state()
    plan = planned("diffedit")
    assert C.cost(plan) == C.cost(plan) and torch.equal(torch.random.get_rng_state(), state)


def test_gradients_are_counted():
    counter = C.Counter()
    R.execute(planned("null-text-inversion"), counter, Image.new("RGB", (64, 64)))
    assert counter.gradients == 5 * 3 and counter.evaluations == 5 + 5 + 15 + 5 + 20


def test_taps_and_features_see_the_sites_of_the_network():
    """Site by site what the tiny network shows, so that a method that counts them costs what it says."""
    import tiny
    import torch

    for model in (C.Counter(config=tiny.UNET), tiny.model()):
        tapped, seen = [], []

        def tap(plain, site, q, k, v, tapped=tapped):
            tapped.append((site, q.shape[2], k.shape[2]))
            return plain(site, q, k, v)

        def feature(site, h, seen=seen):
            seen.append(site)
            return h

        with torch.no_grad():
            model.eps(torch.zeros(1, 4, 8, 8), 481, [model.text(["a"]), model.text(["b"])], tap=tap, feature=feature)
        if isinstance(model, C.Counter):
            expected = tapped, seen
    assert expected == (tapped, seen) and len(tapped) == 32


# ---------------------------------------------------------------- each mistake turns a test red

MUTATIONS = {
    "no reuse": ("costs", "done[kind] = [made]", "pass", test_plans_in_a_row_pay_what_is_new),
    "other weights push out what is known": ("costs", "done[kind] = [made]", "done.clear(); done[kind] = [made]",
        test_plans_in_a_row_pay_what_is_new),
    "an empty mask is a mask": ("count_one",
        'torch.ones if read_mask(given["mask"]).any() else torch.zeros', "torch.ones",
        test_given_masks_cost_by_whether_they_hold_a_cell),
    "a text for each row": ("Counter.eps", "len(x) * len(texts)", "len(x)", test_the_rows_at_the_defaults),
    "rows with a gradient that have none": ("Counter.eps", "rows if e[-1].requires_grad else 0", "rows",
        test_gradients_are_counted),
    "no gradient flows": ("Counter.eps", "(x, *texts, *(deltas or {}).values())", "(x.detach(),)",
        test_gradients_are_counted),
    "refining stops at once": ("Counter.eps", "self.size *= 0.93", "self.size *= -2",
        test_where_a_method_may_stop_early_it_is_the_most_it_pays),
    "each call at a level is as if it were the first": ("Counter.pattern",
        "self.random(*shape).sign()", "torch.ones(shape)",
        test_where_a_method_may_stop_early_it_is_the_most_it_pays),
    "the middle block is left out": ("Counter.sites", '("mid", last, 0), *up', "*up",
        test_taps_and_features_see_the_sites_of_the_network),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, picture, monkeypatch):
    function, old, new, test = MUTATIONS[name]
    monkeypatch.setattr(sys.modules[__name__], "C", mutant(f"cost:{function}", old, new, monkeypatch))
    with pytest.raises((AssertionError, RuntimeError)):
        run(test, sd=sd, picture=picture)
