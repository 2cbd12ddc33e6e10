"""The report in a browser: its mask is the library's, its controls work, it asks the network for nothing."""

import base64
import io
import math
import random
import shlex
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from axe_playwright_python.sync_playwright import Axe
from made_up import made_up, maps, page_of
from PIL import Image
from playwright.sync_api import expect

from minidiffedit import StableDiffusion, Steering, Witness, cli, edit, generate, load_state, threshold_maps
from minidiffedit.files.images import latent_mask
from minidiffedit.views import previews

SCREENSHOTS = Path(__file__).parents[2] / ".screenshots"
MASKS = """all => all.map(s => {
  const mask = minidiffedit.maskOf({...minidiffedit.start, ...s});
  return btoa(Array.from(new Uint8Array(mask.buffer), c => String.fromCharCode(c)).join(""));
})"""
CURRENT = "[...minidiffedit.current()]"
PNG = """async () => {
  const file = await minidiffedit.pngOf(minidiffedit.current());
  return btoa(Array.from(file, c => String.fromCharCode(c)).join(""));
}"""


@pytest.fixture(scope="module")
def page_path(sd, tmp_path_factory):
    """One page that several tests look at."""
    return page_of(made_up(sd), tmp_path_factory.mktemp("page") / "page.html", picture="horse.png")


@pytest.fixture(scope="module")
def scene_path(tmp_path_factory):
    """A page worth looking at: the miniature's horse."""
    mini = Path(__file__).parents[2] / "weights" / "mini"
    texts = {"source": "a photo of a horse on a grass field", "target": "a photo of a zebra on a grass field"}
    picture = mini / "scenes" / "horse-zebra" / "source.png"
    made = edit(StableDiffusion.load(mini, device="cpu"), picture, seed=0, steps=20, witness=Witness(), **texts)
    return page_of(made, tmp_path_factory.mktemp("scene") / "page.html", picture=picture, decode_previews=True)


def library(edit, s):
    """The mask that the library computes under some of the page's settings."""
    s = {"threshold": 0.5, "clip": 3.0} | s
    shaping = {name: s[name] for name in ("largest", "invert", "dilate", "feather") if name in s}
    old = edit.steering or Steering()
    steering = Steering(**shaping, union=old.union, subtract=old.subtract)
    if edit.given_mask is not None:
        return steering(edit.given_mask)
    found = cut(edit, clip=s["clip"], threshold=s["threshold"])
    return found.mask.float() if found.verdict == ("no difference",) else steering(found.mask.float())


def cut(edit, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of very large and very small masks
        return threshold_maps(edit.tensors["maps"], edit.tensors["flat_below"], **options)


def compare(page, edit, settings):
    h, w = edit.latent_mask.shape[2:]
    for s, coded in zip(settings, page.evaluate(MASKS, settings)):
        mask = torch.frombuffer(bytearray(base64.b64decode(coded)), dtype=torch.float32).view(1, 1, h, w)
        assert torch.equal(mask, library(edit, s)), s


def thresholds_and_clips(edit, count, seed):
    """Plain ones, extreme ones, and thresholds that fall on a cell's very value or beside it."""
    rng = random.Random(seed)
    made = [{"threshold": t, "clip": c} for t in (0.0, 0.5, 1.0) for c in (None, 1.0, 1.0000001, 3.0, 7.3, 1e9)]
    for _ in range(count):
        clip = rng.choice([None, 1 + 4 * rng.random(), round(1 + 9 * rng.random(), 1)])
        heat = cut(edit, clip=clip).heat
        value = rng.choice(heat.flatten().tolist())
        beside = [
            value,
            math.nextafter(value, 0),
            min(1.0, math.nextafter(value, 1)),
            rng.random(),
            round(rng.random(), 2),
        ]
        made.append({"threshold": rng.choice(beside), "clip": clip})
    return made


@pytest.mark.parametrize("grid, seed", [((10, 8), 0), ((64, 64), 1), ((33, 64), 2), ((128, 96), 3), ((8, 64), 4)])
def test_the_mask_is_the_librarys_for_many_thresholds_and_clips(sd, visit, tmp_path, grid, seed):
    edit = made_up(sd, (8 * grid[0], 8 * grid[1]), grid, n=10, seed=seed, levels=1)
    page = visit(page_of(edit, tmp_path / "page.html"))
    compare(page, edit, thresholds_and_clips(edit, 300, seed))


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e6, 1e30])
def test_maps_of_any_magnitude(sd, visit, tmp_path, scale):
    edit = made_up(sd, raw=maps(3, 8, 10) * scale, levels=1)
    compare(visit(page_of(edit, tmp_path / "page.html")), edit, thresholds_and_clips(edit, 60, 5))


