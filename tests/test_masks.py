"""Steering masks: each operation against its definition, their order, and the round trip through a PNG file."""

import base64
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ran
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image

from minidiffedit import Steering, cli, edit, picture_mask
from minidiffedit.files import masks as steer
from minidiffedit.files.images import (
    CELLS,
    grey_picture,
    latent_mask,
    mask_picture,
    read_picture,
    working_size,
    write_picture,
)

FAST = ["--target", "a zebra", "--steps", "4", "--maps", "2", "--seed", "0"]
STEERED = ["--mask-threshold", "0.9", "--largest", "--dilate", "1", "--feather", "2"]
STEERED += ["--union", "left.png", "--subtract", "top.png"]


def cells(text):
    """Rows of digits, 9 = 1: "090 555" -> (1, 1, 2, 3)."""
    return torch.tensor([[int(c) / 9 for c in row] for row in text.split()])[None, None]


@some.composite
def masks(draw, soft=True):
    h, w = draw(some.integers(1, 9)), draw(some.integers(1, 9))
    seed, share = draw(some.integers(0, 2**32 - 1)), draw(some.floats(0, 1))
    rng = np.random.default_rng(seed)
    values = rng.random((h, w)) if soft else np.ones((h, w))
    return torch.from_numpy((values * (rng.random((h, w)) < share)).astype(np.float32))[None, None]


# ---------------------------------------------------------------- the operations


def by_hand(M, reach, pick):
    """Largest or smallest value within reach, cell by cell."""
    M, (h, w) = M[0, 0], M.shape[2:]
    out = torch.empty(h, w)
    for y in range(h):
        for x in range(w):
            out[y, x] = pick(M[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1])
    return out[None, None]


@settings(max_examples=40)
@given(masks(), some.integers(0, 12))
def test_dilate_takes_the_largest_and_shrinking_the_smallest_in_reach(mask, reach):
    before = mask.clone()
    assert torch.equal(steer.dilate(mask, reach), by_hand(mask, reach, torch.max))
    assert torch.equal(steer.dilate(mask, -reach), by_hand(mask, reach, torch.min))
    assert torch.equal(mask, before)


def test_feather_fades_outwards_and_leaves_the_inside():
    assert torch.allclose(steer.feather(cells("000900000"), 2), torch.tensor([0, 1, 2, 3, 2, 1, 0, 0, 0]) / 3)
    soft = cells("000300900")
    assert torch.allclose(steer.feather(soft, 2) * 9, torch.tensor([0, 1, 2, 3, 3, 6, 9, 6, 3.0]))
    assert torch.equal(steer.feather(soft, 0), soft)


@settings(max_examples=40)
@given(masks(), some.integers(0, 4))
def test_feather_only_adds_and_only_within_its_cells(mask, n):
    faded = steer.feather(mask, n)
    assert (faded >= mask).all() and (faded <= steer.dilate(mask, n)).all()


@pytest.mark.parametrize("mask, expected", [
    ("9900 9009 0009", "9900 9000 0000"), ("9090 0909", "9000 0000"), ("0000", "0000"), ("9999 9999", "9999 9999"),
    ("0909 0505 9905", "0900 0500 9900"), ("1011 0001", "0011 0001"),
    ("999999 000009 990909 900909 999909 000009", "999999 000009 000009 000009 000009 000009"),
])  # fmt: skip
def test_the_largest_piece(mask, expected):
    """Sides connect and corners do not; the first of equals; soft values stay; a soft cell counts as a cell."""
    assert torch.equal(steer.largest_piece(cells(mask)), cells(expected))


def test_a_jpegs_noise_connects_no_pieces():
    noisy = cells("9900 0009") + 3 / 255 * (cells("9900 0009") == 0)
    assert torch.equal(steer.largest_piece(noisy), cells("9900 0000"))
    assert torch.equal(steer.largest_piece(noisy / 100), noisy / 100)  # nothing but noise: no piece to take


@settings(max_examples=40)
@given(masks(soft=False))
def test_the_largest_piece_against_a_flood_fill(mask):
    left = {(y, x) for y, x in mask[0, 0].nonzero().tolist()}
    pieces = []
    while left:
        piece, edge = set(), [min(left)]
        while edge:
            y, x = edge.pop()
            if (y, x) in left:
                left.remove((y, x))
                piece.add((y, x))
                edge += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        pieces.append(piece)
    expected = torch.zeros_like(mask)
    for y, x in max(pieces, key=len, default=()):
        expected[0, 0, y, x] = 1
    assert torch.equal(steer.largest_piece(mask), expected)


def test_union_subtract_and_invert_on_soft_values():
    a, b = cells("0369"), cells("6600")
    assert torch.equal(steer.union(a, b), cells("6669")) and torch.allclose(steer.subtract(a, b), cells("0369"))
    assert torch.equal(steer.subtract(cells("9999"), b), 1 - b) and torch.equal(steer.invert(a), 1 - a)


