"""The bench command: its counts against a count by hand and the known figures, its times against a stopped clock."""

import json
import math
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from minidiffedit import StableDiffusion, cli
from minidiffedit.attention import sdpa
from minidiffedit.many import bench
from minidiffedit.many.bench import FULL, TINY, counted, judged, peak, reset_peak, timed, write_random

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("random") / "tiny", TINY, torch.float32)


def by_hand(call, module):
    """Twice the multiplications of every convolution, linear layer and attention, from the shapes that pass."""
    total, hooks = 0, []

    def seen(layer, inputs, out):
        nonlocal total
        per_number = layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else layer.in_features
        total += 2 * per_number * out.numel()

    def attend(site, q, k, v):
        nonlocal total
        total += 2 * 2 * math.prod(q.shape) * k.shape[-2]  # q k' and its product with v
        return sdpa(site, q, k, v)

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            hooks.append(layer.register_forward_hook(seen))
    try:
        call(attend)
    finally:
        for hook in hooks:
            hook.remove()
    return total / 1e12


def test_work_is_what_passes_through_the_layers():
    sd = tiny.model()
    found, text = counted(sd, 64), torch.zeros(1, 77, 24)
    x, image = torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 64, 64)
    for name, call, module in (
        ("UNet, 1 text", lambda attend: sd.unet(x, 481, text, attend), sd.unet),
        ("UNet, 2 texts", lambda attend: sd.unet(x, 481, torch.cat([text, text]), attend), sd.unet),
        ("VAE encode", lambda attend: sd.vae.encode(image, attend), sd.vae),
        ("VAE decode", lambda attend: sd.vae.decode(x, attend), sd.vae),
    ):
        assert found[name] == pytest.approx(by_hand(call, module), rel=1e-9), name
    assert found["UNet, 2 texts"] < 2 * found["UNet, 1 text"]  # the shared prefix is not paid twice


@pytest.mark.slow
def test_the_full_model_costs_what_is_known():
    """GFLOP at 512 x 512 as counted once with diffusers' and transformers' networks."""

    class Shapes:
        def __init__(self, config):
            self.config = config

    sd = type("Full", (), {"factor": 8, "channels": 4})()
    sd.unet, sd.vae, sd.clip = (Shapes(FULL[name]) for name in ("unet", "vae", "text_encoder"))
    found = {name: round(1000 * tflop, 1) for name, tflop in counted(sd, 512).items()}
    assert found["UNet, 1 text"] == 803.3 and found["VAE encode"] == pytest.approx(1117, abs=0.5)
    assert found["VAE decode"] == pytest.approx(2515, abs=0.5) and found["text"] == 13.3
    assert 0.05 < 2 - found["UNet, 2 texts"] / found["UNet, 1 text"] < 0.054  # 5.2 % of a row


def test_times_are_the_clocks():
    """Calls that take 3, 1, 2 seconds by a clock of the test's own."""
    now, lasts = [0.0], [3.0, 1.0, 2.0]

    class Clock:
        def clock(self):
            return now[0]

    def call():
        now[0] += lasts.pop(0)

    times = timed(Clock(), call, 3)
    assert (times["seconds"], times["least"], times["most"]) == (2, 1, 3) and not lasts
    assert times["cpu_over_wall"] < 0.5  # the process did nothing in these seconds