def test_maps_that_are_flat_after_the_clip_make_no_mask_whatever_is_asked(sd, visit, tmp_path):
    raw = torch.full((1, 3, 8, 10), 0.02)
    raw[0, :, 0, 0] = 5  # one cell stands out, until the clip takes it
    edit = made_up(sd, raw=raw, levels=1)
    settings = [{"clip": c, "invert": True, "dilate": 1} for c in (None, 1.0, 1.5, 3.0)]
    page = visit(page_of(edit, tmp_path / "page.html"))
    compare(page, edit, settings)
    flat = made_up(sd, raw=torch.full((1, 3, 8, 10), 0.02))
    page = visit(page_of(flat, tmp_path / "flat.html"))
    compare(page, flat, settings)
    assert "No difference" in page.inner_text("#said")


def test_steering_is_the_librarys(sd, visit, tmp_path):
    rng = random.Random(6)
    settings = [
        {"threshold": rng.random(), "clip": 1 + 3 * rng.random(), "largest": rng.random() < 0.5,
         "invert": rng.random() < 0.3, "dilate": rng.randint(-3, 4), "feather": rng.choice([0, 0, 1, 2, 3, 7])}
        for _ in range(200)
    ]  # fmt: skip
    edit = made_up(sd, (33 * 8, 21 * 8), (33, 21), seed=6, levels=1)
    compare(visit(page_of(edit, tmp_path / "computed.html")), edit, settings)
    soft = torch.rand(1, 1, 21, 33, generator=torch.Generator().manual_seed(7))
    soft = torch.where(soft > 0.4, soft, 0)
    laid = Steering(dilate=1, union=torch.rand_like(soft) * (torch.rand_like(soft) > 0.9), subtract=soft.flip(3) / 3)
    for name, steering in (("given", None), ("laid", laid)):
        edit = made_up(sd, (33 * 8, 21 * 8), (33, 21), given=soft, steering=steering, levels=1)
        page = visit(page_of(edit, tmp_path / f"{name}.html"))
        compare(page, edit, settings)
        assert page.evaluate(CURRENT) == edit.latent_mask.flatten().tolist()  # as the edit used it, at first


def test_equal_pieces_and_pieces_that_touch_by_corners(sd, visit, tmp_path):
    given = torch.zeros(1, 1, 8, 10)
    given[0, 0, [0, 0, 1, 1], [8, 9, 8, 9]] = 0.5
    given[0, 0, [2, 2, 3, 3], [6, 7, 6, 7]] = 1  # touches the first by a corner, as large
    given[0, 0, 7, 0:3] = 1
    edit = made_up(sd, given=given, levels=1)
    compare(visit(page_of(edit, tmp_path / "page.html")), edit, [{"largest": True}, {"largest": True, "invert": True}])


# ---------------------------------------------------------------- the controls


def press(page, selector, key, times=1):
    page.focus(selector)
    for _ in range(times):
        page.keyboard.press(key)