@pytest.mark.parametrize("call", [
    lambda: steer.dilate(torch.zeros(3, 3), 1), lambda: steer.dilate(torch.zeros(2, 1, 3, 3), 1),
    lambda: steer.dilate(torch.full((1, 1, 3, 3), 1.5), 1), lambda: steer.invert(torch.full((1, 1, 2, 2), torch.nan)),
    lambda: steer.dilate(torch.zeros(1, 1, 3, 3), 1.5), lambda: steer.feather(torch.zeros(1, 1, 3, 3), -1),
    lambda: steer.union(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 4)),
    lambda: steer.largest_piece(np.zeros((3, 3))), lambda: Steering(dilate=5000), lambda: Steering(feather=-1),
    lambda: Steering(largest=1),
])  # fmt: skip
def test_what_is_no_mask_or_no_number_is_refused(call):
    with pytest.raises(ValueError):
        call()


def test_the_order_and_its_record():
    mask, one, two = cells("9000 0009 0009"), cells("0090 0000 0000"), cells("0000 0000 0900")
    steering = Steering(largest=True, invert=True, dilate=-1, feather=1, union=one, subtract=two)
    by_hand = steer.feather(steer.dilate(steer.invert(steer.largest_piece(mask)), -1), 1)
    by_hand = steer.subtract(steer.union(by_hand, one), two)
    assert torch.equal(steering(mask), by_hand) and by_hand[0, 0, 2, 1] == 0
    said = steering.settings()
    assert said == {"largest": True, "invert": True, "dilate": -1, "feather": 1} | {
        "union": steer.digest(one), "subtract": steer.digest(two)}  # fmt: skip
    assert Steering().settings() == {} and torch.equal(Steering()(mask), mask)


# ---------------------------------------------------------------- through a PNG file


sides = some.tuples(some.integers(8, 200), some.integers(8, 200)).filter(lambda s: max(s) <= 8 * min(s))