def test_the_command_measures_every_stage(folder, capsys):
    """`--tiny --json`: one object, the rows that an edit is known to cost, and no weights left behind."""
    assert cli.main(["bench", "--tiny", "--repeats", "1", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == "" and found["edit"]["rows"] == {"mask": 4, "encode": 3, "decode": 6}
    assert found["edit"]["further"]["rows"] == {"mask": 2, "encode": 0, "decode": 6}
    samples = {name: row["samples"] for name, row in found["stages"].items()}
    assert samples == {
        "text": 1, "VAE encode": 1, "UNet, 1 text": 1, "UNet, 2 texts": 2, "VAE decode": 1, "mask, 2 maps": 4,
    }  # fmt: skip
    for row in found["stages"].values():
        assert 0 < row["least"] <= row["seconds"] <= row["most"] and row["first_seconds"] > 0
        assert row["tflop_per_s"] == pytest.approx(row["tflop"] / row["seconds"])
        assert row["of_ceiling"] == pytest.approx(row["tflop_per_s"] / found["ceiling"]["tflop_per_s"])
        assert row.get("error", 0) == 0  # the plain path against itself
    assert found["model"]["size"] == 64
    assert found["memory"]["peak_bytes"] > found["memory"]["weights_bytes"] > 4 * 10**6
    assert not list(Path(bench.__file__).parent.glob("minidiffedit-bench-*"))


def test_the_command_says_it_in_a_table(folder, capsys):
    assert cli.main(["bench", "--model", str(folder), "--size", "72", "--repeats", "1", "--maps", "1"]) == 0
    out, err = capsys.readouterr()
    assert "72 x 72 pixels" in out and "2 + 3 + 6 rows" in out and "ABOVE" not in out
    assert [line for line in out.splitlines() if line.startswith("UNet, 2 texts")] and "measuring: VAE decode" in err


def test_what_cannot_be_measured_is_refused(folder, capsys):
    for options, words in (
        ("--size 100", "multiple of 8"),
        ("--size 32", "from 64 to 1024"),
        ("--repeats 0", "repeats"),
        ("--steps 0", "steps"),
    ):
        assert cli.main(["bench", "--model", str(folder), *options.split()]) == 1
        assert words in capsys.readouterr().err
    assert cli.main(["bench", "--tiny", "--model", str(folder)]) == 1
    assert "leave out --model" in capsys.readouterr().err


def test_a_wrong_fast_path_shows(folder):
    """A model whose attention is off by a hundredth, as the user's; its plain twin is right."""

    def load(plain):
        sd = StableDiffusion.load(folder, device="cpu", dtype="float32")
        if not plain:
            sd.attend = lambda site, q, k, v: 1.01 * sdpa(site, q, k, v)
        return sd

    found = bench.bench(load, repeats=1, maps=1)
    row = found["stages"]["UNet, 2 texts"]
    assert row["error"] > row["error_bound"] == 1e-5
    from minidiffedit.commands.models import say_error

    assert "ABOVE 1e-05" in say_error(row)


def test_errors_are_relative_and_bounded_by_dtype():
    sd = tiny.model()
    got, expected = torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])
    assert judged(sd, got, expected) == {"error": pytest.approx(0.1), "error_bound": 1e-5}
    sd.dtype = torch.bfloat16
    assert judged(sd, got, expected)["error_bound"] == 2e-2


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="`reset_peak` needs /proc/self/clear_refs, which only Linux has; `bench` says so elsewhere",
)
def test_peak_memory_counts_from_the_reset():
    sd = tiny.model()
    reset_peak()
    before = peak(sd)
    block = torch.ones(50_000_000)  # 200 MB
    assert peak(sd) - before > 190e6
    del block
    reset_peak()
    assert peak(sd) - before < 100e6


def test_random_weights_keep_activations_near_one(folder):
    sd = StableDiffusion.load(folder, device="cpu", dtype="float32")
    assert StableDiffusion.load(folder, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for out in (*sd.eps(x, 481, [sd.text(["a horse"])]), sd.decode(x), sd.encode(torch.zeros(1, 3, 64, 64)) / 0.18215):
        assert 0.2 < float(out.std()) < 5


# ---------------------------------------------------------------- tests/bench/alternating.py


def test_alternating_compares_neighbours(monkeypatch):
    """On a machine that gets slower by the second, pairs still show that a takes half of b's time."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    import alternating

    now, calls = [0.0], []
    monkeypatch.setattr(alternating.time, "perf_counter", lambda: now[0])

    def work(name, units):
        def call():
            calls.append(name)
            now[0] += units * (1 + now[0] / 1000)

        return call

    found = alternating.alternate(work("a", 1), work("b", 2), pairs=5)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba" + "ab"
    assert found["ratio"] == pytest.approx(0.5, abs=0.003) and found["least"] <= found["ratio"] <= found["most"]
    assert "0.5" in alternating.row("C1", "work", found, 0.6) and "met" in alternating.row("C1", "work", found, 0.6)
    assert "MISSED" in alternating.row("C1", "work", found, 0.4)
    sys.modules.pop("alternating")