def test_sliders_move_by_the_keyboard_and_the_page_follows(sd, visit, page_path):
    edit, page = made_up(sd), visit(page_path)
    assert page.evaluate(CURRENT) == edit.latent_mask.flatten().tolist()
    cells = int(edit.latent_mask.sum())
    assert f", {cells} of 80 cells; the edit" in page.inner_text("#said")
    assert page.inner_text(".facts").count(page.inner_text("#said").split(",")[0].removeprefix("Coverage ")) == 1
    press(page, "#threshold", "ArrowLeft", 20)
    press(page, "#clip", "ArrowRight", 5)
    s = {"threshold": 0.3, "clip": 3.5}
    assert page.evaluate(CURRENT) == library(edit, s).flatten().tolist()
    assert page.inner_text("#threshold-value") == "0.3" and page.inner_text("#clip-value").startswith("3.5")
    assert "--mask-threshold 0.3 --mask-clip 3.5" in page.inner_text("#by-options")
    page.check("#largest")
    press(page, "#dilate", "ArrowRight", 2)
    press(page, "#feather", "ArrowRight")
    s |= {"largest": True, "dilate": 2, "feather": 1}
    assert page.evaluate(CURRENT) == library(edit, s).flatten().tolist()
    assert "--largest --dilate 2 --feather 1" in page.inner_text("#by-options")
    page.check("#invert")
    page.check("#unclipped")
    s |= {"invert": True, "clip": None}
    assert page.evaluate(CURRENT) == library(edit, s).flatten().tolist()
    assert page.is_disabled("#clip") and "--mask-clip none" in page.inner_text("#by-options")
    page.click("#reset")
    assert page.evaluate(CURRENT) == edit.latent_mask.flatten().tolist()


def test_what_is_drawn_over_the_picture_is_the_mask(sd, visit, page_path):
    """The middle of each cell, with the mask and without."""
    edit, page = made_up(sd), visit(page_path)
    middles = """() => { const c = document.getElementById("overlay"), x = c.getContext("2d"), out = [];
      for (let j = 0; j < 8; j++) for (let i = 0; i < 10; i++)
        out.push([...x.getImageData((i + .5) * c.width / 10, (j + .5) * c.height / 8, 1, 1).data].slice(0, 3));
      return out; }"""
    page.evaluate("minidiffedit.choose({threshold: 0.4})")
    tinted = np.array(page.evaluate(middles))
    page.evaluate("minidiffedit.choose({threshold: 1})")
    plain = np.array(page.evaluate(middles))
    mask = library(edit, {"threshold": 0.4}).flatten().bool().numpy()
    assert 0 < mask.sum() < 80 and (np.abs(tinted - plain).sum(axis=1) > 0).tolist() == mask.tolist()
    expected = 0.45 * plain[mask] + 0.55 * np.array([255, 88, 20])
    assert np.abs(tinted[mask] - expected).max() <= 3


def test_the_threshold_stands_in_the_histogram_where_it_cuts(sd, visit, page_path):
    edit, page = made_up(sd), visit(page_path)
    m = edit.tensors["maps"][0].mean(dim=0)
    for threshold, clip in ((0.5, 3.0), (0.25, 2.0), (0.9, None)):
        page.evaluate("s => minidiffedit.choose(s)", {"threshold": threshold, "clip": clip})
        top = m.max() if clip is None else min(m.max(), clip * m.mean())
        cut = float((m.min() + threshold * (top - m.min())) / m.mean())
        end = max(3.2, min(10, float(m.max() / m.mean())))
        assert float(page.get_attribute("#histogram .threshold", "x1")) == pytest.approx(100 * cut / end, abs=0.01)
        bars = page.locator("#histogram rect").evaluate_all(
            "all => all.map(b => [b.x.baseVal.value, b.className.baseVal])"
        )
        inside = [x for x, kind in bars if kind == "in"]
        assert inside == [x for x, _ in bars if x + 50 / 72 > 100 * cut / end]
        assert page.locator("#histogram .clip").count() == (clip is not None)


def test_the_seam_moves(visit, page_path):
    page = visit(page_path)
    assert page.evaluate("document.getElementById('compare').parentElement.style.getPropertyValue('--at')") == "50%"
    press(page, "#seam", "ArrowRight", 10)
    assert page.evaluate("getComputedStyle(document.querySelector('.after')).clipPath") == "inset(0px 0px 0px 60%)"
    page.locator("#compare").scroll_into_view_if_needed()
    box = page.locator("#compare").bounding_box()
    page.mouse.click(box["x"] + 0.1 * box["width"], box["y"] + box["height"] / 2)
    assert abs(int(page.input_value("#seam")) - 10) <= 3


