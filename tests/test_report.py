"""The page of a run, without a browser: whole, self-contained, small, true to the run; tests/browser drives it."""

import base64
import dataclasses
import html
import html.parser
import io
import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from made_up import made_up, maps, photo
from PIL import Image
from stubs import Model

from minidiffedit import (
    StableDiffusion,
    Steering,
    cli,
    edit,
    generate,
    load_state,
    report_page,
    resume,
    save_report,
    save_state,
)
from minidiffedit.ddim import levels
from minidiffedit.views import previews, report
from minidiffedit.views.previews import walk
from minidiffedit.views.report import pictured

QUICK = {"steps": 10, "maps": 2, "target": "a zebra", "source": "a horse", "seed": 0}
VOID = {"meta", "link", "img", "input", "br", "line", "polyline"}
URL = re.compile(r"""(?:https?:)?//[^\s"'<>]+""")


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; collects text, attributes, and what stands in <script> and <style>."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.raw = [], [], "", {}
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        assert len(attributes) == len(dict(attributes)), tag
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.raw[self.open[-1]] = [*self.raw.get(self.open[-1], []), data]
        else:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self):
        return json.loads(self.raw["script"][0])


@pytest.fixture(scope="module")
def picture():
    return photo(93, 75)


@pytest.fixture(scope="module")
def done(sd, picture):
    return edit(sd, picture, **QUICK)


@pytest.fixture(scope="module")
def page(done):
    return Page(report_page(done, picture="horse.png"))


def floats(text, *shape):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32).view(shape)


def opened(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


# ---------------------------------------------------------------- one file, whole


def test_nothing_is_fetched(page):
    """Every address is a piece of data or of this page, but for one link that a reader may follow."""
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data", "poster") and (tag, name) != ("a", "href"):
                assert value.startswith("data:"), (tag, name, value[:80])
    assert [a["href"] for a in page.all("a")] == ["#edit", "https://arxiv.org/abs/2210.11427"]
    (style,), (_, script) = page.raw["style"], page.raw["script"]
    assert not URL.findall(style) and "url(" not in style and "@import" not in style
    assert not re.search(r"fetch|XMLHttp|WebSocket|import\(|https?:|sendBeacon|eval|document\.write", script)


def test_its_own_policy_allows_its_own_style_and_script_and_nothing_else(page):
    import hashlib

    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    (style,), (_, script) = page.raw["style"], page.raw["script"]
    for kind, inline in (("style", style), ("script", script)):
        assert (
            rules.pop(f"{kind}-src")
            == f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"
        )
    assert rules == {"default-src": "'none'", "img-src": "data:"}
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.tags for name in attributes)


def test_ids_are_unique_and_what_points_to_them_finds_them(page):
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len({*ids})
    for name in ("for", "aria-labelledby", "data-copy"):
        assert {a[name] for _, a in page.tags if name in a} <= {*ids}, name
    script = page.raw["script"][1]
    assert {*re.findall(r'\$\("([\w-]+)"\)', script)} <= {*ids}


def test_every_picture_has_words(page):
    for a in page.all("img"):
        assert a["alt"].strip()
    for a in page.all("canvas") + page.all("svg"):
        assert a["role"] == "img" and a["aria-label"].strip()
    labelled = {a["for"] for a in page.all("label") if "for" in a}
    for a in page.all("input"):
        assert a["type"] in ("checkbox", "radio") or a.get("aria-label") or a["id"] in labelled


@pytest.mark.parametrize("places", [["source"], ["target"], ["negative_prompt"], ["source", "target"]], ids="+".join)
def test_hostile_prompts_stay_text(sd, places):
    """Of equal texts the page says what they are."""
    evil = "</script></style><img src=x onerror=alert(1)><!-- $data ${x} \\u003c &lt; \u2028'\""
    raw = torch.zeros(1, 3, 8, 10) if len(places) > 1 else None
    made = made_up(sd, raw=raw, **dict.fromkeys(places, evil))
    text = report_page(made, picture=f"{evil}.png".replace("/", ""), state=None)
    page = Page(text)
    assert len(page.all("script")) == 2 and len(page.all("style")) == 1 and page.text.count(evil) >= 1
    assert all(a["src"].startswith("data:image") for a in page.all("img"))
    assert page.data["commands"]["start"].startswith("minidiffedit edit ")
    assert "<img src=x" not in text.lower()