@settings(max_examples=60)
@given(sides, some.sampled_from([64, 72, 128]), some.booleans(), some.integers(0, 2**32 - 1))
def test_a_written_mask_reads_as_the_same_cells_at_every_size(tmp_path_factory, size, side, soft, seed):
    working = working_size(size, side)
    rng = np.random.default_rng(seed)
    values = rng.random((1, 1, working[1] // 8, working[0] // 8), dtype=np.float32)
    mask = torch.from_numpy(values if soft else (values > 0.5).astype(np.float32))
    path = tmp_path_factory.getbasetemp() / "mask.png"
    picture = mask_picture(mask, size)
    write_picture(picture, path)
    for source in (path, str(path), read_picture(path), picture):
        assert torch.equal(latent_mask(source, size, working), mask)


def coded(value):
    """A chunk of 11 x 8 cells that hold what no mask does."""
    raw = np.full((8, 11), value, "<f4").tobytes()
    return f"11x8 {base64.b64encode(zlib.compress(raw)).decode()}"


def spoiled(picture, chunk):
    picture.info[CELLS] = chunk
    return picture


@pytest.mark.parametrize("change", [
    lambda p: p.point(lambda v: 255 - v), lambda p: spoiled(p, "8x10 "), lambda p: spoiled(p, "11x8 !"),
    lambda p: spoiled(p, "99999999x9999999 eJw="), lambda p: spoiled(p, ""), lambda p: spoiled(p, b"11x8"),
    lambda p: spoiled(p, mask_picture(torch.ones(1, 1, 8, 11), p.size).info[CELLS]),
    lambda p: spoiled(p, "11x8 eJw="), lambda p: spoiled(p, "11x8 " + "A" * 99), lambda p: spoiled(p, coded(2.0)),
    lambda p: spoiled(p, coded(float("nan"))),
])  # fmt: skip
def test_a_mask_painted_in_or_spoiled_counts_by_its_pixels(change):
    """Some programs keep text they do not know when they save a picture."""
    size, working = (91, 66), (88, 64)
    mask = (torch.rand(1, 1, 8, 11, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    picture = change(mask_picture(mask, size))
    plain = Image.fromarray(np.asarray(picture))
    assert torch.equal(latent_mask(picture, size, working), latent_mask(plain, size, working))


def test_another_working_size_reads_the_pixels():
    mask = torch.zeros(1, 1, 8, 11)
    mask[..., 2:4, 3:6] = 1
    picture = mask_picture(mask, (91, 66))
    plain = grey_picture(mask, (91, 66))
    assert torch.equal(latent_mask(picture, (91, 66), (176, 128)), latent_mask(plain, (91, 66), (176, 128)))


# ---------------------------------------------------------------- in edits and commands


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a picture of an odd size, and two masks."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 91, 3), dtype=np.uint8)).save("in.png")
    for name, box in (("left", (0, 0, 20, 70)), ("top", (0, 0, 91, 10))):
        mask = Image.new("L", (91, 70))
        mask.paste(255, box)
        mask.save(f"{name}.png")
    return tmp_path


def test_edit_and_mask_steer_the_same_way(sd, here):
    options = {"target": "a zebra", "steps": 4, "maps": 2, "seed": 0, "mask_threshold": 0.9}
    how = Steering(largest=True, dilate=1, feather=2, union="left.png", subtract="top.png")
    plain, steered = edit(sd, "in.png", **options), edit(sd, "in.png", steering=how, **options)
    assert torch.equal(steered.latent_mask, steered.steering(plain.latent_mask))
    assert 0 < steered.coverage < 1 and set(steered.latent_mask.unique().tolist()) - {0, 1}
    assert torch.equal(steered.found.mask, plain.found.mask)
    alone = picture_mask(sd, "in.png", steering=how, **options)
    assert torch.equal(alone.latent_mask, steered.latent_mask) and alone.coverage == steered.coverage
    assert alone.settings["steering"] == steered.settings["steering"]
    given = edit(sd, "in.png", mask="left.png", steering=Steering(invert=True), **options)
    assert torch.equal(given.latent_mask, 1 - given.given_mask) and given.evaluations["mask"] == 0


def test_where_prompts_do_not_differ_there_is_nothing_to_steer(sd, here):
    """Else an inverted mask would be all of the picture."""
    with pytest.warns(UserWarning, match="nothing to edit"):
        done = edit(sd, "in.png", target="a", source="a", steps=4, steering=Steering(invert=True))
    assert not done.latent_mask.any() and sum(done.evaluations.values()) == 0
    with pytest.warns(UserWarning, match="do not differ"):
        assert not picture_mask(sd, "in.png", target="a", source="a", steering=Steering(invert=True)).latent_mask.any()


def test_the_commands_steer_and_the_mask_comes_back(here, folder, capsys):
    """`mask` writes what `edit --mask` then takes for the very same mask, soft values included."""
    model = ["--model", folder]
    alone = ran(capsys, "mask", "in.png", *FAST, *STEERED, *model)
    steered = ran(capsys, "edit", "in.png", *FAST, *STEERED, "-o", "a.png", "--save-mask", "m.png", *model)
    assert Path("in-mask.png").read_bytes() == Path("m.png").read_bytes()
    assert alone["coverage"] == steered["coverage"] and alone["settings"]["steering"]["feather"] == 2
    given = ran(capsys, "edit", "in.png", *FAST, "--mask", "m.png", "-o", "b.png", *model)
    assert given["evaluations"]["mask"] == 0
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert a.tobytes() == b.tobytes()


def test_a_picture_says_how_to_make_it_again(here, folder, capsys):
    first = ran(capsys, "edit", "in.png", *FAST, *STEERED, "-o", "a.png", "--model", folder)
    with Image.open("a.png") as file:
        said = json.loads(file.text["minidiffedit"])
    files = {steer.digest(latent_mask(name, (91, 70), tuple(said["working_size"]))): name
             for name in ("left.png", "top.png")}  # fmt: skip
    again = []
    for name, value in said["steering"].items():
        again += [f"--{name}"] if value is True else [f"--{name}", files.get(value, value)]
    for name in ("target", "steps", "maps", "seed", "mask_threshold"):
        again += [f"--{name.replace('_', '-')}", said[name]]
    second = ran(capsys, "edit", "in.png", *again, "-o", "b.png", "--model", folder)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() and first["settings"] == second["settings"]


@pytest.mark.parametrize("options, word", [
    (["--dilate", "5000"], "dilate"), (["--feather", "-1"], "feather"), (["--union", "no.png"], "no such file"),
    (["--subtract", "in.txt"], "in.txt"), (["--subtract", "left.png", "-o", "left.png"], "overwrite"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["edit", "mask"])
def test_bad_steering_is_refused_before_the_model_is_loaded(here, capsys, command, options, word):
    Path("in.txt").write_text("no picture")
    assert cli.main([command, "in.png", *FAST, "--model", "no-such-model", *options]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and word in err


# ---------------------------------------------------------------- the cost, before running


@pytest.mark.parametrize("options", [
    [], ["--strength", "0.5"], ["--guidance-scale", "1"], ["--mask", "left.png"], ["--strength", "0"],
    ["--source", "a zebra"], ["--mask", "black.png"], ["--maps", "3", "--steps", "5", "--dilate", "1"],
], ids=" ".join)  # fmt: skip
def test_a_dry_run_says_what_the_edit_pays(here, folder, capsys, options):
    Image.new("L", (91, 70)).save("black.png")
    command = ["edit", "in.png", *FAST, *options, "-o", "o.png", "--quiet"]
    planned = ran(capsys, *command, "--dry-run", "--model", "no-such-model")
    assert not Path("o.png").exists() and planned["settings"]["steps"]
    assert ran(capsys, *command, "--model", folder)["evaluations"] == planned["evaluations"]


def test_a_dry_run_in_words(here, capsys):
    assert cli.main(["edit", "in.png", "--target", "a zebra", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("UNet rows 20 + 40 + 80 (mask, encode, decode) = 140\n")
