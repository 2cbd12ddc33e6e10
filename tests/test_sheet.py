"""Contact sheets: each edit is the one that `edit` makes, only what changes is paid for, and the page is whole."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import failed, ran
from PIL import Image, ImageFont
from stubs import Model, no_address

from minidiffedit import Steering, cli, contact_sheet, edit
from minidiffedit.views.layout import GAP, Page, Panel, plain, wrapped
from minidiffedit.views.sheet import costs, coverage, planned

QUICK = {"steps": 10, "maps": 2, "target": "a zebra", "source": "a horse"}
FAST = ["--target", "a zebra", "--source", "a horse", "--steps", "10", "--maps", "2"]


@pytest.fixture(scope="module")
def sd():
    return Model()


def left():
    mask = Image.new("L", (93, 75))
    mask.paste(255, (0, 0, 40, 75))
    return mask


# ---------------------------------------------------------------- what is made, and what it costs


@pytest.mark.parametrize("rows, columns, cost", [
    (("strength", (0.2, 0.8, 0.5)), ("mask_threshold", (0.3, 0.6)), (4, 8, 2 * 2 * (2 + 8 + 5))),
    (("guidance_scale", (1.0, 7.5)), ("mask_clip", (2.0, None)), (4, 8, 2 * (8 + 16))),
    (("seed", (3, 0)), ("strength", (0.5, 0.4)), (8, 5, 2 * 2 * (5 + 4))),
    (("strength", (0.0, 0.3)), ("seed", (1, 2)), (8, 3, 2 * 2 * 3)),
    (("mask_threshold", (0.5,)), ("guidance_scale", (3.0,)), (4, 8, 16)),
], ids=lambda value: str(value)[:30])  # fmt: skip
@pytest.mark.filterwarnings("ignore:nothing to edit")
def test_every_edit_is_the_one_that_edit_makes_and_only_what_changes_is_paid_for(sd, picture, rows, columns, cost):
    options = QUICK if "seed" in (rows[0], columns[0]) else QUICK | {"seed": 0}
    before = sd.evaluations
    made = contact_sheet(sd, picture, rows=rows, columns=columns, **options)
    assert tuple(made.evaluations.values()) == cost and sd.evaluations - before == sum(cost)
    found = planned("diffedit", rows, columns, **options)
    assert tuple(costs(found.plans).values()) == cost and not {rows[0], columns[0]} & {*found.settings}
    assert made.settings["method"] == "diffedit" and made.settings["sheet"] == {
        "rows": [rows[0], [*rows[1]]],
        "columns": [columns[0], [*columns[1]]],
    }
    assert [len(line) for line in made.edits] == [len(columns[1])] * len(rows[1])
    for (i, r), (j, c) in itertools.product(enumerate(rows[1]), enumerate(columns[1])):
        alone = edit(sd, picture, **options | {rows[0]: r, columns[0]: c})
        assert made.edits[i][j].settings == alone.settings
        assert torch.equal(made.edits[i][j].latent_mask, alone.latent_mask)
        assert torch.equal(made.edits[i][j].latent, alone.latent)
        assert made.edits[i][j].image.tobytes() == alone.image.tobytes()


def test_a_given_mask_and_steering_hold_for_every_edit(sd, picture):
    axes = {"rows": ("strength", (0.3, 0.6)), "columns": ("guidance_scale", (1.0, 5.0))}
    made = contact_sheet(sd, picture, **axes, mask=left(), steering=Steering(dilate=1), seed=0, **QUICK)
    assert made.evaluations == {"mask": 0, "encode": 6, "decode": 3 + 6 + 6 + 12}
    masks = [one.latent_mask for line in made.edits for one in line]
    alone = edit(sd, picture, mask=left(), steering=Steering(dilate=1), seed=0, **QUICK | {"strength": 0.3})
    assert all(torch.equal(mask, alone.latent_mask) for mask in masks)


@pytest.mark.filterwarnings("ignore:nothing to edit")
def test_empty_masks_and_equal_texts_cost_no_more_and_say_so(sd, picture):
    """An empty mask at the strongest edit does not make the encoding be paid for twice."""
    axes = {"rows": ("strength", (0.5, 0.8)), "columns": ("mask_threshold", (1.0, 0.4))}
    made = contact_sheet(sd, picture, **axes, seed=0, **QUICK)
    assert made.evaluations == {"mask": 4, "encode": 8, "decode": 2 * (5 + 8)}
    assert [one.coverage > 0 for one in made.edits[0]] == [False, True]
    same = contact_sheet(sd, picture, **axes, seed=0, **QUICK | {"source": "a zebra"})
    assert sum(same.evaluations.values()) == 0
    assert all(one.image.tobytes() == picture.tobytes() for line in same.edits for one in line)


METHODS = ("method", ("diffedit", "masactrl", "sdedit"))


def test_a_sheet_of_methods(sd, picture):
    """Each takes the options that it has, and is what `edit` makes of them; equal edits are made once."""
    options = {"steps": 10, "seed": 0, "maps": 2, "first_step": 2}
    made = contact_sheet(sd, picture, rows=("mask_threshold", (0.3, 0.6)), columns=METHODS, target="a zebra", **options)
    assert made.evaluations == {"mask": 4, "encode": 8 + 10, "decode": 2 * 16 + 40 + 10}
    assert made.edits[0][1] is made.edits[1][1] and made.edits[0][0] is not made.edits[1][0]
    own = {"diffedit": {"maps": 2, "mask_threshold": 0.6}, "masactrl": {"first_step": 2}, "sdedit": {}}
    for method, one in zip(METHODS[1], made.edits[1]):
        alone = edit(sd, picture, method, target="a zebra", steps=10, seed=0, **own[method])
        assert one.settings == alone.settings and torch.equal(one.latent, alone.latent)
    assert made.settings["first_step"] == 2 and "strength" not in made.settings  # each has its own
    plain = planned("masactrl", rows=METHODS, target="a zebra", seed=0)
    assert plain.plans[3].method == "masactrl" and [one.method for one in plain.plans[::3]] == [*METHODS[1]]


@pytest.mark.parametrize("method, arguments, rows, columns", [
    ("diffedit", {}, ("strength", (0.4, 0.6, 0.8)), ("mask_threshold", (0.3, 0.5, 0.7))),
    ("diffedit", {"strength": 0.5}, ("mask_threshold", (0.3, 0.5, 0.7)), ("guidance_scale", (3.0, 7.5, 12.0))),
    ("diffedit", {"mask": left()}, ("strength", (0.4, 0.6, 0.8)), ("guidance_scale", (3.0, 7.5, 12.0))),
    ("diffedit", {"columns": ("strength", (1,))}, ("mask_threshold", (0.3, 0.5, 0.7)), ("strength", (1,))),
    ("masactrl", {"strength": 1, "guidance_scale": 5, "steps": 20}, ("refine", [1, 2]), ("first_step", [2, 4, 6])),
    ("masactrl", {"strength": 1, "guidance_scale": 5}, ("steps", (20, 50, 100)), ("refine", [1, 2])),
    ("text-to-image", {"guidance_scale": 5, "columns": ("seed", (0, 1))}, ("steps", (20, 50, 100)), ("seed", (0, 1))),
], ids=no_address)  # fmt: skip
def test_the_usual_axes(method, arguments, rows, columns):
    found = planned(method, target="a zebra", **arguments)
    assert (found.rows, found.columns) == (rows, columns)
    assert len(found.plans) == len(rows[1]) * len(columns[1])
    assert all(one.settings[columns[0]] == value for one, value in zip(found.plans, columns[1]))


def test_a_drawn_seed_is_one_for_all_but_those_of_an_axis():
    found = planned(target="a zebra")
    assert len({one.settings["seed"] for one in found.plans}) == 1 and found.settings["seed"] >= 0
    found = planned(target="a zebra", rows=("seed", (3, 5)), columns=("strength", (0.5,)))
    assert [one.settings["seed"] for one in found.plans] == [3, 5]


FEW = ("strength", (0.5, 0.6))


@pytest.mark.parametrize("changes, word", [
    ({"rows": ("stepz", (1, 2))}, "one of method, steps"), ({"rows": ("encode_text", ("null",))}, "one of method"),
    ({"rows": FEW, "columns": FEW}, "both strength"),
    ({"rows": ("strength", ())}, "must have values"), ({"rows": ("strength", (0.5, 0.5))}, "twice"),
    ({"rows": ("strength", (0.5, 2.0))}, "strength must be"), ({"columns": ("mask_clip", (0.5,))}, "mask_clip must be"),
    ({"rows": ("seed", (-1,))}, "seed must be"), ({"rows": ("seed", range(40))}, "at most 100"),
    ({"rows": FEW, "strength": 0.5}, "stands on an axis"), ({"stepz": 1}, "no option 'stepz'"),
    ({"columns": ("mask_clip", (2, 3)), "mask": Image.new("L", (93, 75), 255)}, "given mask"),
    ({"columns": ("mask_clip", (2, 3)), "mask_clip": None}, "stands on an axis"),
    ({"columns": ("guidance_scale", ("x",))}, "guidance_scale must be"), ({"method": "diffedits"}, "no method"),
    ({"rows": ("method", ())}, "must have values"), ({"rows": ("method", ("diffedit", "x"))}, "no method 'x'"),
    ({"rows": ("method", ("sdedit", "masactrl"))}, "has no option 'maps'"),
    ({"rows": METHODS, "form": "xy"}, "form must be"),
    ({"method": "sdedit", "maps": 2}, "no option 'maps'"),
], ids=no_address)  # fmt: skip
def test_what_no_sheet_can_be_made_of(sd, picture, changes, word):
    before = sd.evaluations
    with pytest.raises(ValueError, match=word):
        contact_sheet(sd, picture, **QUICK | changes)
    assert sd.evaluations == before


def test_steering_goes_to_the_methods_that_have_a_mask(sd, picture):
    some = {"rows": ("method", ("diffedit", "masactrl")), "columns": ("guidance_scale", (2.0,)), "seed": 0}
    made = contact_sheet(sd, picture, steering=Steering(dilate=1), **some, **QUICK)
    (steered,), (plain,) = made.edits
    assert steered.steering.dilate == 1 and plain.steering is None
    with pytest.raises(ValueError, match="no mask that could be steered"):
        few = {"rows": ("guidance_scale", (2.0,)), "columns": FEW, "target": "a zebra", "steps": 2}
        contact_sheet(sd, picture, "masactrl", steering=Steering(dilate=1), **few)


# ---------------------------------------------------------------- the page


def edges(page):
    """Whether the outermost pixels are all white: nothing is cut."""
    pixels = np.asarray(page.convert("L"))
    return all((line == 255).all() for line in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


@pytest.mark.filterwarnings("ignore:nothing to edit")
def test_the_mask_that_all_share_is_shown_where_the_first_edit_has_none(sd, picture, monkeypatch):
    """At strength 0 none was sought: its empty one must not stand for those of the others."""
    heads = []
    monkeypatch.setattr(Page, "draw", lambda page: heads.append(page.head) or Image.new("RGB", (1, 1)))
    made = contact_sheet(
        sd, picture, rows=("strength", (0.0, 0.8)), columns=("guidance_scale", (3.0, 5.0)), seed=0, **QUICK
    )
    one = made.edits[1][0]
    (head,) = heads
    assert one.coverage > 0 and [panel.caption for panel in head][1:] == ["what the mask is cut from", coverage(one)]
    assert head[2].picture.tobytes() == one.mask.tobytes()


@pytest.mark.parametrize("size, height", [((128, 128), 512), ((600, 400), 192), ((64, 512), 64), ((16, 16), 192)])
def test_a_page_holds_every_picture_whole_and_cuts_no_label(size, height):
    """Each picture is of one colour, and found again with all its pixels; the same with labels and without."""
    colours = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (160, 0, 160), (0, 160, 160), (200, 160, 0)]
    pictures = [
        Panel(Image.new("RGB", size, colour), "a caption that is longer than its picture is") for colour in colours
    ]
    labels = [("an axis with a long name", "0.123456"), ("", "mask")]
    page = Page("A title " * 30, "notes " * 90, pictures[:2], [pictures[2:4], pictures[4:]], labels, labels, height)
    drawn = page.draw()
    found = np.asarray(drawn)
    scale = height / max(size)
    expected = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    places = []
    for colour in colours:
        ys, xs = np.nonzero((found == colour).all(axis=-1))
        assert (xs.max() - xs.min() + 1, ys.max() - ys.min() + 1) == expected and len(xs) == expected[0] * expected[1]
        places.append((xs.min(), ys.min()))
    head, grid = places[:2], places[2:]
    assert head[0][1] == head[1][1] < grid[0][1] == grid[1][1] < grid[2][1] == grid[3][1]
    assert grid[0][0] == grid[2][0] < grid[1][0] == grid[3][0]
    assert edges(drawn)
    bare = Page("", "", [], [pictures[2:4]], [], [], height).draw()
    assert bare.width <= max(drawn.width, 2 * GAP + 24 * max(13, height // 15)) and bare.height < drawn.height


@pytest.mark.parametrize("where", ["captions", "names", "values"])
def test_words_wider_than_their_pictures_are_neither_cut_nor_run_into_one_another(where):
    words = ["w" * 20, "w" * 30]
    panels = [Panel(Image.new("RGB", (100, 100), "white"), word if where == "captions" else "") for word in words]
    top = {"captions": [], "names": [(word, "") for word in words], "values": [("", word) for word in words]}[where]
    drawn = np.asarray(Page("", "", [], [panels], [], top, 100).draw().convert("L"))
    inked = np.nonzero((drawn < 200).any(axis=0))[0]
    apart = np.diff(inked).argmax()
    assert np.diff(inked)[apart] >= GAP - 2 and np.sort(np.diff(inked))[-2] < 5  # one gap, between the captions
    widths = apart + 1, len(inked) - apart - 1
    assert widths[1] / widths[0] == pytest.approx(1.5, rel=0.05)


def test_a_row_label_stands_beside_its_row_and_a_column_label_above_its_column():
    black = [[Panel(Image.new("RGB", (100, 100), "#0000ff")) for _ in range(2)] for _ in range(2)]
    blank = Page("", "", [], black, [("", "")] * 2, [("", "")] * 2, 100).draw()
    for axis, labels in (("left", ([("n", "v"), ("", "")], [("", ""), ("n", "v")])),
                         ("top", ([("n", "v"), ("", "")], [("", ""), ("n", "v")]))):  # fmt: skip
        where = []
        for one in labels:
            both = {"left": [("", "")] * 2, "top": [("", "")] * 2} | {axis: one}
            drawn = np.asarray(Page("", "", [], black, both["left"], both["top"], 100).draw().convert("RGB")).astype(
                int
            )
            blue = (drawn == (0, 0, 255)).all(axis=-1)
            ink = (drawn.sum(axis=-1) < 700) & ~blue
            columns, rows = np.nonzero(blue.any(axis=0))[0], np.nonzero(blue.any(axis=1))[0]
            ys, xs = np.nonzero(ink)
            assert len(xs) and (xs.max() < columns.min() if axis == "left" else ys.max() < rows.min())
            where.append((xs.mean(), ys.mean()))
        moved = np.subtract(where[1], where[0])
        assert np.allclose(moved, (0, 100 + GAP) if axis == "left" else (100 + GAP, 0), atol=1)
    assert blank.mode == "RGB"


def test_text_is_broken_at_spaces_and_shown_as_far_as_the_typeface_goes():
    font = ImageFont.load_default(14)
    text = "a photo of a horse on a grass field " * 5 + "w" * 200
    lines = wrapped(text, font, 150)
    assert all(font.getlength(line) <= 150 for line in lines) and "".join(lines).replace(" ", "") == text.replace(
        " ", ""
    )
    assert plain("un café à Zürich, 馬") == "un cafe a Zurich, ?" and wrapped("", font, 50) == []
    assert wrapped("wide", font, 1) == list("wide")


def test_what_the_page_shows(sd, picture):
    """The masks stand along the axis that changes them: a row more, or a column more."""
    wide = {"rows": ("strength", (0.3, 0.6)), "columns": ("mask_threshold", (0.2, 0.5))}
    tall = {"columns": wide["rows"], "rows": wide["columns"]}
    one, other = (contact_sheet(sd, picture, seed=0, **QUICK, **axes).image for axes in (wide, tall))
    assert one.mode == "RGB" and one.height > other.height and edges(one) and edges(other)
    large = contact_sheet(sd, picture, seed=0, **QUICK, **wide, height=256).image
    assert large.width > one.width


# ---------------------------------------------------------------- the command


@pytest.fixture
def here(tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    left().save("m.png")
    return tmp_path


def test_the_command_says_the_cost_before_and_writes_the_page_and_the_edits(here, folder, capsys):
    command = ["sheet", "in.png", *FAST, "--rows", "strength=.3,.6", "--columns", "mask-clip=2,none", "--seed", "0"]
    command += ["--quiet"]
    before = {p.name for p in here.iterdir()}
    planned = ran(capsys, *command, "--dry-run", "--model", "no-such-model")
    assert planned["evaluations"] == {"mask": 4, "encode": 6, "decode": 2 * 2 * (3 + 6)}
    assert {p.name for p in here.iterdir()} == before
    done = ran(capsys, *command, "--save-edits", "edits", "--model", folder)
    assert done["evaluations"] == planned["evaluations"] and done["output"] == "in-sheet.png"
    assert done["settings"]["sheet"] == {"rows": ["strength", [0.3, 0.6]], "columns": ["mask_clip", [2.0, None]]}
    assert np.shape(done["coverage"]) == (2, 2) and done["edits"] == "edits" and done["settings"]["model_hash"]
    names = [f"strength-{r}-mask-clip-{c}.png" for r in ("0.3", "0.6") for c in ("2", "none")]
    assert sorted(p.name for p in Path("edits").iterdir()) == names
    single = ["edit", "in.png", *FAST, "--seed", "0", "--strength", ".6", "--mask-clip", "none", "-o", "one.png"]
    ran(capsys, *single, "--model", folder)
    assert Path("one.png").read_bytes() == Path("edits", names[3]).read_bytes()
    with Image.open("in-sheet.png") as page:
        assert json.loads(page.text["minidiffedit"])["sheet"] == done["settings"]["sheet"]
    assert cli.main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("UNet rows 4 + 6 + 36 (mask, encode, decode) = 46\n")


def test_an_erased_part_is_the_mask_of_all(here, folder, capsys):
    with Image.open("in.png") as file:
        hole = file.convert("RGBA")
    hole.paste((0, 0, 0, 0), (20, 10, 50, 40))
    hole.save("h.png")
    axes = ["--rows", "strength=.3", "--columns", "guidance-scale=1,4", "--model", folder]
    assert ran(capsys, "sheet", "h.png", *FAST, *axes)["evaluations"]["mask"] == 0


def test_a_drawn_seed_and_a_given_mask(here, folder, capsys):
    axes = ["--rows", "strength=.3", "--columns", "guidance-scale=1,4"]
    done = ran(capsys, "sheet", "in.png", *FAST, *axes, "--mask", "m.png", "--no-metadata", "--model", folder)
    assert done["settings"]["seed"] >= 0 and len(done["settings"]["mask"]) == 10
    assert done["evaluations"] == {"mask": 0, "encode": 3, "decode": 9}
    with Image.open("in-sheet.png") as page:
        assert not page.text


@pytest.mark.parametrize("options, word", [
    (["--rows", "strength=.5,.5"], "twice"), (["--rows", "seed=1", "--columns", "seed=2"], "both"),
    (["--rows", "strength=2"], "strength"), (["--strength", ".5", "--rows", "strength=.5"], "stands on an axis"),
    (["-o", "in.png"], "overwrite"), (["-o", "a.gif"], "end in"), (["--rows", "x=1"], "an axis"),
    (["--rows", "strength=a,b"], "a number"), (["--rows", "seed=1.5"], "whole number"), (["--rows", "seed="], "whole"),
    (["--columns", "mask-clip=2,,3"], "a number or none"),
    (["--mask", "m.png", "--rows", "mask-clip=2"], "given mask"),
    (["--height", "10"], "height"), (["--steps", "0"], "steps"),
    (["--columns", "seed=1,2", "--seed", "0"], "stands on an axis"), (["--save-edits", "in.png"], "is a file"),
    (["--save-edits", "."], "not empty"), (["--save-edits", "no/where"], "no folder"), (["--maps", "0"], "maps"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_the_model_is_loaded(here, capsys, options, word):
    before = {p.name for p in here.iterdir()}
    assert word in failed(capsys, "sheet", "in.png", *FAST, *options, "--model", "no-such-model")
    assert {p.name for p in here.iterdir()} == before


@pytest.mark.parametrize("axis, word", [("strength", "wanted"), ("method=diffedit,edit", "no method 'edit'")])
def test_an_axis_that_is_none_is_misuse(here, capsys, axis, word):
    with pytest.raises(SystemExit) as exit:
        cli.main(["sheet", "in.png", *FAST, "--rows", axis])
    assert exit.value.code == 2 and word in capsys.readouterr().err


def test_methods_side_by_side_from_the_shell(here, folder, capsys):
    """Options of any of them can be said; the names of the files say which is which."""
    command = ["sheet", "in.png", "--target", "a zebra", "--steps", "4", "--maps", "2", "--seed", "0", "--eta", "1"]
    command += ["--rows", "method=diffedit,sdedit", "--columns", "guidance-scale=1,3", "--quiet"]
    planned = ran(capsys, *command, "--dry-run", "--model", "no-such-model")
    done = ran(capsys, *command, "--save-edits", "edits", "--model", folder)
    assert done["evaluations"] == planned["evaluations"] == {"mask": 4, "encode": 3, "decode": 3 + 6 + 2 + 4}
    assert done["rows"] == {"predicted": 22, "paid": 22} and done["settings"]["eta"] == 1
    names = [f"method-{m}-guidance-scale-{g}.png" for m in ("diffedit", "sdedit") for g in ("1", "3")]
    assert sorted(p.name for p in Path("edits").iterdir()) == names