def test_the_same_edit_gives_the_same_bytes(sd, picture, done, model_and_state):
    """Two runs of one command differ in their seconds alone."""
    twin = dataclasses.replace(edit(sd, picture, **QUICK), seconds=done.seconds)
    assert report_page(done) == report_page(done) == report_page(twin)
    _, made, _, loaded = model_and_state
    first, again = (report_page(one, state="run.safetensors") for one in (made, loaded))
    assert first == again  # what a state keeps is all the page needs


def test_at_most_5_mb_for_512_pixels(sd, monkeypatch):
    """Grainy pictures, and previews that hold as much noise as they can."""
    made = made_up(sd, (512, 512), (64, 64), steps=50, n=10, levels=50)
    matrix = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) / 4
    monkeypatch.setattr(report, "fit", lambda x0, picture: previews.LatentRGB(matrix, torch.full((3,), 0.5), 1))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    made = dataclasses.replace(made, source=noise, image=noise.transpose(Image.Transpose.ROTATE_90))
    assert 1e6 < len(report_page(made).encode()) <= 5e6


def test_at_most_1_mb_for_128_pixels(sd):
    """The miniature's size: what `make demo` writes."""
    made = made_up(sd, (128, 128), (16, 16), steps=50, n=10)
    assert len(report_page(made, decode_previews=True).encode()) < 1e6


def test_large_pictures_are_reduced_and_it_is_said(sd):
    made = made_up(sd, (1500, 1000), (96, 64), steps=4)
    text = report_page(made)
    assert len(text) < 3e6
    page = Page(text)
    (source,) = [a for a in page.all("img") if a.get("id") == "source"]
    assert opened(source["src"]).size == (1024, 683) and "shown at 1024 by 683, as JPEG" in page.text


def test_small_pictures_are_shown_to_the_bit(page, done):
    for name, picture in (("source", done.source), ("result", done.image)):
        (shown,) = [a for a in page.all("img") if a.get("id") == name]
        assert opened(shown["src"]).tobytes() == picture.tobytes()


# ---------------------------------------------------------------- what it says


def test_the_numbers_of_the_edit(page, done):
    text = " ".join(page.text.split())
    wanted = [f"{math.floor(1000 * done.coverage + 0.5) / 10:.1f} %", "28 UNet rows"]
    wanted += ["found", "float32", "cpu", "built in memory", torch.__version__]
    for one in wanted:
        assert one in text, one
    for name in done.settings:
        assert f"<dt>{name.replace('_', ' ')}</dt>" in report_page(done)
    row = re.compile(r"<th scope=row>(.*?)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>")
    rows = {stage: rest for stage, *rest in row.findall(report_page(done).partition('id="record"')[2])}
    assert [*rows] == ["text", "vae encode", "mask", "encode", "decode", "vae decode", "together"]
    for stage, count in (("mask", 4), ("encode", 8), ("decode", 16)):
        assert rows[stage][:2] == [str(count)] * 2 and float(rows[stage][2]) == pytest.approx(
            done.seconds[stage], abs=0.006
        )
    assert rows["together"][:2] == ["28", "28"]


def test_a_resumed_edit_shows_what_it_paid_beside_a_fresh_ones_price(done):
    text = report_page(resume(done, mask_threshold=0.4)).partition('id="record"')[2]
    assert (
        "<th scope=row>mask</th><td>0</td><td>4</td>" in text
        and "<th scope=row>decode</th><td>16</td><td>16</td>" in text
    )


def test_the_data_is_the_masks(page, done):
    data = page.data
    m = done.found.maps[0].mean(dim=0)
    assert torch.equal(floats(data["mean"], *m.shape), m) and data["average"] == float(m.mean())
    assert data["least"] == float(done.found.flat_below[0])
    assert torch.equal(floats(data["used"], 1, 1, *m.shape), done.latent_mask)
    assert sum(data["widths"]) == 93 and sum(data["heights"]) == 75 and data["cells"] == [*m.shape][::-1]
    assert len([a for a in page.all("img") if a["alt"].startswith("map ")]) == 2


