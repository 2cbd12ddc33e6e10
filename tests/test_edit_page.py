"""The page of `minidiffedit ui` without a browser: what a visitor has, runs, costs, files; tests/browser drives it."""

import asyncio
import gc
import io
import itertools
import json
import shlex
import sys
import threading
import time
import warnings
import weakref
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from minidiffedit import StableDiffusion, Steering, cli, edit, find_mask
from minidiffedit.files.images import latent_mask, read_picture, write_picture
from minidiffedit.methods.table import SYSTEMS
from minidiffedit.page import visit as visits
from minidiffedit.page.runs import Choice, Ended, NeedsModel, Seen, Stopped, Studio, Watcher, hearing
from minidiffedit.page.ui import Local, Page, Setup, planned
from minidiffedit.page.visit import Visit, settings_of, settle, strokes
from minidiffedit.run import blank_plan, execute, execute_mask, plan

QUICK = {"steps": 10, "maps": 2, "target": "a zebra", "source": "a horse", "seed": 3}


@pytest.fixture(scope="module")
def loaded(folder):
    return StableDiffusion.load(folder, device="cpu")


@pytest.fixture
def visit(tmp_path):
    (tmp_path / "server").mkdir()
    one = Visit(tmp_path / "server")
    tiny.picture().save(tmp_path / "a photo.png")
    one.take(tmp_path / "a photo.png")
    return one


def found_by(visit, sd, **options):
    visit.found = execute_mask(plan("diffedit", **QUICK | options), sd, visit.photo)
    return visit.found


# ---------------------------------------------------------------- from controls to a plan


def runnable():
    return [name for name, one in SYSTEMS.items() if one.edit and name != "text-to-image"]


@pytest.mark.parametrize("method", runnable())
def test_controls_left_alone_ask_for_the_defaults(method, tmp_path):
    """What a box shows of a default (no number for none, floats for whole ones) comes back as that default."""
    blank = blank_plan(method)
    tiny.picture().save(tmp_path / "other.png")
    tiny.box().save(tmp_path / "mask.png")
    given = {"mask": tmp_path / "mask.png", "reference": tmp_path / "other.png", "edits": "a=>b", "points": "1,2=>3,4"}
    said = {name: given.get(name, f"a {name}") if name in blank.needs else "" for name in blank.given}
    said |= dict.fromkeys([name for name in ("mask", "reference", "reference_mask") if name not in blank.needs])
    for name, value in blank.settings.items():
        one = blank.options[name]
        said[name] = "none" if value is None and one.choices else float(value) if one.type is int and value else value
    said["seed"] = 7.0
    settled, files = settle((method, None, None), said)
    assert settled.settings == blank.settings | {"seed": 7} and settled.functions == blank.functions
    assert set(files) == {"mask", "reference", "reference_mask"} & set(blank.needs)
    assert {type(v) for v in settled.settings.values()} <= {int, float, bool, str, type(None)}


def test_what_controls_say_wrongly_is_a_sentence():
    for said, words in [
        ({"target": "a zebra", "steps": 0}, "steps must be"),
        ({"target": ""}, "needs target"),
        ({"target": "a zebra", "mask_threshold": "much"}, "must be a number"),
        ({"target": "a zebra", "sampler": "euler"}, "must be one of"),
    ]:
        with pytest.raises(ValueError, match=words):
            settle(("diffedit", None, None), said)
    with pytest.raises(ValueError, match="did you mean 'diffedit'"):
        settle(("diffedt", None, None), {})
    assert (
        settle(("diffedit", None, "words:horse"), {"target": "a", "source": "a horse"})[0].settings["mask_words"]
        == "horse"
    )
    assert settle(("replay", "direct", None), {"target": "a", "source": "b"})[0].method == "direct+replay"


def test_an_erased_part_is_the_mask(tmp_path):
    picture = tiny.picture().convert("RGBA")
    picture.paste((0, 0, 0, 0), (20, 10, 50, 40))
    picture.save(tmp_path / "hole.png")
    with pytest.warns(UserWarning, match="erased"):
        settled, files = settle(("diffedit", None, None), {"target": "a zebra", "mask": None}, tmp_path / "hole.png")
    assert files == {"mask": tmp_path / "hole.png"} and settled.given["mask"].size == (93, 75)


