"""The table of systems: no name of the field is missing, each row says what it is, and what is L1 has what L1 asks."""

import inspect
import json
import re
from pathlib import Path

import pytest
import test_cost

from minidiffedit import run as R
from minidiffedit.cost import rows_at_defaults
from minidiffedit.methods.table import INVERSIONS, MASKS, SYSTEMS

# The names of the survey's table 1 (2402.17525) in its order, and those that the field mentions beside it.
SURVEY = """
diffusion-clip paint-by-example dream-inpainter instruct-pix2pix moe-controller magicbrush hive null-text-inversion dpl
dds imagic sine style-diffusion style-diffusion-wang drag-diffusion masactrl drag-noise prompt-to-prompt plug-and-play
tic-inversion baret ti-guided-edit tf-icon mag-edit cds kv-inversion pnp-inversion direct-inversion edit-friendly-ddpm
disentanglement null-text-guidance negative-prompt-inversion proxedit blended-diffusion blended-latent-diffusion
pfb-diff diffedit watch-your-steps mfl instructedit inpaint-anything
""".split()  # noqa: SIM905
OTHERS = """
sdedit ledits++ sde-drag sde-diffedit dragon-diffusion cross-image-attention latent-inversion noise-diffusion sds sige
drag-gan b-lora controlnet++ glide sora cyclegan ct-dual-stream controlnet replay sd-inpainting text-to-image
""".split()  # noqa: SIM905
# Those that change latents, predictions or noises alone, on plain weights, without training (class A).
LATENT_LEVEL = """
pnp-inversion direct-inversion edit-friendly-ddpm null-text-guidance negative-prompt-inversion proxedit diffedit replay
blended-latent-diffusion sdedit ledits++ sde-drag sde-diffedit noise-diffusion cycle-diffusion edict text-to-image
""".split()  # noqa: SIM905
ARMS = ["diffedit-regions", "user-mask", "encode-only", "mask-only", "reconstruction"]
WORKING = [name for name, system in SYSTEMS.items() if system.edit]
PLACES = {*INVERSIONS.values(), *MASKS.values(), *(system.edit for system in SYSTEMS.values() if system.edit)}


def test_no_name_of_the_field_is_missing():
    assert len(SURVEY) == 39 + 2  # StyleDiffusion and PnP / Direct Inversion are two papers each
    missing = {*SURVEY, *OTHERS, *ARMS} - SYSTEMS.keys()
    assert not missing, missing
    assert len(set(SURVEY + OTHERS + ARMS)) == len(SURVEY + OTHERS + ARMS)


def test_what_works_on_latents_alone_works():
    assert {name: SYSTEMS[name].status for name in LATENT_LEVEL} == dict.fromkeys(LATENT_LEVEL, "L1")
    assert all(SYSTEMS[name].letter == "A" and SYSTEMS[name].weights == "base" for name in LATENT_LEVEL)


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_row_says_what_it_is(name):
    row = SYSTEMS[name]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*(\+\+)?", name), name
    assert row.paper and (re.fullmatch(r"\d{4}\.\d{5}", row.paper) or not row.paper[0].isdigit())
    assert row.letter in "ABCD" and row.weights in ("base", "inpainting", "instruct", "example")
    assert row.status in ("L1", "L2", "L3", "todo", "blocked") and bool(row.edit) == row.status.startswith("L")
    assert row.edit or row.note, "a row that does not work says why"
    assert row.inversion in (*INVERSIONS, "") and row.mask in (*MASKS, "")
    assert not row.edit or set(row.options) <= R.blank_plan(name).options.keys()


@pytest.mark.parametrize("name", WORKING)
def test_a_row_fits_its_function(name):
    """A path where the editor takes one, a mask where one is named."""
    row, inputs = SYSTEMS[name], R.inputs_of(SYSTEMS[name].edit)
    assert bool(row.inversion) == ("path" in inputs)
    assert not row.mask or "mask" in inputs
    assert test_cost.planned(name)  # the smallest plan of it can be made


@pytest.mark.parametrize("place", sorted(PLACES))
def test_each_function_says_its_paper_and_its_cost(place):
    function = R.function_at(place)
    said = f"{inspect.getdoc(inspect.getmodule(function))}\n{inspect.getdoc(function)}"
    assert re.search(r"\d{4}\.\d{5}", said), f"{place} names no paper"
    assert re.search(r"[Mm]odel\s+rows", said), f"{place} says nothing of its model rows"


@pytest.mark.parametrize("name", WORKING)
def test_the_paper_of_a_row_stands_in_its_code(name):
    """Or the row says what it is beside it."""
    row = SYSTEMS[name]
    functions = [R.function_at(place) for place in R.blank_plan(name).functions.values()]
    said = " ".join(f"{inspect.getdoc(inspect.getmodule(one))} {inspect.getdoc(one)}" for one in functions)
    assert row.paper in said or row.note, f"{name}: {row.paper} is nowhere explained"


def test_rows_name_inversions_and_masks_that_there_are():
    assert {system.inversion for system in SYSTEMS.values()} - {""} <= set(INVERSIONS)
    assert {system.mask for system in SYSTEMS.values()} - {""} <= set(MASKS)


def test_the_methods_command_and_the_page_come_from_it(capsys):
    import json

    from minidiffedit import cli

    assert cli.main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [*SYSTEMS]
    for row in rows:
        assert {"name", "paper", "class", "status", "weights", "needs", "rows"} <= row.keys()
        assert (row["rows"] is None) == (not SYSTEMS[row["name"]].edit)
    for name in ("masactrl", "direct+replay"):
        assert cli.main(["methods", name, "--json"]) == 0
        one = json.loads(capsys.readouterr().out)
        assert one["name"] == name and set(one["options"]) == set(R.blank_plan(name).options) and one["about"]
    for name, said in (("masactrl", "arXiv 2304.08465, L1, base weights"), ("sora", "OpenAI, 2024, blocked"),
                       ("glide", "arXiv 2112.10741, blocked")):  # fmt: skip
        assert cli.main(["methods", name]) == 0 and capsys.readouterr().out.startswith(f"{name}: {said}\n")
    assert cli.main(["methods", "masactrll"]) == 1 and "did you mean 'masactrl'" in capsys.readouterr().err
    assert cli.main(["methods", "--markdown"]) == 0
    table = capsys.readouterr().out.strip()
    page = (Path(R.__file__).parent / "methods" / "README.md").read_text()
    assert table in page, "minidiffedit/methods/README.md: put the output of `minidiffedit methods --markdown` in"


def test_the_rows_that_are_stored_are_those_of_the_table():
    stored = json.loads((Path(R.__file__).parent / "data" / "rows.json").read_text())
    assert stored.keys() == {repr(system) for system in SYSTEMS.values() if system.edit}, "run `make table`"


@pytest.mark.slow
@pytest.mark.parametrize("dear", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_rows_that_are_stored_are_counted(dear):
    """Those of a thousand rows take longest; that they pay what is predicted test_cost asserts in few steps."""
    stored = json.loads((Path(R.__file__).parent / "data" / "rows.json").read_text())
    some = {name: rows for name, one in SYSTEMS.items() if one.edit and ((rows := stored[repr(one)]) > 700) == dear}
    assert len(some) > 8 and all(some.values()) and some == {name: rows_at_defaults(name) for name in some}