def test_the_numbers_of_the_levels(done, page):
    t, a = levels(10)
    rows = page.data["levels"]
    assert [one[0] for one in rows] == [*range(9)]
    for j, t_j, a_j, inside, inside_most, outside, x_rms, y_rms in rows:
        x, y = done.trajectory[j], done.decoded[8 - j]
        apart = (y - x).abs()[(done.latent_mask > 0).expand_as(x)]
        assert (t_j, a_j, outside) == (t[j], a[j], 0)
        truth = [apart.square().mean().sqrt(), apart.max(), x.square().mean().sqrt(), y.square().mean().sqrt()]
        assert [inside, inside_most, x_rms, y_rms] == pytest.approx([float(value) for value in truth], rel=1e-5)


def test_an_error_outside_the_mask_is_shown(sd):
    """And the page does not say that nothing changed there."""
    made = made_up(sd)
    wrong = [latent.clone() for latent in made.decoded]
    outside = (made.latent_mask[0, 0] == 0).nonzero()[0]
    wrong[-3][0, 1, outside[0], outside[1]] += 0.25  # level 2
    pages = [
        Page(report_page(dataclasses.replace(made, stages=made.stages | {"decode": y}))) for y in (wrong, made.decoded)
    ]
    assert [round(one[5], 5) for one in pages[0].data["levels"]] == [0, 0, 0.25, *[0] * 6]
    assert ["held" in page.all("main")[0]["class"].split() for page in pages] == [False, True]


@pytest.fixture
def asked(sd, monkeypatch):
    """The model's own answers: (x_t, t, predictions) of each call."""
    calls, eps = [], type(sd).eps

    def recorded(self, x_t, t, texts, **hooks):
        found = eps(self, x_t, t, texts, **hooks)
        calls.append((x_t.double(), t, [one.double() for one in found]))
        return found

    monkeypatch.setattr(type(sd), "eps", recorded)
    return calls


def test_the_predictions_are_those_of_the_model(sd, picture, asked):
    """x_0 as the steps used it."""
    made = edit(sd, picture, **QUICK)
    t, a = levels(10)
    encoding, decoding = asked[-16:-8], asked[-8:]
    walked = walk(made)
    for j, (x_t, t_j, (e,)) in enumerate(encoding, 1):  # at x_{j-1}, asked for t_j
        assert t_j == t[j] and torch.equal(x_t, made.trajectory[j - 1].double())
        truth = (x_t - math.sqrt(1 - a[j - 1]) * e) / math.sqrt(a[j - 1])
        assert torch.allclose(walked[j].shown["x_clean"], truth, atol=2e-4)
    inside = made.latent_mask.bool().expand_as(made.x0)
    for j, (x_t, t_j, (e_null, e_text)) in zip(range(8, 0, -1), decoding):
        e = e_null + 7.5 * (e_text - e_null)
        truth, y_clean = (x_t - math.sqrt(1 - a[j]) * e) / math.sqrt(a[j]), walked[j].shown["y_clean"]
        assert t_j == t[j] and torch.allclose(y_clean[inside], truth[inside], rtol=1e-4, atol=1e-4)
        assert torch.equal(y_clean[~inside], made.x0.double()[~inside])


def test_the_predictions_of_a_method_without_mask_or_path(sd, picture, asked):
    """SDEdit twice over: two descents, the last of each level's calls, ending at the result."""
    made = edit(sd, picture, "sdedit", target="a zebra", steps=10, strength=0.3, repeats=2, seed=0)
    walked, a = walk(made), levels(10).a
    assert [one.j for one in walked] == [0, 1, 2, 3, 1, 2, 3]
    assert not any("x" in one.shown for one in walked) and torch.equal(walked[0].shown["y"], made.latent.double())
    for one, (x_t, t, (e_null, e_text)) in zip(walked[:0:-1], asked[-6:]):
        truth = (x_t - math.sqrt(1 - a[one.j]) * (e_null + 7.5 * (e_text - e_null))) / math.sqrt(a[one.j])
        assert one.t == t and torch.equal(one.shown["y"], x_t)
        assert torch.allclose(one.shown["y_clean"], truth, rtol=1e-4, atol=1e-4)


