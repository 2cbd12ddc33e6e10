"""No loop waits for the device: a run of more steps reads no value and copies no number more often than one of few."""

import pytest
import tiny
import torch
from mutants import mutant
from stubs import gaussian, latent
from waits import Waits

import minidiffedit.diffedit as page
from minidiffedit import edit, fast
from minidiffedit.cost import CELLS, Counter, count_one
from minidiffedit.methods.table import SYSTEMS
from minidiffedit.run import GIVEN, blank_plan, plan

FEW, MANY = 5, 10
# What stops when a value is near enough, or follows one, must look at it in every step, beside a gradient that takes
# longer; by method, where. No method without gradients does.
NULL_TEXT = "null_text:optimised"
LOOKS = {
    "null-text-inversion": {NULL_TEXT}, "mag-edit": {NULL_TEXT}, "baret": {NULL_TEXT},
    "dpl": {NULL_TEXT, "dpl:maps", "dpl:put", "dpl:unseen"}, "style-diffusion": {"style_diffusion:style_diffusion"},
    "drag-diffusion": {"drag:tracked"}, "drag-noise": {"drag:tracked"},
}  # fmt: skip


def counted(call):
    with Waits() as waits:
        call()
    return waits.places


def grown(few, many):
    return {place for place, count in many.items() if count > few[place]}


def of_method(name, steps):
    """The places at which a run on the counting model waits; steps: of the method, or its iterations."""
    blank = blank_plan(name)
    made_up = {"mask": torch.ones(1, 1, CELLS, CELLS), "pairs": [["a cat", "a dog"]], "points": "0,0=>63,63"}
    wanted = {*blank.needs, "target", "source"} & blank.given.keys()
    given = {one: made_up.get(GIVEN[one].kind, f"a photo of a {one}") for one in wanted}
    given |= {one: steps for one in ("steps", "iterations", "updates") if one in blank.options}
    settled = plan(name, seed=0, **given)
    return counted(lambda: count_one(settled, Counter(settled.system.weights), []))


def test_what_must_look_has_gradients():
    assert all(SYSTEMS[name].letter == "B" for name in LOOKS)


@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.edit])
def test_no_step_of_a_method_waits(name):
    assert grown(of_method(name, FEW), of_method(name, MANY)) == LOOKS.get(name, set())


def whole(sd, steps):
    made = {"target": "a zebra", "source": "a horse", "maps": steps, "seed": 0}
    return counted(lambda: edit(sd, tiny.picture(), steps=steps, **made))


def test_no_step_of_an_edit_waits():
    """The networks too: DiffEdit on a whole model, more maps and more steps."""
    sd = tiny.model()
    assert not grown(whole(sd, FEW), whole(sd, MANY))


def test_no_step_around_a_compiled_network_waits():
    """What is compiled stands in for itself: a graph would be traced with the counting in it."""
    sd = tiny.model()
    sd.unet = fast.CompiledUNet(tiny.networks(unet=tiny.SHALLOW)[0], backend="eager")
    sd.unet.graph = sd.unet.unet
    whole(sd, FEW)  # the first calls of each shape
    assert not grown(whole(sd, FEW), whole(sd, MANY))


def encoding(steps, refine=1, module=page):
    return counted(lambda: module.encode(gaussian, latent(1, 4, 4, 4), 0.5, steps=steps, refine=refine))


def test_the_encoding_asks_only_where_it_decides():
    assert not grown(encoding(FEW), encoding(MANY))
    assert grown(encoding(FEW, 3), encoding(MANY, 3)) == {"diffedit:encode"}


MISTAKES = {
    "asked at refine 1": ("diffedit", "if left and not closer.any()", "if not closer.any()"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_seen(name, monkeypatch):
    module = mutant(*MISTAKES[name], monkeypatch)
    assert grown(encoding(FEW, module=module), encoding(MANY, module=module))


NEW = pytest.mark.skipif(torch.__version__ < (2, 13), reason="2.3 shows no operation in it that could be known")


@pytest.mark.parametrize("call", [
    lambda x: bool(x.any()), lambda x: x.max().item(), lambda x: float(x[0]), lambda x: x.tolist(),
    pytest.param(lambda x: x[x > 0], marks=NEW), lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: x.numpy(),
    lambda x: torch.tensor([3], device=x.device), lambda x: torch.as_tensor(3, device=x.device),
])  # fmt: skip
def test_what_waits_is_seen(call):
    assert sum(counted(lambda: call(torch.ones(3))).values()) == 1


@pytest.mark.parametrize("call", [
    lambda x: torch.full((1,), 3, device=x.device), lambda x: x.to(torch.float64), lambda x: torch.where(x > 0, x, 0),
    lambda x: int(torch.randint(0, 9, (), generator=torch.Generator())), lambda x: x[1:], lambda x: len(x),
])  # fmt: skip
def test_what_does_not_wait_is_not_counted(call):
    assert not counted(lambda: call(torch.ones(3)))