def test_the_scrubber_shows_each_level(sd, visit, page_path):
    edit, page = made_up(sd), visit(page_path)
    K = edit.trajectory.top
    pixels = """name => { const c = document.querySelector(`[data-frame=${name}]`);
      return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]; }"""
    press(page, "#level", "End")
    assert page.inner_text("#level-value").startswith(f"{K}, t = {1 + 100 * (K - 1)}")
    press(page, "#level", "ArrowLeft", 3)
    j = K - 3
    apart = (edit.decoded[K - j].double() - edit.trajectory[j].double()).abs()
    shown = page.inner_text("#level-said")
    inside = apart[(edit.latent_mask > 0).expand_as(apart)].square().mean().sqrt()
    assert f"are {inside:.3f} apart" in shown and "outside, 0 at most" in shown
    drawn = np.array(page.evaluate(pixels, "apart")).reshape(8, 10, 4)
    assert ((drawn[..., 3] > 0) == (apart.mean(dim=1)[0] > 0).numpy()).all()  # transparent where nothing differs
    expected = np.asarray(previews.apply(previews.fit(edit.x0, edit.source), edit.trajectory[j]))
    assert (np.array(page.evaluate(pixels, "x")).reshape(8, 10, 4)[..., :3] == expected).all()
    page.click("#play")
    expect(page.locator("#level")).to_have_value("0")
    assert page.inner_text("#play") == "Play" and page.inner_text("#level-value").startswith("0, t = 0")


# ---------------------------------------------------------------- the brush, copies


def middle(page, column, row):
    """The middle of a cell on the screen."""
    box = page.locator("#overlay").bounding_box()
    return box["x"] + (column + 0.5) * box["width"] / 10, box["y"] + (row + 0.5) * box["height"] / 8


def test_the_brush_paints_cells_which_are_undone_and_saved(sd, visit, page_path):
    """By mouse and by keyboard, in both kinds; what is painted goes into the PNG and over every slider."""
    made, page = made_up(sd), visit(page_path)
    mask = made.latent_mask[0, 0].clone()
    page.locator("#overlay").scroll_into_view_if_needed()
    page.mouse.click(*middle(page, 1, 1))
    assert page.evaluate(CURRENT) == mask.flatten().tolist()  # no brush is chosen
    page.check("[name=brush][value='1']")
    assert not page.locator(".by-options").first.is_hidden()
    page.mouse.move(*middle(page, 1, 1))
    page.mouse.down()
    page.mouse.move(*middle(page, 4, 1), steps=12)
    page.mouse.up()
    mask[1, 1:5] = 1
    assert page.evaluate(CURRENT) == mask.flatten().tolist()
    assert page.locator(".by-options").first.is_hidden()  # options alone say no brush
    after_one = mask.clone()
    page.check("[name=brush][value='0']")
    page.locator("#brush-size").fill("3")
    page.mouse.click(*middle(page, 9, 7))  # at a corner: what lies outside is nothing
    mask[6:8, 8:10] = 0
    page.mouse.click(*middle(page, 5, 4))
    mask[3:6, 4:7] = 0
    assert page.evaluate(CURRENT) == mask.flatten().tolist()
    assert torch.equal(latent_mask(saved_png(page), (93, 75), (80, 64))[0, 0], mask)
    page.evaluate("minidiffedit.choose({threshold: 0.1})")
    assert page.evaluate(CURRENT)[4 * 10 + 5] == 0  # what is painted stays
    page.evaluate("minidiffedit.choose(minidiffedit.start)")
    page.click("#undo")
    page.click("#undo")
    assert page.evaluate(CURRENT) == after_one.flatten().tolist()
    page.locator("#brush-size").fill("1")
    page.check("[name=brush][value='1']")
    page.focus("#overlay")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#said") == "Column 5 of 10, row 5 of 8."
    page.keyboard.press("Space")
    after_one[4, 4] = 1
    assert page.evaluate(CURRENT) == after_one.flatten().tolist()
    page.click("#reset")
    assert page.evaluate(CURRENT) == made.latent_mask.flatten().tolist()