def test_predictions_under_a_soft_mask(sd, picture):
    """Blended as the result would be: M of the prediction, 1 - M of the source."""
    M = torch.linspace(0, 1, 80).view(1, 1, 8, 10)
    made = edit(sd, picture, mask=M, guidance_scale=1.0, **QUICK)
    a, walked = levels(10).a, walk(made)
    y = made.decoded[3].double()
    e = sd.eps(made.decoded[3], levels(10).t[5], [sd.text(["a zebra"])])[0].double()
    truth = M * (y - math.sqrt(1 - a[5]) * e) / math.sqrt(a[5]) + (1 - M) * made.x0
    assert torch.allclose(walked[5].shown["y_clean"], truth.double(), atol=1e-4)
    assert torch.equal(walked[0].shown["y_clean"], made.latent.double())


@pytest.mark.parametrize("count, most, expected", [
    (5, 9, [0, 1, 2, 3, 4]), (41, 51, [*range(41)]), (101, 3, [0, 50, 100]), (1, 5, [0]), (9, 1, [0, 8]),
])  # fmt: skip
def test_which_levels_are_pictured(count, most, expected):
    assert pictured(count, most) == expected


def test_sheets_hold_the_levels_in_order(page, done):
    frames, rgb = page.data["frames"], previews.fit(done.x0, done.source)
    w, h = page.data["cells"]
    assert frames["levels"] == [*range(9)] and frames["columns"] == 3
    sheets = {name: opened(frames[name]) for name in ("x", "y", "apart")}
    for j in range(9):
        box = (j % 3 * w, j // 3 * h, j % 3 * w + w, j // 3 * h + h)
        assert sheets["x"].crop(box).tobytes() == previews.apply(rgb, done.trajectory[j]).tobytes()
        assert sheets["y"].crop(box).tobytes() == previews.apply(rgb, done.decoded[8 - j]).tobytes()
        apart = (done.decoded[8 - j] - done.trajectory[j]).abs().amax(dim=1)[0] > 0
        assert (np.asarray(sheets["apart"].crop(box).convert("RGBA"))[..., 3] > 0).tolist() == apart.tolist()


def test_previews_through_the_autoencoder_on_request(sd, done):
    nothing = made_up(sd, raw=torch.zeros(1, 3, 8, 10))
    assert "autoencoder at level" not in report_page(nothing, decode_previews=True)
    page = Page(report_page(done, decode_previews=True))
    shown = [a for a in page.all("img") if "autoencoder" in a["alt"]]
    assert len(shown) == 9 and opened(shown[0]["src"]).format == "JPEG"
    assert not [a for a in Page(report_page(done)).all("img") if "autoencoder" in a["alt"]]


# ---------------------------------------------------------------- runs of every kind


def kinds(sd, picture):
    """Of each method and circumstance: the result, and the classes of its page beside "source"."""
    mask = torch.zeros(1, 1, 8, 10)
    mask[..., 2:5, 3:8] = 1
    steering = Steering(largest=True, dilate=1, union=mask, subtract=mask.flip(3))
    found, given = "masked computed decoded path held", "masked given decoded path held"
    bare = {"target": "a zebra", "steps": 4, "seed": 0}
    pairs = {"edits": [("a horse", "a zebra"), ("grass", "sand")], "steps": 4, "maps": 2, "seed": 0}
    with pytest.warns(UserWarning, match="nothing to edit"):
        return {
            "given": (edit(sd, picture, mask=mask, **QUICK), given),
            "soft": (edit(sd, picture, mask=mask * 0.5, **QUICK), given),
            "steered": (edit(sd, picture, steering=steering, **QUICK), found),
            "empty": (edit(sd, picture, mask=mask * 0, **QUICK), "masked given held"),
            "no difference": (edit(sd, picture, **QUICK | {"target": "a horse"}), "masked computed held"),
            "strength 0": (edit(sd, picture, strength=0.0, **QUICK), "masked unmasked held"),
            "strength 0, given": (edit(sd, picture, strength=0.0, mask=mask, **QUICK), "masked given held"),
            "no source": (edit(sd, picture, **QUICK | {"source": ""}), found),
            "no clip": (edit(sd, picture, mask_clip=None, guidance_scale=1.0, **QUICK), found),
            "one step": (edit(sd, picture, **QUICK | {"steps": 1, "strength": 1.0}), found),
            "grey": (edit(sd, picture.convert("L"), **QUICK), found),
            "all of it": (edit(sd, picture, mask=torch.ones(1, 1, 8, 10), **QUICK), given),
            "masactrl": (edit(sd, picture, "masactrl", **bare), "unmasked decoded path"),
            "sdedit": (edit(sd, picture, "sdedit", repeats=2, eta=1.0, **bare), "unmasked decoded"),
            "sdedit, given": (edit(sd, picture, "sdedit", mask=mask, **bare), "masked given decoded held"),
            "regions": (edit(sd, picture, "diffedit-regions", **pairs), "masked unmasked decoded path held"),
            "from noise": (edit(sd, picture, "mask-only", source="a horse", maps=2, **bare), found),
            "reconstruction": (edit(sd, picture, "reconstruction", steps=4, seed=0), "unmasked decoded path"),
        }


@pytest.mark.filterwarnings("ignore:edit . (leaves|has)")
def test_runs_of_every_kind_have_a_page(picture):
    for kind, (made, classes) in kinds(Model(), picture).items():
        page = Page(report_page(made, decode_previews=True))
        (main,) = page.all("main")
        assert {*main["class"].split()} == {"source", *classes.split()}, kind
        data = page.data
        assert (data["mean"] is None) == ("maps" not in made.tensors) and (data["used"] is None) == (
            made.mask is None
        ), kind
        pictures = {"y", "y_clean"} if "decoded" in classes else set()
        pictures |= {"x", "x_clean"} if "decoded" not in classes or "path" in classes else set()
        pictures |= {"apart"} if "path" in classes else set()
        assert {*data["frames"]} == {"levels", "columns", "tile", *pictures}, kind
        assert all(one[5] == 0 for one in data["levels"]), kind
        words = " ".join(page.text.split()).replace(made.method, "")
        assert made.method == "diffedit" or "DiffEdit" not in words, kind


def test_a_picture_made_of_text_alone_has_a_page(sd):
    page = Page(report_page(generate(sd, "a horse", steps=4, seed=0), decode_previews=True))
    assert page.all("main")[0]["class"] == "decoded unmasked" and "noise → a horse" in " ".join(page.text.split())
    assert page.data["levels"][-1][:2] == [4, 751]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_maps_of_any_magnitude(sd, scale):
    data = Page(report_page(made_up(sd, raw=maps(3, 8, 10) * scale))).data
    assert 0 < data["average"] < math.inf


def test_refusals(sd, picture, done, tmp_path):
    with pytest.raises(ValueError, match="shows one Result, got Image"):
        save_report(picture, tmp_path / "page.html")
    with pytest.raises(ValueError, match=r"must end in \.html"):
        save_report(done, tmp_path / "page.png")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the command that makes it again


@pytest.mark.filterwarnings("ignore:edit . (leaves|has)")
@pytest.mark.parametrize("method, arguments, expected", [
    ("diffedit", {"target": "-a", "paste": False, "mask_clip": None, "mask_threshold": 0.4},
     "edit in.png --target=-a --maps 2 --seed 3 --no-paste"),
    ("masactrl", {"target": "b", "source": "a", "strength": 0.7, "seed": None},
     "edit in.png --method masactrl --source a --target b --strength 0.7 --seed {seed}"),
    ("direct+replay", {"target": "b"}, "edit in.png --method direct+replay --target b --seed 3"),
    ("diffedit-regions", {"edits": [("a", "b c"), ("d", "e")], "mask_clip": None},
     "edit in.png --method diffedit-regions --edit 'a=>b c' --edit 'd=>e' --maps 2 --mask-clip none --seed 3"),
    ("sdedit", {"eta": 1.0, "form": "ve"}, "edit in.png --method sdedit --eta 1.0 --form ve --seed 3"),
])  # fmt: skip
def test_the_command_says_what_is_not_as_usual(sd, picture, method, arguments, expected):
    """Of a mask that the page computes, how it is cut stays to the page's sliders."""
    arguments = {"steps": 4, "seed": 3} | ({"maps": 2} if "diffedit" in method else {}) | arguments
    made = edit(sd, picture, method, **arguments)
    start = Page(report_page(made, picture="/full/in.png")).data["commands"]["start"]
    said = shlex.split(start.replace(" --steps 4", ""))
    assert said == shlex.split("minidiffedit " + expected.format(seed=made.seed))


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def model_and_state(folder, picture, tmp_path_factory):
    model = StableDiffusion.load(folder, device="cpu")
    made, path = edit(model, picture, **QUICK), tmp_path_factory.mktemp("state") / "run.safetensors"
    save_state(made, path)
    return model, made, path, load_state(path, model)


def test_report_of_a_saved_edit(folder, model_and_state, tmp_path, capsys):
    _, made, path, _ = model_and_state
    output = tmp_path / "page.html"
    assert (
        cli.main(["report", str(path), "-o", str(output), "--model", str(folder), "--json", "--decode-previews"]) == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == str(output) and said["bytes"] == output.stat().st_size
    assert output.read_text() == report_page(made, state=path, decode_previews=True)
    page = Page(output.read_text())
    assert page.data["commands"]["start"] == f"minidiffedit resume run.safetensors --model {folder}"  # that is there
    assert str(path.parent) not in output.read_text()
    assert cli.main(["report", str(path), "-o", str(output)]) == 1  # a path that a state names is not opened
    assert f"give it with --model {folder}" in capsys.readouterr().err
    assert cli.main(["report", str(path), "-o", str(output), "--model", str(folder)]) == 0
    assert "opens in any browser" in capsys.readouterr().out


def test_edit_and_resume_write_a_page(folder, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save("my photo.png")
    words = ["edit", "my photo.png", "--target", "a zebra", "--steps", "10", "--maps", "2", "--seed", "0", "--no-paste"]
    words += [
        "--model",
        str(folder),
        "--save-state",
        "run.safetensors",
        "--report",
        "page.html",
        "--guidance-scale",
        "5",
    ]
    assert cli.main(words) == 0
    assert "page.html" in capsys.readouterr().out.splitlines()
    start = Page((tmp_path / "page.html").read_text()).data["commands"]["start"]
    assert start == f"minidiffedit resume run.safetensors --model {folder}"
    words[words.index("--save-state") : words.index("--report")] = []
    assert cli.main(words) == 0
    data = Page((tmp_path / "page.html").read_text()).data
    start = "minidiffedit edit 'my photo.png' --target 'a zebra' --steps 10 --maps 2 --seed 0 --guidance-scale 5.0"
    assert data["commands"]["start"] == f"{start} --no-paste --model {folder}" and data["name"] == "my photo"
    again = [
        "resume",
        "run.safetensors",
        "--mask-threshold",
        ".4",
        "--report",
        "again.html",
        "--decode-previews",
        "-o",
        "a.png",
        "--model",
        str(folder),
    ]
    assert cli.main(again) == 0
    data = Page((tmp_path / "again.html").read_text()).data
    assert data["threshold"] == 0.4 and data["commands"]["start"].startswith("minidiffedit edit PICTURE.png")


@pytest.mark.parametrize("words, complaint", [
    (["--report", "page.txt"], "must end in .html"),
    (["--report", "nowhere/page.html"], "there is no folder"),
    (["--report", "twice.html", "--save-mask", "twice.png", "-o", "twice.png"], "would overwrite"),
])  # fmt: skip
def test_what_cannot_be_written_is_refused_before_any_work(picture, tmp_path, monkeypatch, capsys, words, complaint):
    monkeypatch.chdir(tmp_path)
    picture.save("photo.png")
    assert cli.main(["edit", "photo.png", "--target", "a zebra", "--model", "no such model", *words]) == 1
    assert complaint in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["photo.png"]


def test_the_state_is_never_overwritten(model_and_state, tmp_path, capsys):
    _, _, path, _ = model_and_state
    (tmp_path / "link.html").symlink_to(path)
    before = path.read_bytes()
    assert cli.main(["report", str(path), "-o", str(tmp_path / "link.html")]) == 1
    assert "would overwrite an input" in capsys.readouterr().err and path.read_bytes() == before
