"""The shell's results before and after a change, by hash: the same runs by an earlier commit and by the working tree.

    python tests/bench/same_results.py                          # against the last commit of the first shell
    python tests/bench/same_results.py --before HEAD~1 --only steering batch
    python tests/bench/same_results.py --list

Each side makes its runs in a fresh process of this interpreter, on the CPU, with one thread, on the miniature: the
earlier commit from an export of its own in a temporary folder, both at the same time. Compared are the pixels of
pictures and masks, the float32 bytes of final latent, mask, maps, heat and of every level encoded and decoded, model
rows by stage, seed, verdict. A line a run says "equal", or what is not; exits with 1 if anything differs or fails.

What the earlier side has not is not compared: a `Result` may hold more. Files of states are not compared, what comes
back from them is. A tree with `minidiffedit/run.py` is called by the one door `edit(..., method)`, one without it by
the functions it had for each method.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
MODEL = HERE / "weights" / "mini"
FIRST_SHELL = "3751dde"

# ---------------------------------------------------------------- what is run

HORSE, ZEBRA = "a photo of a horse on a grass field", "a photo of a zebra on a grass field"
BEACH, COW = "a photo of a horse on a sandy beach", "a photo of a cow on a grass field"
DOG, CAT = "a photo of a dog on a sandy beach", "a photo of a cat on a sandy beach"
FEW = {"steps": 10, "seed": 7}
FILES = ("image", "mask", "union", "subtract")  # settings that name a file of `write_inputs`

Step = tuple[str, dict[str, Any]]


def edit(**settings: Any) -> Step:
    return "diffedit", {"target": ZEBRA, "source": HORSE, "maps": 4, **FEW} | settings


def under(mask: str, **settings: Any) -> Step:
    return "diffedit", {"target": ZEBRA, "mask": mask, **FEW} | settings


def sdedit(**settings: Any) -> Step:
    return "sdedit", {"target": ZEBRA, **FEW} | settings


def arm(name: str, **settings: Any) -> Step:
    return name, FEW | settings


def again(**changes: Any) -> Step:
    """The step before with some settings changed, and `reuse=` its result."""
    return "again", changes


def resumed(**changes: Any) -> Step:
    """What `resume` makes of the step before, saved and loaded."""
    return "resume", changes


def shell(*words: str) -> Step:
    """A command; IN/ and OUT/ stand for the inputs' and the results' folder."""
    return "shell", {"words": words}


def prompts(source: str = HORSE, target: str = ZEBRA) -> list[str]:
    return ["--source", source, "--target", target, "--steps", "10", "--maps", "4", "--seed", "7"]


PAIRS = [(HORSE, ZEBRA), (HORSE, BEACH)]
RUNS: dict[str, list[Step]] = {
    "defaults": [("diffedit", {"target": ZEBRA, "source": HORSE, "seed": 1})],
    "sdedit: defaults": [("sdedit", {"target": ZEBRA, "seed": 1})],
    "few steps": [edit()],
    "threshold": [edit(mask_threshold=0.3)],
    "no clip": [edit(mask_clip=None)],
    "no source": [edit(source="")],
    "strength 1": [edit(strength=1)],
    "strength .3": [edit(strength=0.3)],
    "strength 0": [edit(strength=0)],
    "mask strength": [edit(mask_strength=0.3)],
    "guidance 1": [edit(guidance_scale=1)],
    "refine 3": [edit(refine=3)],
    "encoded under the source": [edit(encode_text="source")],
    "negative prompt": [edit(negative_prompt=COW)],
    "size 96": [edit(size=96)],
    "odd picture": [edit(image="odd.png")],
    "no paste": [edit(paste=False)],
    "chunk 2": [edit(chunk=2)],
    "equal prompts": [edit(target=HORSE)],
    "12 steps": [edit(steps=12)],
    "bfloat16": [edit(dtype="bfloat16"), again(target=BEACH), resumed(mask_threshold=0.3)],
    "user mask": [under("mask.png")],
    "user mask: grey": [under("grey.png")],
    "user mask: latent cells": [under("cells.png", guidance_scale=3)],
    "user mask: empty": [under("empty.png")],
    "steering: largest": [edit(steering={"largest": True})],
    "steering: invert": [edit(steering={"invert": True})],
    "steering: dilate": [edit(steering={"dilate": 2})],
    "steering: shrink": [under("mask.png", steering={"dilate": -1})],
    "steering: feather": [edit(steering={"feather": 3})],
    "steering: union": [edit(steering={"union": "box.png"})],
    "steering: subtract": [edit(steering={"subtract": "box.png"})],
    "steering: all": [
        edit(steering={"largest": True, "dilate": 1, "feather": 2, "union": "box.png", "subtract": "grey.png"})
    ],
    "reuse": [
        edit(),
        again(mask_threshold=0.3),
        again(target=BEACH),
        again(strength=0.5),
        again(mask="mask.png"),
        again(mask=None, seed=8),
    ],
    "state": [edit(), ("load", {}), resumed(mask_threshold=0.3), resumed(target=BEACH), resumed(strength=0.4)],
    "state: steered": [
        edit(steering={"dilate": 1, "subtract": "box.png"}),
        ("load", {}),
        resumed(guidance_scale=3),
        resumed(steering={"feather": 2}),
        resumed(mask="mask.png"),
    ],
    "several edits": [("diffedit-regions", {"edits": PAIRS, "maps": 4, "mask_threshold": 0.3, **FEW})],
    "several edits: two sources": [
        ("diffedit-regions", {"edits": [(HORSE, ZEBRA), ("", BEACH), (COW, COW)], "maps": 4, **FEW})
    ],
    "arm: encode": [arm("encode-only", target=ZEBRA)],
    "arm: mask": [arm("mask-only", target=ZEBRA, source=HORSE, maps=4)],
    "arm: reconstruction": [arm("reconstruction")],
    "arm: sdedit": [arm("sdedit arm", target=ZEBRA)],
    "sdedit": [sdedit()],
    "sdedit: ve, eta 1, repeats 2, mask": [sdedit(form="ve", eta=1, repeats=2, mask="mask.png")],
    "sdedit: vp, eta 1, repeats 2": [sdedit(eta=1, repeats=2, negative_prompt=COW)],
    "sdedit: grey mask": [sdedit(mask="grey.png", eta=0.5)],
    "sdedit: any likely picture": [sdedit(target="", strength=0.3)],
    "sdedit: strength 0": [sdedit(strength=0)],
    "generate": [("generate", {"prompt": ZEBRA, **FEW})],
    "generate: wide": [("generate", {"prompt": DOG, "negative_prompt": COW, "width": 160, "height": 96, **FEW})],
    "mask": [("mask", {"target": ZEBRA, "source": HORSE, "maps": 4, **FEW})],
    "mask: steered": [("mask", {"target": ZEBRA, "maps": 3, "steering": {"dilate": 1, "union": "box.png"}, **FEW})],
    "shell: edit, resume": [
        shell("edit", "IN/horse.png", "-o", "OUT/a.png", *prompts(), "--save-mask", "OUT/m.png", "--save-heat",
              "OUT/h.png", "--save-state", "OUT/a.safetensors"),
        shell("resume", "OUT/a.safetensors", "-o", "OUT/b.png", "--mask-threshold", "0.3", "--dilate", "1"),
        shell("resume", "OUT/a.safetensors", "-o", "OUT/c.png", "--target", BEACH),
    ],
    "shell: sdedit": [
        shell("sdedit", "IN/odd.png", "-o", "OUT/a.png", "--target", ZEBRA, "--steps", "10", "--seed", "7", "--eta=1")
    ],
    "shell: mask": [shell("mask", "IN/horse.png", "-o", "OUT/a.png", *prompts(), "--save-heat", "OUT/h.png")],
    "shell: batch": [shell("batch", "IN/rows.jsonl", "-o", "OUT/batch", "--steps", "10", "--maps", "4")],
}  # fmt: skip

ROWS = [
    {"image": "horse.png", "source": HORSE, "target": ZEBRA, "output": "1.png", "seed": 7},
    {"image": "dog.png", "source": DOG, "target": CAT, "output": "2.png", "strength": 0.5},
    {"image": "horse.png", "source": HORSE, "target": ZEBRA, "output": "3.png", "seed": 7, "mask_threshold": 0.3},
    {"image": "horse.png", "source": HORSE, "target": BEACH, "output": "4.png", "subtract": "box.png", "feather": 1},
]


def write_inputs(folder: Path) -> None:
    from PIL import Image

    folder.mkdir()
    for name, scene in (("horse", "horse-zebra"), ("dog", "dog-cat")):
        with Image.open(MODEL / "scenes" / scene / "source.png") as picture:
            picture.save(folder / f"{name}.png")
            if name == "horse":
                picture.crop((15, 25, 108, 100)).save(folder / "odd.png")
    with Image.open(MODEL / "scenes" / "horse-zebra" / "mask.png") as mask:
        mask.save(folder / "mask.png")
        size = mask.size
    box, empty = Image.new("L", size), Image.new("L", size)
    empty.save(folder / "empty.png")
    box.paste(255, (16, 40, 72, 104))
    box.save(folder / "box.png")
    box.resize((size[0] // 8, size[1] // 8), Image.Resampling.BOX).save(folder / "cells.png")
    Image.linear_gradient("L").resize(size).save(folder / "grey.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


# ---------------------------------------------------------------- one side: the runs of one tree

ARMS = {"encode-only": "encode", "mask-only": "mask", "reconstruction": "reconstruction", "sdedit arm": "sdedit"}


def make_by_function(call: str, sd: Any, image: str, settings: dict[str, Any]) -> Any:
    """A method of the first shell, which had a function for each."""
    import minidiffedit as md

    if call in ARMS:
        return md.arm(sd, image, ARMS[call], **{"target": ""} | settings)
    return {"diffedit": md.edit, "sdedit": md.sdedit, "diffedit-regions": md.edit_regions}[call](sd, image, **settings)


def told_by_function(done: Any) -> dict[str, Any]:
    """The quantities of an Edit, Redrawn, Regions, PictureMask or Generation."""
    values = {name: getattr(done, name, None) for name in ("image", "latent")}
    if done.settings.get("mask") != "none" and hasattr(done, "mask"):
        latent_mask = sum(done.latent_masks) if hasattr(done, "latent_masks") else done.latent_mask
        values |= {"mask": done.mask, "latent mask": latent_mask}
    found = getattr(done, "found", None)
    if found and not isinstance(found, tuple):
        values |= {"maps": found.maps, "heat": found.heat}
    trajectory = getattr(done, "trajectory", {})
    if len(trajectory) > 1 and done.settings.get("encoded_text", "") is not None:  # None: noise, no encoding
        values["encode"] = list(trajectory.values())
    decoded = list(getattr(done, "decoded", ()))
    each = len(decoded) // done.settings.get("repeats", 1) or 1
    # A repeat's own end, which the next lays noise over, is no level of a Result; what comes of it is.
    return values | {"decode": [y for i, y in enumerate(decoded, 1) if i % each or i == len(decoded)]}


def make_by_name(call: str, sd: Any, image: str, settings: dict[str, Any]) -> Any:
    import minidiffedit as md

    if call == "sdedit arm":
        call, settings = "sdedit", {"strength": 0.8, "eta": 0} | settings
    return md.edit(sd, image, call, **settings)


def told_by_name(done: Any) -> dict[str, Any]:
    values = {name: getattr(done, name, None) for name in ("image", "latent", "mask")}
    stages, tensors = getattr(done, "stages", {}), getattr(done, "tensors", {})
    values |= {name: tensors.get(name) for name in ("maps", "heat")} | {"latent mask": done.latent_mask}
    return values | {name: list(stages.get(name, ())) for name in ("encode", "decode")}


def make_runs(root: Path, work: Path, inputs: Path, names: list[str]) -> None:
    """Print {name: quantities} of each run by the code under `root`, a line each."""
    import minidiffedit as md

    began = time.monotonic()
    check_origin(root)
    warnings.simplefilter("ignore")
    by_name = (root / "minidiffedit" / "run.py").exists()
    make, told = (make_by_name, told_by_name) if by_name else (make_by_function, told_by_function)
    model = functools.cache(lambda dtype: md.StableDiffusion.load(MODEL, device="cpu", dtype=dtype))

    def opened(settings: dict[str, Any]) -> dict[str, Any]:
        """Names of files as paths, a steering as one, without the dtype."""
        s = {name: str(inputs / value) if name in FILES and value else value for name, value in settings.items()}
        s |= {"steering": md.Steering(**opened(s["steering"]))} if "steering" in s else {}
        return {name: value for name, value in s.items() if name != "dtype"}

    def make_step(call: str, settings: dict[str, Any], sd: Any, before: Any, folder: Path) -> Any:
        s = opened(settings)
        if call in ("load", "resume"):
            md.save_state(before, folder / "state.safetensors")
            state = md.load_state(folder / "state.safetensors", sd)
            return md.resume(state, **s) if call == "resume" else state
        if call == "generate":
            return md.generate(sd, **s)
        image = s.pop("image", str(inputs / "horse.png"))
        if call == "mask":
            return md.picture_mask(sd, image, **s)
        return md.edit(sd, image, reuse=before, **s) if call == "again" else make(call, sd, image, s)

    for number, name in enumerate(names):
        folder, found = work / str(number), dict[str, Any]()
        folder.mkdir()
        dtype, settings, done = "float32", dict[str, Any](), None
        try:
            for step, (call, given) in enumerate(RUNS[name], 1):
                if call == "shell":
                    values = run_command(list(given["words"]), inputs, folder, by_name)
                else:
                    dtype = given.get("dtype", dtype)
                    settings = (settings if call == "again" else {}) | given
                    done = make_step(call, settings, model(dtype), done, folder)
                    values = told(done) | {"seed": done.seed, "rows": rows(done.evaluations, total=call == "generate")}
                    values |= {"verdict": done.verdict} if call in ("diffedit", "again", "load", "resume") else {}
                found |= {f"{step}. {what}": one for what, one in hashed(values).items()}
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps({name: found}))
    check_origin(root)
    print(json.dumps({"seconds": time.monotonic() - began}))


def check_origin(root: Path) -> None:
    """Every module of ours must come from this tree: an editable install would fill a gap from another, silently."""
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None) if name.split(".")[0] == "minidiffedit" else None
        if file and not Path(file).resolve().is_relative_to(root.resolve()):
            sys.exit(f"{name} comes from {file}, not from {root}")


def run_command(words: list[str], inputs: Path, folder: Path, by_name: bool) -> dict[str, Any]:
    """What a command wrote and said: pixels of its new pictures, rows, seed; of a batch, those of each row."""
    from PIL import Image

    from minidiffedit.cli import main

    if by_name and words[0] == "sdedit":
        words[:1] = ["edit", "--method", "sdedit"]
    words = [w.replace("IN/", f"{inputs}/", 1).replace("OUT/", f"{folder}/", 1) for w in words]
    options = ["--model", str(MODEL), "--device", "cpu", "--dtype", "float32", "--quiet", "--json"]
    there = set(folder.rglob("*.png"))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([*words, *options])
    if code:
        raise RuntimeError(f"{words[0]} ended with {code}: {err.getvalue().strip()}")
    told = json.loads(out.getvalue())
    lines = Path(told["table"]).read_text().splitlines() if words[0] == "batch" else []
    records = sorted(map(json.loads, lines), key=lambda record: record["row"]) or [told]
    # Of a picture's rows in a batch one pays for the others: which one is no matter.
    paid = collections.Counter(stage for r in records for stage, n in r["evaluations"].items() for _ in range(n))
    values: dict[str, Any] = {"seed": [r["seed"] for r in records], "rows": rows(dict(paid))}
    for path in sorted({*folder.rglob("*.png")} - there):
        with Image.open(path) as picture:
            values[path.name] = picture.copy()
    return values


def rows(evaluations: dict[str, int], total: bool = False) -> dict[str, int]:
    """Model rows by stage, those that cost nothing left out."""
    return {"all": sum(evaluations.values())} if total else {name: n for name, n in evaluations.items() if n}


def hashed(values: dict[str, Any]) -> dict[str, Any]:
    """Pictures and tensors as sha256 of kind, size and content, lists of them level by level; the rest as it is."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if hasattr(value, "tobytes"):
            found[name] = hashlib.sha256(f"{value.mode} {value.size} ".encode() + value.tobytes()).hexdigest()
        elif hasattr(value, "numpy"):
            content = value.detach().cpu().contiguous().numpy().tobytes()
            found[name] = hashlib.sha256(f"{value.dtype} {(*value.shape,)} ".encode() + content).hexdigest()
        elif name in ("encode", "decode"):
            found |= {f"{name} levels": len(value)} if value else {}
            found |= hashed({f"{name}[{level}]": one for level, one in enumerate(value)})
        elif value is not None:
            found[name] = value
    return found