def test_axe_finds_nothing_while_the_brush_is_in_hand(visit, page_path):
    page = visit(page_path, bypass_csp=True)
    page.check("[name=brush][value='1']")
    page.focus("#overlay")
    page.keyboard.press("ArrowLeft")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_commands_are_copied_by_a_button(visit, page_path):
    """Where the browser lets a file write to its clipboard, and where it does not."""
    page = visit(page_path)
    names = page.locator("button.copy:visible").evaluate_all("all => all.map(b => b.ariaLabel)")
    assert len(names) == page.locator("pre:visible").count() >= 2 and len({*names}) == len(names)
    button, command = page.locator("button.copy").first, page.locator("pre").first.text_content()
    page.evaluate("() => { navigator.clipboard.writeText = async (text) => { window.copied = text; }; }")
    button.click()
    expect(button).to_have_text("Copied")
    assert page.evaluate("copied") == command and command.startswith("minidiffedit ")
    expect(button).to_have_text("Copy", timeout=5000)
    page.evaluate("() => { navigator.clipboard.writeText = async () => { throw new Error('not allowed'); }; }")
    button.click()
    expect(button).to_have_text("Marked: copy it by the keyboard")
    assert page.evaluate("getSelection().toString()").strip() == command.strip()


# ---------------------------------------------------------------- the mask as a file, the command lines


def saved_png(page):
    return Image.open(io.BytesIO(base64.b64decode(page.evaluate(PNG))))


@pytest.mark.parametrize("picture, grid", [((93, 75), (10, 8)), ((512, 512), (64, 64)), ((1000, 667), (96, 64))])
def test_the_png_gives_the_very_cells_back(sd, visit, tmp_path, picture, grid):
    edit = made_up(sd, picture, grid, levels=1)
    page = visit(page_of(edit, tmp_path / "page.html"))
    for s in ({"threshold": 0.4}, {"threshold": 0.3, "dilate": 1, "feather": 3}, {"threshold": 1.0}):
        page.evaluate("s => minidiffedit.choose(s)", s)
        png = saved_png(page)
        assert (png.mode, png.size) == ("L", picture)
        working = (8 * grid[0], 8 * grid[1])
        assert torch.equal(latent_mask(png, picture, working), library(edit, s))
        if picture == working and "feather" not in s:  # the pixels alone say the same
            png.info.clear()
            assert torch.equal(latent_mask(png, picture, working), library(edit, s))