# ---------------------------------------------------------------- the mask


def test_another_threshold_clip_or_shape_pays_no_row_and_is_the_librarys(visit, loaded):
    found = found_by(visit, loaded)
    assert found.evaluations == {"mask": 4}
    before = loaded.evaluations
    for threshold, clip, shaping in [
        (0.2, 3.0, {}),
        (0.7, None, {"dilate": 1}),
        (0.4, 1.5, {"invert": True, "feather": 2}),
    ]:
        settled = plan("diffedit", **QUICK, mask_threshold=threshold, mask_clip=clip)
        made = visit.mask(settled, Steering(**shaping), loaded)
        assert made.rows == 0 and loaded.evaluations == before
        x0, texts = found.x0, [loaded.text([QUICK[name]]) for name in ("target", "source")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = find_mask(
                lambda *a: loaded.eps(*a), x0, *texts, steps=10, maps=2, seed=3, threshold=threshold, clip=clip
            )
        before = loaded.evaluations
        assert torch.equal(made.latent_mask, Steering(**shaping)(own.mask.float()))
    with pytest.raises(NeedsModel):  # other maps
        visit.mask(plan("diffedit", **QUICK | {"maps": 3}), Steering(), loaded)
    with pytest.raises(NeedsModel):
        visit.mask(plan("diffedit", **QUICK | {"target": "a cow"}), Steering(), loaded)
    with pytest.raises(NeedsModel):
        visit.mask(plan("diffedit", **QUICK, size=72), Steering(), loaded)
    assert loaded.evaluations == before


def painted(colour, box):
    layer = Image.new("RGBA", (93, 75))
    layer.paste(colour, box)
    return layer


def test_strokes_add_and_take_away(visit, loaded):
    added, gone = painted((255, 88, 20, 255), (40, 30, 60, 50)), painted((20, 80, 255, 255), (50, 30, 93, 75))
    both = Image.alpha_composite(added, gone)
    made = strokes([both], (93, 75))
    assert strokes([added, gone], (93, 75)) == made  # on one layer or on two
    assert np.asarray(made["union"])[40, 45] == 255 and np.asarray(made["union"])[40, 55] == 0
    assert np.asarray(made["subtract"])[40, 55] == 255 and np.asarray(made["subtract"]).sum() == 255 * 43 * 45
    assert strokes([Image.new("RGBA", (93, 75))], (93, 75)) == {} and strokes([], (93, 75)) == {}
    assert strokes([painted((255, 88, 20, 90), (0, 0, 9, 9))], (93, 75)) == {}  # hardly there
    small = strokes([both.resize((46, 37), Image.NEAREST)], (93, 75))
    assert small["union"].size == (93, 75)
    found = found_by(visit, loaded)
    M = visit.mask(plan("diffedit", **QUICK), Steering(**made), loaded).latent_mask
    union, subtract = (latent_mask(made[name], (93, 75), (80, 64)) for name in ("union", "subtract"))
    assert torch.equal(M, torch.minimum(torch.maximum(found.latent_mask, union), 1 - subtract))
    visit.found = None
    M = visit.mask(plan("diffedit", **QUICK), Steering(**made), loaded)
    assert torch.equal(M, torch.minimum(union, 1 - subtract))
    assert visit.mask(plan("diffedit", **QUICK), Steering(), loaded) is None


def test_each_of_several_edits_has_its_own_part(visit, loaded):
    """As the method itself keeps them apart; what is known is not paid again."""
    told = {"steps": 10, "maps": 2, "seed": 3, "edits": "a horse=>a zebra; grass=>sand"}
    with pytest.warns(UserWarning, match="edit 2 leaves 12 of its 16 cells"):
        visit.found = execute_mask(plan("diffedit-regions", **told), loaded, visit.photo)
    found = visit.mask(plan("diffedit-regions", **told), None, loaded)
    shown = visits.own_parts(found)
    parts, heats = shown[::2], shown[1::2]
    assert found.rows == 0 and [text.split(": ")[0] for _, text in parts] == ["a horse → a zebra", "grass → sand"]
    assert [text for _, text in heats] == ["a horse → a zebra: heat map", "grass → sand: heat map"]
    cells = [int((M > 0).sum()) for M in found.found.each]
    assert [f", {n} of 80 cells" in text for n, (_, text) in zip(cells, parts)] == [True, True] and min(cells) > 0
    for one, (heat, _) in zip(found.found.found, heats):
        assert np.array_equal(np.asarray(heat), np.asarray(visits.heat_picture(one.heat, (93, 75))))
    for M, (picture, _) in zip(found.found.each, parts):
        changed = (np.asarray(picture).astype(int) != np.asarray(visit.picture)).any(axis=2)
        inside = np.asarray(Image.fromarray(M[0, 0].numpy()).resize((93, 75), Image.Resampling.NEAREST)) > 0
        assert changed[inside].any() and not changed[~inside].any()
    before = loaded.evaluations
    with pytest.warns(UserWarning, match="edit 2 leaves"):
        lower = visit.mask(plan("diffedit-regions", **told, mask_threshold=0.3), None, loaded)
    assert lower.rows == 0 and loaded.evaluations == before  # the slider is live for every edit's part
    assert int((lower.found.each[0] > 0).sum()) > cells[0]
    with pytest.raises(NeedsModel):
        visit.mask(plan("diffedit-regions", **told | {"edits": "a horse=>a cow; grass=>sand"}), None, loaded)
    assert visits.own_parts(found_by(visit, loaded)) == []


def test_places_of_a_drag_are_clicked_and_drawn():
    assert visits.places_of("1,2=>3.5,4; 5,6=>") == [(1, 2), (3.5, 4), (5, 6)] and visits.places_of(None) == []
    text = visits.points_of([(1, 2), (3.5, 4), (5, 6)])
    assert text == "1,2=>3.5,4; 5,6" and visits.points_of([]) == ""
    picture = Image.new("RGB", (100, 50))
    drawn = np.asarray(visits.arrows(picture, [(10, 25), (60, 25), (80, 40)]))
    assert drawn.shape == (320, 640, 3) and visits.clicked(picture, (320, 160)) == (50, 25)
    assert visits.clicked(picture, (9999, -3)) == (99, 0)
    assert (drawn[160, 64] == visits.TINT).all() and (drawn[160, 200] == visits.TINT).all()  # the dot, the shaft
    assert (drawn[[154, 166], [374, 374]] == visits.TINT).all()  # both halves of the head
    assert (drawn[256, 512] == visits.TINT).all() and not drawn[160, 512].any()  # the pending one; nothing beside
    assert not np.asarray(visits.arrows(picture, [])).any()
    assert np.asarray(visits.arrows(picture, [(5, 5), (5, 5)])).any()  # to where it is
    with pytest.raises((TypeError, ValueError)):
        visits.clicked(picture, ("a", None))


# ---------------------------------------------------------------- results, made again to the same bytes


def painted_mask(visit, sd):
    """As the page paints: the mask that is shown goes into a file."""
    found_by(visit, sd)
    settled, layer = plan("diffedit", **QUICK), painted((255, 88, 20, 255), (0, 0, 40, 40))
    M = visit.mask(settled, Steering(**strokes([layer], (93, 75)), dilate=1), sd).latent_mask
    path = visit.mask_file(M)
    return plan("diffedit", **QUICK, mask=read_picture(path)), None, {"mask": path}


def kinds(visit, sd, tmp_path):
    other = tmp_path / "other.png"
    tiny.picture().rotate(90).save(other)
    plain = {name: QUICK[name] for name in ("steps", "target", "source", "seed")}
    return {
        "plain": (plan("diffedit", **QUICK), None, {}),
        "steered": (
            plan("diffedit", **QUICK, mask_threshold=0.3, mask_clip=None),
            Steering(dilate=-1, largest=True),
            {},
        ),
        "painted": painted_mask(visit, sd),
        "words": (plan("words+diffedit", **plain | {"source": "a horse on grass"}, mask_words="horse"), None, {}),
        "masactrl": (plan("masactrl", **plain), None, {}),
        "sdedit": (plan("sdedit", steps=10, target='it\'s "a" $zebra\n', seed=3), None, {}),
        "pairs": (plan("diffedit-regions", steps=10, maps=2, seed=3, edits="a horse=>a zebra; grass=>sand"), None, {}),
        "reference": (
            plan("noise-diffusion", steps=10, seed=3, target="a", reference=other),
            None,
            {"reference": other},
        ),
    }


@pytest.mark.parametrize("kind", ["plain", "steered", "painted", "words", "masactrl", "sdedit", "pairs", "reference"])
def test_command_and_python_make_the_same_bytes(visit, loaded, folder, tmp_path, monkeypatch, kind):
    """Both texts run where the files are, after a run of the page that reused the mask it had found."""
    try:
        settled, steering, files = kinds(visit, loaded, tmp_path)[kind]
    except ValueError as error:
        pytest.fail(str(error))
    found_by(visit, loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = execute(settled, loaded, visit.photo, steering=steering, reuse=visit.known(loaded, None), bitwise=True)
    model = ["--model", str(folder), "--device", "cpu"], f"StableDiffusion.load({str(folder)!r}, device='cpu')"
    made = visit.keep(done, files, model, "about")
    wanted = made.picture.read_bytes()
    place = tmp_path / "elsewhere"
    place.mkdir()
    for file in (visit.photo, *made.files[1:], *files.values()):
        (place / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(place)
    words = shlex.split(made.command)
    assert words[0] == "minidiffedit" and str(tmp_path / "server") not in made.command
    assert cli.main([*words[1:], "--quiet"]) == 0
    assert (place / made.picture.name).read_bytes() == wanted
    (place / made.picture.name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(made.python, {})
    assert (place / made.picture.name).read_bytes() == wanted


def test_a_results_picture_gives_its_settings_back(visit, loaded):
    settled = plan(
        "direct+words+diffedit",
        **{n: QUICK[n] for n in ("steps", "target", "seed")},
        source="a horse",
        mask_words="horse",
    )
    done = execute(settled, loaded, visit.photo, steering=Steering(feather=1, invert=True))
    made = visit.keep(done, {}, ([], ""), "")
    choices, said = settings_of(made.picture)
    assert choices == ("diffedit", "direct", "words") and (said["feather"], said["invert"], said["dilate"]) == (
        1,
        True,
        0,
    )
    again, _ = settle(choices, {name: one for name, one in said.items() if name in settled.given | settled.settings})
    assert again.record == settled.record
    tiny.picture().save(visit.folder / "plain.png")
    with pytest.raises(ValueError, match="holds no settings"):
        settings_of(visit.folder / "plain.png")


def test_state_and_report_come_when_they_are_asked_for(visit, loaded):
    with pytest.raises(ValueError, match="no result yet"):
        visit.whole()
    visit.keep(edit(loaded, visit.photo, **QUICK), {}, ([], ""), "")
    names = [file.suffix for file in visit.whole().files]
    assert names == [".png", ".png", ".safetensors", ".html"] and visit.whole().files[-1].stat().st_size > 10_000
    assert len(visit.whole().files) == 4  # asked for twice, written once


def test_history_keeps_files_and_lets_go_of_old_latents(visit, loaded, tmp_path):
    """Of all visitors together, so that many of them fit: the first visitor's first results go first."""
    other = Visit(tmp_path / "server")
    other.take(visit.photo)
    alive = []
    for seed in range(8):
        one, known = (visit, other)[seed % 2], visit.known(loaded, None)
        done = execute(plan("diffedit", **QUICK | {"seed": seed}), loaded, one.photo, reuse=known, bitwise=True)
        alive.append(weakref.ref(one.keep(done, {}, ([], ""), "").result))
        visits.let_go([visit, other], 3)
        del done, known
    gc.collect()
    assert [one() is not None for one in alive] == [False] * 3 + [True, False, True, False, True]
    assert all(one.picture.exists() for one in (*visit.made, *other.made)) and len(visit.made) == 4
    assert max(len(one.result.calls) for one in other.made if one.result) <= 32
    visit.shown = visit.made[0]
    with pytest.raises(ValueError, match="only the picture"):
        visit.whole()


def test_another_model_comes_when_the_last_has_left_the_memory(visit, folder, tmp_path):
    """Whatever visitors had found and made with it."""
    models = []

    def load(choice):
        gc.collect()
        assert not any(one() for one in models)
        models.append(weakref.ref(sd := StableDiffusion.load(folder, device="cpu")))
        return sd

    studio, settled = Studio(load, Choice("a")), plan("diffedit", **QUICK)
    page = Page(studio, Setup(["a", "b"], "", [], lambda _: ([], ""), None), tmp_path)
    page.visits["me"] = visit
    for name in ("a", "b", "a"):
        (ended,) = studio.run(threading.Event(), Choice(name), lambda sd, watch: execute(settled, sd, visit.photo))
        visit.found = ended.made
        visit.keep(ended.made, {}, ([], ""), "")
        del ended
        assert studio.held(Choice(name)) is visit.found.sd and studio.held(Choice("c")) is None
    assert len(models) == 3 and [one.result is None for one in visit.made] == [True, True, False]
    with pytest.raises(NeedsModel):  # a choice that is not in memory: the mask that is known is not its own
        visit.mask(settled, None, studio.held(Choice("b")))


def test_who_was_here_longest_ago_is_forgotten_first(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("minidiffedit.page.ui.MOST_VISITS", 2)
    setup = Setup(["mini"], "", [], lambda _: ([], ""), None)
    page = Page(Studio(lambda _: loaded, Choice("mini")), setup, tmp_path)
    asks = [SimpleNamespace(session_hash=name) for name in "abc"]
    first, second = page.visit(asks[0]), page.visit(asks[1])
    assert page.visit(asks[0]) is first  # who comes again is no stranger
    page.visit(asks[2])
    assert [*page.visits] == ["a", "c"] and second.stop.is_set() and not second.folder.exists()


def test_other_methods_take_what_is_said_and_the_second_reuses_what_the_first_paid(visit, loaded):
    settled = plan("masactrl", target="a zebra", source="a horse", steps=10, first_step=1, seed=3)
    first, second, third = planned(settled, 1, ["prompt-to-prompt", "sdedit", "masactrl"])
    assert first is settled and (second.method, third.method) == ("prompt-to-prompt", "sdedit")
    assert {one.settings["steps"] for one in (second, third)} == {10} and third.given["target"] == "a zebra"
    assert second.settings["seed"] == 3 and "first_step" not in second.settings
    made = execute(first, loaded, visit.photo, bitwise=True)
    again = execute(second, loaded, visit.photo, reuse=[made], bitwise=True)
    assert made.evaluations["encode"] > 0 and not again.evaluations.get("encode")
    assert [one.settings["seed"] for one in planned(plan("diffedit", **QUICK), 3, [])] == [3, 4, 5]
    with pytest.raises(ValueError, match="did you mean"):
        planned(settled, 1, ["sdedti"])


def test_results_of_another_picture_or_model_are_not_reused(visit, loaded, sd, tmp_path):
    found_by(visit, loaded)
    assert visit.known(loaded, None) == [visit.found] and visit.known(sd, None) == [] and visit.known(loaded, 72) == []
    tiny.picture().rotate(180).save(tmp_path / "turned.png")
    visit.take(tmp_path / "turned.png")
    assert visit.found is None and visit.known(loaded, None) == []


# ---------------------------------------------------------------- what visitors send


def hostile(tmp_path):
    """Twenty files that are no picture, or one that must not be opened, by name."""
    whole = io.BytesIO()
    tiny.picture().save(whole, "PNG")
    png, made = whole.getvalue(), {}
    for kind in ("TIFF", "WEBP", "GIF", "BMP", "JPEG"):
        encoded = io.BytesIO()
        tiny.picture().save(encoded, kind)
        made[f"cut.{kind.lower()}"] = encoded.getvalue()[: len(encoded.getvalue()) // 3]
    eps, ppm = io.BytesIO(), io.BytesIO()
    tiny.picture().save(eps, "EPS")
    tiny.picture().save(ppm, "PPM")
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    long, small = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (900, 9)).save(long, "PNG")
    Image.new("RGB", (4, 4)).save(small, "PNG")
    made |= {"cut.png": png[:200], "empty.png": b"", "text.png": b"a picture", "huge.png": huge.getvalue()}
    made |= {"long.png": long.getvalue(), "small.png": small.getvalue(), "eps.png": eps.getvalue()}
    made |= {"vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"}
    made |= {"pickle.png": b'\x80\x04\x95c__builtin__\nexec\n(S\'open("owned","w")\'\ntR.', "ppm.jpg": ppm.getvalue()}
    made |= {"page.html.png": b"<html><script>alert(1)</script>", "zip.png": b"PK\x03\x04" + bytes(99)}
    made |= {"wrong.png": png[:40] + bytes(200) + png[240:], "model.safetensors": b"\x08" + bytes(7) + b"{}      "}
    made |= {"elf.png": b"\x7fELF" + bytes(99)}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in made]


NONSENSE = [-1, 2**80, 1e308, float("nan"), True, "", "x" * 3000, "\ud800", "../../etc/passwd", "=>;=>", "1,2=>"]
NONSENSE += [[], ["../../etc/passwd"], {}, {"layers": "here"}, [[1]], "<script>alert(1)</script>", ("/etc/passwd", "a")]


@pytest.fixture
def drawn(loaded, tmp_path, monkeypatch):
    """A page whose parts are nobody's: handlers take what they are told and say what they would show."""
    page = Page(Studio(lambda _: loaded, Choice("mini")), Setup(["mini"], "", [], lambda _: ([], ""), None), tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", MagicMock())
    monkeypatch.setattr(Page, "wire", lambda *_: None)
    page.build()
    page.part, page.update = {key: str(key) for key in page.part}, lambda **said: said
    return page


def usual(page, visit):
    """What the controls of a fresh page say, with a picture and few steps."""
    blank, said = blank_plan("diffedit"), dict.fromkeys(page.part)
    said |= {key: blank.settings.get(one.name, one.default) for key, one in page.options.items()}
    said |= {key: QUICK[key[0]] for key in page.options if key[0] in QUICK} | {"target": "a zebra", "source": "a horse"}
    said |= {"photo": (str(visit.photo), "a photo.png"), "method": "diffedit", "model": "mini", "count": 1}
    return said | {"largest": False, "invert": False, "dilate": 0, "feather": 0}


def heard(page, visit, handler, said, index=None):
    """The status line's last words, and all else that would be shown."""
    event = SimpleNamespace(_data={"index": index})
    shown = [*page.spoken(handler, visit, {page.part[key]: one for key, one in said.items()}, event)]
    return [str(one["status"]) for one in shown if "status" in one][-1], shown


def test_another_picture_stops_the_run_on_the_last(drawn, visit, tmp_path):
    """Else its result would stand beside a picture that it was not made of."""
    said, event = usual(drawn, visit), SimpleNamespace(_data={})
    tiny.picture().rotate(180).save(tmp_path / "another.png")
    run = drawn.spoken(drawn.paint, visit, {drawn.part[key]: one for key, one in said.items()}, event)
    assert "Waiting" in [next(run), next(run)][1]["status"]
    visit.take(tmp_path / "another.png")
    assert [one["status"] for one in run] == ['<p role="status" class="said status">Cancelled.</p>']
    assert not visit.made and visit.stop.is_set()


def test_what_no_control_would_say_is_a_sentence(drawn, visit, loaded, monkeypatch):
    """Every part of the page with values that its own script never sends, to every handler."""
    monkeypatch.setattr(drawn.studio, "run", lambda *_: iter(()))
    found_by(visit, loaded)
    asks = itertools.cycle([drawn.look, drawn.find, drawn.paint, drawn.words, drawn.take_method, drawn.show_places])
    refused = 0
    for key in sorted(usual(drawn, visit).keys() - {"settings", "status"}, key=str):
        for value, handler in zip(NONSENSE, asks):
            line, shown = heard(drawn, visit, handler, usual(drawn, visit) | {key: value})
            assert str(drawn.folder) not in line and "<script>" not in str(shown) and len(line) < 900, (key, value)
            refused += "alert" in line
    for handler in (drawn.take_example, drawn.take_place, drawn.choose):
        refused += sum("alert" in heard(drawn, visit, handler, usual(drawn, visit), index)[0] for index in NONSENSE)
    assert refused > 300
    line, _ = heard(drawn, visit, drawn.find, usual(drawn, visit))  # and the page still works
    assert "alert" not in line


def test_settings_of_a_picture_are_what_it_says_so_each_is_checked(drawn, visit, tmp_path):
    good = plan("diffedit", **QUICK).record
    for name in good:
        for value in NONSENSE:
            told = {"minidiffedit": json.dumps(good | {name: value if value == value else "nan"})}
            write_picture(tiny.picture(), tmp_path / "told.png", told)
            line, _ = heard(
                drawn, visit, lambda visit, _: drawn.settings(visit, tmp_path / "told.png"), usual(drawn, visit)
            )
            assert "Error:" not in line and str(tmp_path) not in line, (name, value, line)


def test_hostile_files_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "server").mkdir()
    files = hostile(tmp_path)
    assert len(files) == 20
    for file in files:
        visit = Visit(tmp_path / "server")
        with pytest.raises((ValueError, OSError)) as caught:
            visit.take(file)
        said = visits.sentence(caught.value, tmp_path)
        assert 20 < len(said) < 400 and str(tmp_path) not in said and "Error:" not in said, said
        assert visit.photo is None
        with pytest.raises(ValueError, match="no picture yet"):
            visit.known(None, None)
    assert not (tmp_path / "owned").exists()


def answer(headers, here=True, **scope):
    """What the page's door does with a request: its status, or "through"."""
    sent = []

    async def app(scope, receive, send):
        sent.append({"status": "through"})

    async def send(message):
        sent.append(message)

    asked = {"type": "http", "path": "/gradio_api/upload", "method": "POST"} | scope
    asked["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Local(app, here)(asked, None, send))
    return sent[0]["status"]


def test_requests_from_other_sites_and_under_other_names_are_refused():
    own = "127.0.0.1:7860"
    assert {answer({"host": own}), answer({"host": own, "origin": f"http://{own}"})} == {"through"}
    assert {answer({"host": f"{name}:7860"}) for name in ("localhost", "[::1]")} == {"through"}
    for origin in ("https://evil.example", "null", "http://127.0.0.1:7861", "http://localhost:7860"):
        assert answer({"host": own, "origin": origin}) == 403
    for site in ("cross-site", "same-site"):  # a picture or a script of another page; a link there is no harm
        assert answer({"host": own, "sec-fetch-site": site, "sec-fetch-mode": "no-cors"}) == 403
        assert answer({"host": own, "sec-fetch-site": site, "sec-fetch-mode": "navigate"}) == "through"
    assert answer({"host": own, "sec-fetch-site": "same-origin"}) == "through"
    for host in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "[", ""):
        assert answer({"host": host}) == 403  # a name that someone lets lead to this machine
    assert answer({"host": "studio.local:7860"}, here=False) == "through"  # the server was opened to others
    assert answer({"host": "studio.local:7860", "origin": "https://evil.example"}, here=False) == 403


def test_a_server_started_anew_says_that_the_picture_is_gone(visit):
    visit.photo.unlink()
    with pytest.raises(ValueError, match="started anew"):
        _ = visit.at_hand


# ---------------------------------------------------------------- runs


def test_a_run_is_looked_at_and_stops_at_the_next_call(loaded, visit, monkeypatch):
    monkeypatch.setattr("minidiffedit.page.runs.EVERY", 0.0)
    seen, stop = [], threading.Event()
    watch = Watcher(stop, seen.append)
    settled = plan("diffedit", **QUICK)
    watch.expect([settled], [])
    watch.sees(loaded, visit.picture, None, [])
    done = execute(settled, loaded, visit.photo, watch=watch)
    assert watch.total == watch.done == done.rows and {one.stage for one in seen} == {"mask", "encode", "decode"}
    assert [one.done for one in seen] == sorted(one.done for one in seen) and seen[-1].left == 0
    assert {one.picture is None for one in seen if one.stage == "mask"} == {True}
    assert {one.picture.size for one in seen if one.stage != "mask"} == {(80, 64)}
    before = loaded.evaluations
    stop.set()
    with pytest.raises(Stopped):
        execute(settled, loaded, visit.photo, watch=watch)
    assert loaded.evaluations - before <= 4  # the one call that was under way


def test_what_is_known_is_not_expected_again(loaded, visit):
    watch, settled = Watcher(threading.Event(), print), plan("diffedit", **QUICK)
    watch.expect([settled], [], "mask")
    assert watch.total == 4
    watch.expect([settled], [found_by(visit, loaded)])
    assert watch.total == sum(execute(settled, loaded, visit.photo, reuse=[visit.found]).evaluations.values())


def test_one_run_at_a_time_and_one_model_in_memory():
    alive, most = [], []

    class Model:
        def __init__(self, name):
            self.name = name
            alive.append(name)
            most.append(len(alive))

        def __del__(self):
            alive.remove(self.name)

    studio, order = Studio(lambda choice: Model(choice.model), Choice("a")), []

    def work(name):
        def run(sd, watch):
            order.append(("begins", name, sd.name))
            watch.show(Seen("mask", 1, 2, None, None))
            time.sleep(0.05)
            order.append(("ends", name, sd.name))
            return name

        return run

    def visitor(name, model):
        (looked, ended) = studio.run(threading.Event(), Choice(model), work(name))
        assert isinstance(looked, Seen) and ended == Ended(name, [])

    threads = [threading.Thread(target=visitor, args=(i, "ab"[i % 2])) for i in range(4)]
    [one.start() for one in threads]
    [one.join() for one in threads]
    assert [kind for kind, *_ in order] == ["begins", "ends"] * 4 and {
        order[i][1:] == order[i + 1][1:] for i in (0, 2, 4, 6)
    }
    assert max(most) == 1 and alive == [studio.sd.name]


def test_a_visitor_who_leaves_stops_the_run():
    began, stop, ended = threading.Event(), threading.Event(), threading.Event()

    def work(sd, watch):
        began.set()
        try:
            while True:
                watch.show(Seen("mask", 0, 1, None, None))
                if watch.stop.wait(0.01):
                    raise Stopped
        finally:
            ended.set()

    run = Studio(lambda _: object(), Choice("a")).run(stop, Choice("a"), work)
    next(run)
    assert began.is_set() and not ended.is_set()
    run.close()  # as Gradio does when the browser is gone
    assert ended.wait(5) and stop.is_set()


def test_errors_of_a_run_reach_its_visitor_and_free_the_model():
    studio = Studio(lambda _: object(), Choice("a"))

    def fails(sd, watch):
        raise ValueError("got 1, expected 2")

    with pytest.raises(ValueError, match="got 1"):
        [*studio.run(threading.Event(), Choice("a"), fails)]
    assert [*studio.run(threading.Event(), Choice("a"), lambda *_: 5)] == [Ended(5, [])]
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(Stopped):
        [*studio.run(stopped, Choice("a"), fails)]


def test_warnings_are_heard_once_and_only_those_of_the_thread():
    said = []
    with hearing(said):
        warnings.warn("one", stacklevel=1)
        warnings.warn("one", stacklevel=1)
        other = threading.Thread(target=lambda: warnings.warn("of another visitor", stacklevel=1))
        other.start()
        other.join()
    assert said == ["one"]


def test_without_gradio_a_sentence_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert cli.main(["ui"]) == 1
    assert 'pip install "minidiffedit[ui]"' in capsys.readouterr().err
