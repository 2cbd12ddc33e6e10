"""Ours against OpenVINO on this machine's CPU: C6 a UNet call, quiet; C7 beside one busy process; and a whole edit.

    python tests/bench/against_openvino.py [--size 512] [--rounds 6] [--only b1 b2 edit] [--json FILE]

Needs the package openvino (`pip install openvino`, in an environment of its own if you like). Each side lives in a
process of its own, as its threads wait in their own way, and is asked in turn: A B A B, B A B A. Sides: ours as it
comes; with --sides, minutes at first, compiled by torch, or ours-openvino; OpenVINO, which reads our own UNet, traced,
or with --peer another of ours in its place. OpenVINO's sides hold 9 and 14 GiB: both do not fit into 24 with `edit`.
b1: one row, as in encoding; b2: a guided pair; edit: 5 steps, 2 maps, OpenVINO's UNet in our schedule. What is shown:
median seconds, the median of the pairs' ratios ours / OpenVINO with its range, the relative difference of the results,
of each side the seconds until its first answer and its peak memory (Linux).
Both sides get the machine's defaults: ours what `import minidiffedit` sets. Exits with 1 where a limit is missed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
MUST = 1.05
TASKS = ("b1", "b2", "edit")
COMPILE = {"compiled": "torch", "ours-openvino": "openvino"}  # by side
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # convert_model would report to its maker


# ---------------------------------------------------------------- in the process of a side


def side(args: argparse.Namespace) -> None:
    """Reads a task a line, answers with its seconds; the results of a first call go to a file."""
    sys.path.insert(0, str(ROOT))
    import torch

    from minidiffedit import StableDiffusion, edit
    from minidiffedit.many.verify import picture

    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    sd = StableDiffusion.load(args.weights, device="cpu", dtype=args.dtype, compile=COMPILE.get(args.side, False))
    if args.side == "openvino":
        sd.unet = OpenVINO(sd, args)  # type: ignore[assignment]
    cells = args.size // sd.factor
    x = torch.randn(1, 4, cells, cells, generator=torch.Generator().manual_seed(0))
    texts = [sd.text([prompt]) for prompt in ("a horse", "a zebra")]
    photo = picture(args.size)
    settings: dict[str, Any] = {"source": "a horse", "target": "a zebra", "size": args.size, "seed": 0}
    calls: dict[str, Any] = {
        "b1": lambda: torch.cat(sd.eps(x, 481, texts[:1])), "b2": lambda: torch.cat(sd.eps(x, 481, texts)),
        "edit": lambda: edit(sd, photo, steps=5, maps=2, **settings).latent,
    }  # fmt: skip
    known: dict[str, Any] = {}
    for line in sys.stdin:
        task = line.strip()
        with torch.no_grad():
            if task not in known:
                known[task] = calls[task]().float()
                torch.save(known, args.into)
            start = time.perf_counter()
            calls[task]()
        answers.write(f"{time.perf_counter() - start}\n")
        answers.flush()


class OpenVINO:
    """Our UNet, traced and compiled by OpenVINO, in its place; one model for each number of rows."""

    def __init__(self, sd: Any, args: argparse.Namespace):
        import torch

        self.plain, self.made, self.dtype = sd.unet, dict[tuple[int, ...], Any](), sd.dtype
        self.config, self.conv_in = sd.unet.config, SimpleNamespace(weight=torch.empty(0, dtype=sd.dtype))
        self.hint = {"bfloat16": "bf16", "float16": "f16"}.get(args.dtype, "f32")
        self.counters = args.counters

    def build(self, x: Any, t: Any, text: Any) -> Any:
        import openvino
        import torch

        class Traced(torch.nn.Module):
            def __init__(self, unet: Any):
                super().__init__()
                self.unet = unet

            def forward(self, x: Any, t: Any, text: Any) -> Any:
                return self.unet(x, t, text)

        self.plain.float()
        model = openvino.convert_model(Traced(self.plain), example_input=(x, t, text))
        model.reshape({i: list(one.shape) for i, one in enumerate((x, t, text))})
        options = {"INFERENCE_PRECISION_HINT": self.hint, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": self.counters}
        return openvino.Core().compile_model(model, "CPU", options)

    def __call__(self, x: Any, t: int, text: Any, *hooks: Any) -> Any:
        import torch

        given = x.float().contiguous(), torch.full((1,), t), text.float().contiguous()
        shape = (*x.shape, len(text))
        if shape not in self.made:
            self.made[shape] = self.build(*given)
        (out,) = self.made[shape]([one.numpy() for one in given]).values()
        return torch.from_numpy(out.copy()).to(self.dtype)


def counters(args: argparse.Namespace) -> None:
    """Prints where the time of one row goes, by kind of operation: ours by torch's profiler, then OpenVINO's count."""
    import torch
    from torch.profiler import profile

    from minidiffedit import StableDiffusion

    sd = StableDiffusion.load(args.weights, device="cpu", dtype=args.dtype)
    x, text = torch.randn(1, 4, args.size // sd.factor, args.size // sd.factor), sd.text(["a horse"])
    with torch.no_grad():
        for _ in range(3):
            sd.eps(x, 481, [text])
        with profile() as seen:
            sd.eps(x, 481, [text])
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=60))
        peer = OpenVINO(sd, args)
        given = x, torch.full((1,), 481), text.float()
        request = peer.build(*given).create_infer_request()
        found: dict[str, float] = {}
        for _ in range(3):
            request.infer([one.numpy() for one in given])
        for one in request.get_profiling_info():
            found[one.node_type] = found.get(one.node_type, 0) + 1e3 * one.real_time.total_seconds()
    for kind, spent in sorted(found.items(), key=lambda item: -item[1])[:8]:
        print(f"OpenVINO  {kind:20} {spent:8.1f} ms")


# ---------------------------------------------------------------- in turn


class Side:
    """A process that does one task at a time when it is asked."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path):
        self.into = folder / f"{name}.pt"
        words = ["--side", name, "--weights", str(args.weights), "--size", str(args.size), "--dtype", args.dtype]
        command = [sys.executable, __file__, *words, "--into", str(self.into)]
        own = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_", "GOMP_", "KMP_"))}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)

    def seconds(self, task: str) -> float:
        assert self.process.stdin and self.process.stdout
        print(task, file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"the process of {self.into.stem} ended with {self.process.wait()}")
        return float(answer)

    def peak(self) -> float:
        """GiB, the most it has held."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def compared(sides: dict[str, Side], task: str, rounds: int) -> dict[str, Any]:
    *_, peer = sides
    for name, one in sides.items():
        start = time.perf_counter()
        one.seconds(task)  # loads, builds and warms up
        print(f"{task}: {name}: first answer after {time.perf_counter() - start:.1f} s", flush=True)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            found[name].append(sides[name].seconds(task))
    made: dict[str, Any] = {"seconds": {name: median(each) for name, each in found.items()}}
    for name in sides.keys() - {peer}:
        ratios = [a / b for a, b in zip(found[name], found[peer])]
        made[name] = {"ratio": median(ratios), "least": min(ratios), "most": max(ratios)}
    return made


def shown(name: str, found: dict[str, Any], differ: dict[str, float], peer: str) -> str:
    parts = []
    for side_name in found.keys() - {"seconds"}:
        one, seconds = found[side_name], found["seconds"]
        verdict = "met" if one["ratio"] <= MUST else "MISSED"
        parts.append(
            f"{name:9} {side_name:9} {one['ratio']:.3f} ({one['least']:.3f}..{one['most']:.3f}), "
            f"{seconds[side_name]:.2f} / {seconds[peer]:.2f} s, differ by {differ[side_name]:.1e}  "
            f"{verdict} ({MUST})"
        )
    return "\n".join(sorted(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the picture (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--only", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--sides", nargs="+", default=["ours"], choices=["ours", *COMPILE])
    parser.add_argument("--peer", default="openvino", choices=["openvino", "ours", *COMPILE], help="(%(default)s)")
    parser.add_argument("--counters", action="store_true", help="only where the time of one row goes")
    parser.add_argument("--no-busy", action="store_true", help="leave out C7")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="a model's folder, in place of random weights")
    parser.add_argument("--json", type=Path, metavar="FILE")
    for name in ("--side", "--into"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side(args)
        return 0
    import torch
    from load_peak import write_folder

    all_found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        if not args.weights:
            args.weights = Path(temporary) / "weights"
            write_folder(args.weights)
        if args.counters:
            counters(args)
            return 0
        where = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, {args.size} px"
        print(f"{time.strftime('%F %T')}, {where}", flush=True)
        sides = {name: Side(name, args, Path(temporary)) for name in (*args.sides, args.peer)}
        try:
            for busy in (False, True)[: 1 if args.no_busy else 2]:
                other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
                try:
                    for task in args.only if not busy else [one for one in args.only if one == "b2"]:
                        name = f"{'C7' if busy else 'C6'} {task}"
                        all_found[name] = compared(sides, task, args.rounds)
                        made = {one: torch.load(each.into)[task] for one, each in sides.items()}
                        peer = made.pop(args.peer)
                        differ = {one: float((each - peer).norm() / peer.norm()) for one, each in made.items()}
                        print(shown(name, all_found[name], differ, args.peer), flush=True)
                        print(*(f"{one}: peak {each.peak():.1f} GiB" for one, each in sides.items()), sep="\n")
                finally:
                    if other:
                        other.kill()
                        other.wait()
        finally:
            for one in sides.values():
                one.process.kill()
                one.process.wait()
    if args.json:
        args.json.write_text(json.dumps(all_found, indent=1) + "\n")
    ratios = [found["ratio"] for each in all_found.values() for name, found in each.items() if name != "seconds"]
    return int(any(ratio > MUST for ratio in ratios))


if __name__ == "__main__":
    sys.exit(main())