@pytest.mark.parametrize("kind", ["picture", "state", "steered state", "given state"])
def test_the_commands_do_what_the_page_shows(folder, visit, tmp_path, monkeypatch, capsys, kind):
    """The page's own words, run: the mask of the edit they make is the page's."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 93, 3), dtype=np.uint8)).save("a photo.png")
    box = Image.new("L", (93, 75))
    box.paste(200, (20, 10, 50, 40))
    box.save("box.png")
    first = ["edit", "a photo.png", "--target=-a 'zebra'", "--source", "a horse", "--steps", "10", "--maps", "2"]
    first += ["--seed", "3", "--model", str(folder), "--report", "page.html", "--quiet"]
    first += [] if kind == "picture" else ["--save-state", "run.safetensors"]
    first += ["--dilate", "2"] if kind == "steered state" else ["--mask", "box.png"] if kind == "given state" else []
    assert cli.main(first) == 0
    page = visit(tmp_path / "page.html", accept_downloads=True)
    changes = {"threshold": 0.35, "clip": 2.5, "dilate": 0, "largest": kind != "steered state"}
    page.evaluate("s => minidiffedit.choose(s)", changes)
    with page.expect_download() as caught:
        page.click("#save")
    caught.value.save_as(tmp_path / caught.value.suggested_filename)
    shown = torch.tensor(page.evaluate(CURRENT)).view(1, 1, 8, 10)
    assert 0 < shown.sum() < 80
    sd = StableDiffusion.load(folder, device="cpu")
    for i, selector in enumerate(("#by-file", "#by-options")):
        words = shlex.split(page.inner_text(selector))
        assert words[0] == "minidiffedit"
        again = [*words[1:], "-o", f"{i}.png", "--save-state", f"{i}.safetensors", "--quiet"]
        again += ["--model", str(folder)]  # the page leaves the folder's path out
        assert cli.main(again) == 0, capsys.readouterr().err
        assert torch.equal(load_state(tmp_path / f"{i}.safetensors", sd).latent_mask, shown), selector


# ---------------------------------------------------------------- for everyone


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_accessible_and_within_its_width(visit, scene_path, scheme, width):
    """axe-core's rules, contrast among them; nothing sticks out; a picture for people to look at."""
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 844}, "bypass_csp": True}
    page = visit(scene_path, **options)
    for details in page.locator("summary").all():
        details.click()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"report-{scheme}-{width}.png", full_page=True)
    page.evaluate("minidiffedit.choose({threshold: 0.3, largest: true, dilate: 1})")
    page.locator(".bench").screenshot(path=SCREENSHOTS / f"mask-{scheme}-{width}.png")


def test_words_are_chosen_and_their_maps_are_the_runs(sd, visit, tmp_path):
    """A word, a level, a step: the large map is that word's, to the page's eight bits; the number is its share."""
    told = {"source": "a horse on grass", "target": "a zebra on <b>grass</b>", "steps": 4, "seed": 0}
    looks_on = Witness()
    made = edit(sd, tiny.picture(), "prompt-to-prompt", witness=looks_on, **told)
    page = visit(page_of(made, tmp_path / "page.html"))
    for number, look in enumerate(looks_on.looks):
        page.locator("#looked").select_option(str(number))
        for nth, level in enumerate(look.maps.values()):
            page.locator("#look-level").select_option(str(nth))
            for step, word in ((0, 1), (2, 0), (4, len(look.words) - 1)):
                page.locator("#look-step").fill(str(step))
                page.locator("#tiles button").nth(word).click()
                shares = level[step, word] if step < 4 else level[:, word].mean(0)
                said = page.locator("#look-said").text_content()
                assert said.startswith(f"“{look.words[word]}”: ")
                assert abs(float(said.split(": ")[1].split(" ")[0]) - 100 * float(shares.mean())) < 0.15
                drawn = page.evaluate("""() => { const c = document.getElementById("look"), d = c.getContext("2d");
                  const alpha = d.getImageData(0, 0, c.width, c.height).data.filter((_, i) => i % 4 === 3);
                  return [c.width, c.height, ...alpha]; }""")
                assert drawn[:2] == [*shares.shape[::-1]]
                alpha = 60 + 0.6 * 255 * (shares / level.max()).sqrt().flatten()
                assert np.abs(np.array(drawn[2:]) - alpha.numpy()).max() < 4
    assert page.locator("#tiles b").count() == 0  # a prompt's signs stay text
    page.locator("#own-scale").check()
    rows = page.locator(".reach tbody tr")
    assert rows.count() > 3 and "row 3: queries and keys of row 2" in rows.first.text_content()


def test_every_control_is_reached_by_tab_and_shows_it(visit, page_path):
    page = visit(page_path)
    wanted = set(
        page.locator("input:not([disabled]), button, a, summary").evaluate_all(
            "all => all.filter(e => e.checkVisibility()).map(e => e.id || e.tagName)"
        )
    )
    reached = {}
    for _ in range(60):
        page.keyboard.press("Tab")
        name, ring = page.evaluate("""() => { const e = document.activeElement, ring = getComputedStyle(e).outlineStyle;
          const around = getComputedStyle(e.parentElement).outlineStyle;
          return [e.id || e.tagName, ring !== "none" || around !== "none"]; }""")
        reached[name] = ring
    assert wanted <= reached.keys() and all(reached[name] for name in wanted)