# ---------------------------------------------------------------- both sides


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default=FIRST_SHELL, metavar="COMMIT", help="compared with (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="runs whose names hold one of these")
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--side", type=Path, nargs=3, help=argparse.SUPPRESS)  # the child: tree, folder, inputs
    args = parser.parse_args()
    names = [name for name in RUNS if any(part in name for part in args.only)]
    if not names:
        parser.error(f"no run's name holds {' or '.join(args.only)}")
    if args.side:
        make_runs(*args.side, names)
    elif args.list:
        print("\n".join(names))
    else:
        return compare(args.before, names)
    return 0


def compare(commit: str, names: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        export(commit, tmp / "tree")
        write_inputs(tmp / "inputs")
        sides = [start(root, tmp / name, tmp / "inputs", names) for root, name in ((tmp / "tree", "a"), (HERE, "b"))]
        try:
            (before, took), (after, took_after) = (finished(*side) for side in sides)
        finally:
            for process, *_ in sides:
                process.kill()
                process.wait()
    width, different = max(map(len, names)), 0
    for name in names:
        wrong = differences(before[name], after[name])
        different += bool(wrong)
        paid = [said(value) for what, value in before[name].items() if what.endswith(". rows")]
        state = "DIFFERENT: " + "; ".join(wrong) if wrong else f"equal, {len(before[name])} values"
        print(f"{name:{width}}  {state}  (rows {' | '.join(paid)})")
    values = sum(map(len, before.values()))
    print(f"{len(names) - different} of {len(names)} runs equal to {commit}'s in all of {values} values")
    print(f"{took:.0f} s before, {took_after:.0f} s after, side by side")
    return int(different > 0)


def export(commit: str, folder: Path) -> None:
    """The package as it was; the working tree and its branches are left alone."""
    folder.mkdir()
    archive = subprocess.run(["git", "-C", HERE, "archive", commit, "minidiffedit"], capture_output=True)
    if archive.returncode:
        sys.exit(f"no commit {commit} in this clone: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)


def start(root: Path, work: Path, inputs: Path, names: list[str]) -> tuple[subprocess.Popen, Path, Path]:
    """The runs of one tree, begun: the process, and the files of its output and its errors."""
    work.mkdir()
    output, errors = work / "output", work / "errors"
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--side", root, work, inputs, "--only", *names]
    with output.open("wb") as out, errors.open("wb") as err:
        return subprocess.Popen(command, cwd=work, env=env, stdout=out, stderr=err), output, errors


def finished(process: subprocess.Popen, output: Path, errors: Path) -> tuple[dict[str, dict[str, Any]], float]:
    """Each run's quantities, and the seconds of all."""
    if process.wait():
        sys.exit(f"{process.args[3]}: exit code {process.returncode}\n{errors.read_text()[-2000:]}")
    found: dict[str, Any] = {}
    for line in output.read_text().splitlines():
        found |= json.loads(line)
    return found, found.pop("seconds")


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of the earlier run is not the same in the later one, the levels of a stage told together."""
    sides = ("before", before), ("after", after)
    if failed := [f"fails {when}: {one['error']}" for when, one in sides if "error" in one]:
        return failed
    wrong: dict[str, list[str]] = {}
    for what, value in before.items():
        if after.get(what) != value:
            stage, level, _ = what.partition("[")
            plain = not isinstance(value, str) or len(value) != 64
            shown = f" was {said(value)}, is {said(after[what])}" if plain and what in after else ""
            wrong.setdefault(stage + ("" if what in after else " missing") + shown, []).append(level.rstrip("]"))
    return [stage + (f" at {len(levels)} levels" if levels[0] else "") for stage, levels in wrong.items()]


def said(value: Any) -> str:
    if isinstance(value, dict):
        return " + ".join(f"{n} {name}" for name, n in value.items()) or "none"
    return ", ".join(map(said, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
