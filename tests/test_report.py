"""The page of an edit, without a browser: whole, self-contained, small, true to the edit; tests/browser drives it."""

import base64
import dataclasses
import html
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from made_up import made_up, maps, photo
from PIL import Image

from minidiffedit import (
    StableDiffusion,
    Steering,
    cli,
    edit,
    edit_regions,
    load_state,
    preview,
    report_page,
    resume,
    save_report,
    save_state,
)
from minidiffedit.ddim import levels
from minidiffedit.views.report import pictured, walk

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
        assert a["type"] == "checkbox" or a.get("aria-label") or a["id"] in labelled


@pytest.mark.parametrize("place", ["source", "target", "negative_prompt"])
def test_hostile_prompts_stay_text(sd, place):
    evil = "</script></style><img src=x onerror=alert(1)><!-- $data ${x} \\u003c &lt; \u2028'\""
    made = made_up(sd, **{place: evil})
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
    loud = preview.LatentRGB(
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) / 4, torch.full((3,), 0.5), 1
    )
    monkeypatch.setattr(preview, "fit", lambda x0, picture: loud)
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
    wanted = [f"{math.floor(1000 * done.coverage + 0.5) / 10:.1f} %", "level 8 of 10", "28 UNet rows", "t = 401"]
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


def test_the_table_of_levels(done, page):
    t, a = levels(10)
    row = re.compile(r"<tr><th scope=row>(\d+)</th>" + r"<td>(.*?)</td>" * 7)
    rows = row.findall(report_page(done).partition("<thead>")[2].partition("</tbody>")[0])
    assert [int(one[0]) for one in rows] == [*range(8, -1, -1)]
    for j, t_j, a_j, x_rms, y_rms, inside, inside_most, outside in rows:
        x, y = done.trajectory[int(j)], done.decoded[8 - int(j)]
        apart = (y - x).abs()[(done.latent_mask > 0).expand_as(x)]
        assert (int(t_j), float(a_j)) == (t[int(j)], pytest.approx(a[int(j)], abs=6e-6))
        shown = [float(value) for value in (x_rms, y_rms, inside, inside_most)]
        truth = [x.square().mean().sqrt(), y.square().mean().sqrt(), apart.square().mean().sqrt(), apart.max()]
        assert shown == pytest.approx([float(value) for value in truth], abs=6e-4)
        assert outside == "0"


def test_an_error_outside_the_mask_is_shown(sd):
    made = made_up(sd)
    wrong = [latent.clone() for latent in made.decoded]
    outside = (made.latent_mask[0, 0] == 0).nonzero()[0]
    wrong[-3][0, 1, outside[0], outside[1]] += 0.25  # level 2
    page = Page(report_page(dataclasses.replace(made, decoded=tuple(wrong))))
    assert [round(one[3], 5) for one in page.data["levels"]] == [0, 0, 0.25, *[0] * 6]


def test_the_predictions_are_those_of_the_model(sd, picture, monkeypatch):
    """x_0 as the steps used it, recorded from the model's own answers."""
    asked, eps = [], sd.eps

    def recorded(x_t, t, texts):
        found = eps(x_t, t, texts)
        asked.append((x_t.double(), t, [one.double() for one in found]))
        return found

    monkeypatch.setattr(type(sd), "eps", lambda self, *arguments: recorded(*arguments))
    made = edit(sd, picture, **QUICK)
    t, a = levels(10)
    encoding, decoding = asked[-16:-8], asked[-8:]
    walked = walk(made)
    for j, (x_t, t_j, (e,)) in enumerate(encoding, 1):  # at x_{j-1}, asked for t_j
        assert t_j == t[j] and torch.equal(x_t, made.trajectory[j - 1].double())
        truth = (x_t - math.sqrt(1 - a[j - 1]) * e) / math.sqrt(a[j - 1])
        assert torch.allclose(walked[j].x_clean, truth, atol=2e-4)
    inside = made.latent_mask.bool().expand_as(made.x0)
    for j, (x_t, t_j, (e_null, e_text)) in zip(range(8, 0, -1), decoding):
        e = e_null + 7.5 * (e_text - e_null)
        truth = (x_t - math.sqrt(1 - a[j]) * e) / math.sqrt(a[j])
        assert t_j == t[j] and torch.allclose(walked[j].y_clean[inside], truth[inside], rtol=2e-3, atol=2e-3)
        assert torch.equal(walked[j].y_clean[~inside], made.x0.double()[~inside])


def test_predictions_under_a_soft_mask(sd, picture):
    """Blended as the result would be: M of the prediction, 1 - M of the source, and nothing blown up near M = 0."""
    M = torch.linspace(0, 1, 80).view(1, 1, 8, 10)
    made = edit(sd, picture, mask=M, guidance_scale=1.0, **QUICK)
    a, one = levels(10).a, walk(made)[5]
    y = made.decoded[3].double()
    e = sd.eps(made.decoded[3], levels(10).t[5], [sd.text(["a zebra"])])[0].double()
    truth = M * (y - math.sqrt(1 - a[5]) * e) / math.sqrt(a[5]) + (1 - M) * made.x0
    assert torch.allclose(one.y_clean, truth.double(), atol=0.01)
    for one in walk(made)[1:]:
        assert one.y_clean.abs().max() < 100 * made.x0.abs().max()
        assert torch.equal(one.y_clean[M.expand_as(one.y_clean) < 1e-3], made.x0.double()[M.expand_as(made.x0) < 1e-3])
    assert torch.equal(walk(made)[0].y_clean, made.latent.double())