def test_pages_without_a_mask_or_a_difference(sd, visit, tmp_path):
    """A mask that was given, texts that do not differ, strength 0: the page says so and shows what there is."""
    given = torch.zeros(1, 1, 8, 10)
    given[..., 2:5, 3:8] = 1
    page = visit(page_of(made_up(sd, given=given), tmp_path / "given.html"))
    assert "was given" in page.inner_text("#mask") and not page.is_visible("#threshold") and page.is_visible("#dilate")
    page = visit(page_of(made_up(sd, raw=torch.zeros(1, 3, 8, 10)), tmp_path / "none.html"))
    assert page.is_visible("#threshold") and not page.is_visible("#level")
    assert "Nothing was decoded: the prompts do not differ" in page.inner_text("#levels")
    nothing = replace(made_up(sd, given=torch.zeros(1, 1, 8, 10), strength=0.0), given_mask=None, verdict="strength 0")
    page = visit(page_of(nothing, tmp_path / "strength.html"))
    assert "the strength rounds to level 0" in page.inner_text("#mask") and not page.is_visible("#dilate")


@pytest.mark.parametrize("method, arguments, pictures", [
    ("masactrl", {"source": "a horse"}, ["x", "x_clean", "y", "y_clean", "apart"]),
    ("sdedit", {"repeats": 2}, ["y", "y_clean"]),
    ("text-to-image", {}, ["y", "y_clean"]),
])  # fmt: skip
def test_pages_of_methods_without_a_mask(sd, visit, tmp_path, method, arguments, pictures):
    """No mask, no DiffEdit; the pictures that there are, from the noisiest level down."""
    picture = tiny.picture()
    options = {"steps": 10, "seed": 0} | arguments
    made = (
        edit(sd, picture, method, target="a zebra", **options)
        if picture_goes_in(method)
        else generate(sd, "a zebra", **options)
    )
    page = visit(page_of(made, tmp_path / "page.html", decode_previews=True))
    assert not page.is_visible("#mask") and page.is_visible("#result") and page.is_visible("#level")
    assert page.is_visible("#compare") == page.is_visible("#source") == picture_goes_in(method)
    assert "DiffEdit" not in page.inner_text("body") and "mask" not in page.inner_text("#levels")
    frames = page.locator("[data-frame]").evaluate_all(
        "all => all.filter(c => c.offsetParent).map(c => c.dataset.frame)"
    )
    assert frames == pictures and page.locator(".vae img").count() > 5
    press(page, "#level", "End")
    top, t = page.evaluate("minidiffedit.data.levels.at(-1).slice(0, 2)")
    assert page.inner_text("#level-value").startswith(
        f"{'' if 'x' in pictures else 'level '}{top}, t = {t}"
    ) and page.is_visible("#curve") == (method == "masactrl")
    page.click("summary")
    table = page.locator("#numbers tr").all_inner_texts()
    assert len(table) == len(page.evaluate("minidiffedit.data.levels")) and table[0].split()[:2] == [str(top), str(t)]
    y = made.stages["decode" if picture_goes_in(method) else "generate"]
    shown = [float(row.split()[4]) for row in table]  # of three digits, rounded from what the page holds
    assert shown == pytest.approx([float(one.double().square().mean().sqrt()) for one in y], abs=6e-4)


def picture_goes_in(method):
    return method != "text-to-image"


def test_hostile_prompts_stay_text(sd, visit, tmp_path):
    evil = '</script><img src=x onerror="document.body.dataset.owned=1"><b>&amp;$data ${x} \u2028\u202e\'`'
    page = visit(
        page_of(
            made_up(sd, target=evil, source=evil), tmp_path / "page.html", picture=f"{evil[:20]}.png".replace("/", "")
        )
    )
    assert page.inner_text("h1 bdi:last-of-type") == evil.replace("\u2028", "\u2028")
    assert page.evaluate("document.body.dataset.owned") is None and page.locator("b").count() == 0