@pytest.mark.parametrize("count, most, expected", [
    (5, 9, [0, 1, 2, 3, 4]), (41, 51, [*range(41)]), (101, 3, [0, 50, 100]), (1, 5, [0]), (9, 1, [0, 8]),
])  # fmt: skip
def test_which_levels_are_pictured(count, most, expected):
    assert pictured(count, most) == expected


def test_sheets_hold_the_levels_in_order(page, done):
    frames, rgb = page.data["frames"], preview.fit(done.x0, done.source)
    w, h = page.data["cells"]
    assert frames["levels"] == [*range(9)] and frames["columns"] == 3
    sheets = {name: opened(frames[name]) for name in ("x", "y", "apart")}
    for j in range(9):
        box = (j % 3 * w, j // 3 * h, j % 3 * w + w, j // 3 * h + h)
        assert sheets["x"].crop(box).tobytes() == preview.apply(rgb, done.trajectory[j]).tobytes()
        assert sheets["y"].crop(box).tobytes() == preview.apply(rgb, done.decoded[8 - j]).tobytes()
        apart = (done.decoded[8 - j] - done.trajectory[j]).abs().amax(dim=1)[0] > 0
        assert (np.asarray(sheets["apart"].crop(box).convert("RGBA"))[..., 3] > 0).tolist() == apart.tolist()


def test_previews_through_the_autoencoder_on_request(sd, done):
    nothing = made_up(sd, raw=torch.zeros(1, 3, 8, 10))
    assert "autoencoder at level" not in report_page(nothing, decode_previews=True)
    page = Page(report_page(done, decode_previews=True))
    shown = [a for a in page.all("img") if "autoencoder" in a["alt"]]
    assert len(shown) == 9 and opened(shown[0]["src"]).format == "JPEG"
    assert not [a for a in Page(report_page(done)).all("img") if "autoencoder" in a["alt"]]


# ---------------------------------------------------------------- edits of every kind


def kinds(sd, picture):
    mask = torch.zeros(1, 1, 8, 10)
    mask[..., 2:5, 3:8] = 1
    steering = Steering(largest=True, dilate=1, union=mask, subtract=mask.flip(3))
    with pytest.warns(UserWarning, match="nothing to edit"):
        return {
            "given": edit(sd, picture, mask=mask, **QUICK),
            "soft": edit(sd, picture, mask=mask * 0.5, **QUICK),
            "steered": edit(sd, picture, steering=steering, **QUICK),
            "empty": edit(sd, picture, mask=mask * 0, **QUICK),
            "no difference": edit(sd, picture, **QUICK | {"target": "a horse"}),
            "strength 0": edit(sd, picture, strength=0.0, **QUICK),
            "strength 0, given": edit(sd, picture, strength=0.0, mask=mask, **QUICK),
            "no source": edit(sd, picture, **QUICK | {"source": ""}),
            "no clip": edit(sd, picture, mask_clip=None, guidance_scale=1.0, **QUICK),
            "one step": edit(sd, picture, **QUICK | {"steps": 1, "strength": 1.0}),
            "grey": edit(sd, picture.convert("L"), **QUICK),
            "all of it": edit(sd, picture, mask=torch.ones(1, 1, 8, 10), **QUICK),
        }


def test_edits_of_every_kind_have_a_page(sd, picture):
    for kind, made in kinds(sd, picture).items():
        page = Page(report_page(made))
        (main,) = page.all("main")
        masked = "computed" if made.found else "given" if made.given is not None else "unmasked"
        assert main["class"] == f"{masked} {'decoded' if made.decoded else 'undecoded'}", kind
        assert (page.data["mean"] is None) == (made.found is None), kind
        assert all(outside == 0 for *_, outside in page.data["levels"]), kind


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_maps_of_any_magnitude(sd, scale):
    data = Page(report_page(made_up(sd, raw=maps(3, 8, 10) * scale))).data
    assert 0 < data["average"] < math.inf


def test_refusals(sd, picture, done, tmp_path):
    both = edit_regions(sd, picture, [("a horse", "a zebra")], steps=2, maps=1, seed=0)
    with pytest.raises(ValueError, match=r"one edit with its one mask .*Regions"):
        save_report(both, tmp_path / "page.html")
    with pytest.raises(ValueError, match=r"must end in \.html"):
        save_report(done, tmp_path / "page.png")
    assert not list(tmp_path.iterdir())


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
    assert page.data["commands"]["start"] == "minidiffedit resume run.safetensors --model tiny"  # no full path
    assert str(path.parent) not in output.read_text() and str(folder.parent) not in output.read_text()
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
    assert start == "minidiffedit resume run.safetensors --model tiny"
    words[words.index("--save-state") : words.index("--report")] = []
    assert cli.main(words) == 0
    data = Page((tmp_path / "page.html").read_text()).data
    start = "minidiffedit edit 'my photo.png' --target 'a zebra' --steps 10 --guidance-scale 5.0 --maps 2 --seed 0"
    assert data["commands"]["start"] == f"{start} --no-paste --model tiny" and data["name"] == "my photo"
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


def test_several_edits_at_once_have_no_page(picture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture.save("photo.png")
    assert cli.main(["edit", "photo.png", "--edit", "a=>b", "--report", "page.html", "--model", "no such"]) == 1
    assert "--report goes with --target, not with --edit" in capsys.readouterr().err


def test_the_state_is_never_overwritten(model_and_state, tmp_path, capsys):
    _, _, path, _ = model_and_state
    (tmp_path / "link.html").symlink_to(path)
    before = path.read_bytes()
    assert cli.main(["report", str(path), "-o", str(tmp_path / "link.html")]) == 1
    assert "would overwrite an input" in capsys.readouterr().err and path.read_bytes() == before
