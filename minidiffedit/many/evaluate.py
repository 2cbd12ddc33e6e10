"""Methods and settings over a data set: one JSON line per edit, a summary and plots.

A second run goes on where the first stopped: each line carries a key made of what its edit depends on, the pictures'
content included, and is not computed again. An edit that fails is written down and tried again next time.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import images
from ..plans import Plan, blank_plan, plan
from ..result import Result
from ..run import execute
from . import perceptual
from .datasets import Item
from .metrics import iou, mse, psnr, ssim

if TYPE_CHECKING:
    from ..sd import StableDiffusion

PLAIN = ("psnr", "mse", "ssim", "iou")
LOADERS: dict[str, Callable[[str], Any]] = {
    "lpips": lambda device: perceptual.load_lpips("squeeze", device),
    "clip": lambda device: perceptual.load_clip(device=device),
    "structure": lambda device: perceptual.load_dino(device=device),
    "fid": lambda device: perceptual.load_inception(device=device),
}
OF_AN_ITEM = ("source", "target", "edits", "mask")  # what an item can give to a method


# ---------------------------------------------------------------- one edit


def measures(
    metrics: Iterable[str],
    edited: Any,
    source: Any,
    *,
    mask: np.ndarray | None = None,
    true_edit: Any = None,
    texts: tuple[str, str] = ("", ""),
    pie: bool = False,
    networks: dict[str, Any] | None = None,
) -> dict[str, float | None]:
    """Figures of one edit, by name; None for what is infinite or undefined.

    edited, source, true_edit: pictures of one size, as in metrics.py; mask (H, W) bool, where the edit may act.
    psnr, mse, ssim: NAME_source on the whole picture, background_NAME outside the mask, NAME_true against the true
    edit. lpips: the same three. structure: between source and edit. clip: clip_source and clip_target, each picture
    with its own text, clip_edited the edit inside the mask, all else black, and clip_direction.
    pie: pie_NAME, the background as PIE-Bench's own evaluation has it (2310.01506, section 5): pictures in [0, 1],
    black inside the mask, over all pixels.
    networks: by the names of LOADERS, what they return. Definitions and sources: metrics.py, perceptual.py.
    """
    found: dict[str, float] = {}
    edited, source = np.asarray(edited), np.asarray(source)
    outside = None if mask is None or mask.all() else ~mask
    known = {name: network for name, network in (networks or {}).items() if name in metrics}
    pairs: dict[str, Callable[..., float]] = {"psnr": psnr, "mse": mse, "ssim": ssim}
    pairs = {name: function for name, function in pairs.items() if name in metrics}
    if lpips := known.get("lpips"):
        pairs["lpips"] = lambda a, b, where=None: perceptual.lpips(a, b, lpips, where)
    for name, function in pairs.items():
        found[f"{name}_source"] = function(edited, source)
        if outside is not None:
            found[f"background_{name}"] = function(edited, source, outside)
        if true_edit is not None:
            found[f"{name}_true"] = function(edited, true_edit)
        if pie and outside is not None and name != "lpips":
            black = [np.where(outside[..., None], picture, 0) for picture in (edited, source)]
            found[f"pie_{name}"] = function(*black) / (255**2 if name == "mse" else 1)
    if "structure" in known:
        found["structure"] = perceptual.structure_distance(edited, source, known["structure"])
    if clip := known.get("clip"):
        found["clip_source"] = perceptual.clip_score(source, texts[0], clip)
        found["clip_target"] = perceptual.clip_score(edited, texts[1], clip)
        found["clip_direction"] = perceptual.clip_direction(source, edited, *texts, clip)
        if mask is not None and mask.any():
            found["clip_edited"] = perceptual.clip_score(np.where(mask[..., None], edited, 0), texts[1], clip)
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


# ---------------------------------------------------------------- what is asked for


def grid(methods: Sequence[str], options: dict[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Every method, or INVERSION+EDITOR, under every combination of the options that it has, each once:
    {"method": ..., option: ...}. Raises ValueError for methods, seeds and values that no edit would take, for an option
    that no method has, and for a method that needs more than a data set has.
    """
    blanks = {blank.method: blank for blank in map(blank_plan, methods)}
    if unused := options.keys() - {name for blank in blanks.values() for name in blank.options}:
        raise ValueError(f"none of {', '.join(blanks)} has an option {min(unused)!r}")
    found = []
    for method, blank in blanks.items():
        if lacking := {*blank.needs} - {*OF_AN_ITEM}:
            raise ValueError(f"{method} needs {min(lacking)}, which a data set does not have")
        own = {name: dict.fromkeys(values) for name, values in options.items() if name in blank.options}
        blank.options["seed"].check(seed)
        for name, value in ((one, value) for one in own for value in own[one]):
            blank.options[name].check(value)
        found += [{"method": method} | dict(zip(own, values)) for values in product(*own.values())]
    return found


def plan_of(run: dict[str, Any], seed: int, item: Item, mask: np.ndarray | None) -> Plan:
    """A run on an item. mask: the true one, for methods that cannot do without. Raises ValueError as `plan`."""
    blank = blank_plan(run["method"])
    if mask is None and "mask" in blank.needs:
        raise ValueError(f"{run['method']} needs an item with a mask")
    has: dict[str, Any] = {"source": item.source, "target": item.target, "edits": [(item.source, item.target)]}
    has |= {"mask": mask} if "mask" in blank.needs else {}
    return plan(**run, seed=seed, **{name: value for name, value in has.items() if name in blank.given})


# ---------------------------------------------------------------- all of them


def evaluate(
    sd: "StableDiffusion",
    items: Sequence[Item],
    runs: Sequence[dict[str, Any]],
    output: Path,
    *,
    metrics: Sequence[str] = PLAIN,
    seed: int = 0,
    identity: dict[str, Any] | None = None,
    networks: dict[str, Any] | None = None,
    save_pictures: bool = False,
    track: Callable[[list[Any], str], Iterable[Any]] = lambda jobs, name: jobs,
) -> list[dict[str, Any]]:
    """Edit every item by every run of `grid`, and measure; lines go to `output`/edits.jsonl. Returns those asked for.

    A line holds key, item, kind, run, seed and either error, one line of text, or verdict, coverage,
    model_rows, seconds and metrics (see `measures`; iou: of the mask with the true one, on the latent grid). The seed
    of an item follows from `seed` and its content, and is the same in all runs, which share what they compute alike.
    identity: what of the model decides the result. networks: what `load_networks` returns. save_pictures: into
    `output`/pictures/KEY.png. track(jobs, "edits"): the edits to be made one by one, e.g. under a progress bar.
    Raises ValueError for a file of other lines, OSError where it cannot be written. An edit's errors are written down.
    """
    path, pictures = output / "edits.jsonl", output / "pictures" if save_pictures else None
    (pictures or output).mkdir(parents=True, exist_ok=True)
    written = read_rows(path)
    if any("key" not in row for row in written):
        raise ValueError(f"{path} holds lines that are no evaluation's; name another folder")
    kept = {row["key"]: row for row in written if "error" not in row}
    rows = {key: row for key, row in kept.items() if not pictures or (pictures / f"{key}.png").is_file()}
    settings, jobs = [blank_plan(run["method"]).settings | run for run in runs], list[Any]()
    for item in items:
        content = digest(item)
        own = int(sha256(f"{seed} {content}".encode()).hexdigest()[:8], 16)
        for run, decided in zip(runs, settings):
            about = json.dumps([content, decided, own, sorted(metrics), identity, save_pictures])
            jobs.append((item, run, own, sha256(about.encode()).hexdigest()[:16]))
    earlier, last = dict[Any, Result](), None
    for item, run, own, key in track([job for job in jobs if job[-1] not in rows], "edits"):
        if item is not last:
            earlier, last = {}, item
        row, start = {"key": key, "item": item.name, "kind": item.kind, "run": run, "seed": own}, time.perf_counter()
        try:
            done = edit_item(sd, item, run, own, earlier)
            found = measured(done, item, metrics, networks or {})
            if pictures:
                images.write_picture(done.image, pictures / f"{key}.png")
            row |= found | {"seconds": time.perf_counter() - start}
        except Exception as error:  # one edit's failure, whatever it is, must not end the others
            row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        rows[key] = row
        append_row(path, row)
    return [rows[key] | {"item": item.name, "kind": item.kind, "run": run} for item, run, _, key in jobs]  # as today


def edit_item(sd: "StableDiffusion", item: Item, run: dict[str, Any], seed: int, earlier: dict[Any, Result]) -> Result:
    """earlier: this item's last edit at each size, whose place this one takes; it hands on what was computed."""
    source = images.to_rgb(images.read_picture(item.picture))
    settled = plan_of(run, seed, item, item.truth(source.size))
    size = settled.settings["size"]
    done = earlier[size] = execute(settled, sd, source, reuse=[earlier[size]] if size in earlier else [])
    return done


def measured(done: Result, item: Item, metrics: Sequence[str], networks: dict[str, Any]) -> dict[str, Any]:
    """What a line says of an edit that went well."""
    source: Any = done.source
    mask, texts = item.truth(source.size), (item.source, item.target)
    true_edit = images.to_rgb(images.read_picture(item.true_edit)) if item.true_edit else None
    seen: dict[str, Any] = {"mask": mask, "true_edit": true_edit, "texts": texts, "pie": item.layout == "pie"}
    found = measures(metrics, done.image, source, networks=networks, **seen)
    if "iou" in metrics and mask is not None and done.heat is not None and done.latent_mask is not None:
        truth = images.latent_mask(mask.astype(np.float32), source.size, done.settings["working_size"], done.sd.factor)
        found["iou"] = iou((done.latent_mask > 0).cpu().numpy(), (truth > 0.5).numpy())
    return {"verdict": done.verdict, "coverage": done.coverage, "model_rows": done.rows, "metrics": found}


def load_networks(metrics: Sequence[str], device: str) -> dict[str, Any]:
    """The networks of the metrics that need one. Raises ValueError for a missing package, OSError for weights."""
    return {name: load(device) for name, load in LOADERS.items() if name in metrics}


def digest(item: Item) -> str:
    """Of all that an item is made of, by content; a file that cannot be read counts as its error."""
    parts = [item.source, item.target, item.layout]
    for part in (item.picture, item.mask, item.true_edit):
        try:
            parts.append(sha256(part.read_bytes()).hexdigest() if isinstance(part, Path) else str(part))
        except OSError as error:
            parts.append(type(error).__name__)
    return sha256(json.dumps(parts).encode()).hexdigest()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none if there is no file. A last line that a kill tore, and so has no end, is cut off, on
    disk too; ValueError for any other line that is no JSON object.
    """
    whole = path.read_bytes() if path.exists() else b""
    rows, good = [], 0
    for number, line in enumerate(whole.splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not line.endswith(b"\n"):
                raise ValueError("no JSON object")
        except (ValueError, RecursionError) as error:
            if line.endswith(b"\n"):
                raise ValueError(f"{path}, line {number}: {error}; remove the line or name another folder") from error
            os.truncate(path, good)
            break
        rows.append(row)
        good += len(line)
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """One line in one write: a kill leaves it whole, absent or torn at the end, which `read_rows` mends."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")


def write_json(path: Path, content: Any) -> None:
    """Raises ValueError for NaN and infinity."""
    images.write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


# ---------------------------------------------------------------- the summary


def summarise(rows: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per run: name, run; done and failed, how many edits; model_rows and seconds, means of an edit;
    kinds: {"all" or a kind of edit: {metric, or coverage: {"mean": ..., "n": how many edits have a finite one}}}.
    """
    summary = []
    for run in runs:
        own = [row for row in rows if row["run"] == run]
        done = [row for row in own if "error" not in row]
        kinds = {"all": done} | {k: [row for row in done if row["kind"] == k] for k in sorted({r["kind"] for r in own})}
        kinds.pop("", None)
        one = {"name": name_of(run, runs), "run": run, "done": len(done), "failed": len(own) - len(done)}
        one |= {figure: mean([row[figure] for row in done]) for figure in ("model_rows", "seconds")}
        figures = {kind: [row["metrics"] | {"coverage": row["coverage"]} for row in kinds[kind]] for kind in kinds}
        summary.append(one | {"kinds": {kind: means(group) for kind, group in figures.items()}})
    return summary


def means(figures: Sequence[dict[str, float | None]]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(name for one in figures for name in one)
    columns = {name: [one[name] for one in figures if one.get(name) is not None] for name in names}
    return {name: {"mean": mean(values), "n": len(values)} for name, values in columns.items()}


def mean(values: Sequence[Any]) -> float | None:
    return float(np.mean(values)) if values else None


def name_of(run: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """The method, and what sets its runs apart."""
    same = [one for one in runs if one["method"] == run["method"]]
    apart = [name for name in run if name != "method" and len({one[name] for one in same}) > 1]
    return " ".join([run["method"], *(f"{name} {run[name]}" for name in apart)])


def realism(rows: Sequence[dict[str, Any]], items: Sequence[Item], output: Path, network: Any) -> dict[str, Any]:
    """FID and KID of saved edits against the set's own pictures: {"fid": ..., "kid": ..., "n": edits}; None for either
    where there are fewer than two edits or items.
    """
    done = [row for row in rows if "error" not in row]
    if min(len(done), len(items)) < 2:
        return {"fid": None, "kid": None, "n": len(done)}
    made = (images.read_picture(output / "pictures" / f"{row['key']}.png") for row in done)
    real = (images.read_picture(item.picture) for item in items)
    x, y = perceptual.features(made, network), perceptual.features(real, network)
    return {"fid": perceptual.fid(x, y), "kid": perceptual.kid(x, y), "n": len(x)}


def plot(summary: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel per metric, a group of bars per kind of edit, a bar per run; where strengths differ, a panel that shows
    what each method's strengths trade. Raises ValueError where matplotlib is missing.
    """
    plt, (gain, curves) = pyplot(), trade(summary)
    kinds = list(dict.fromkeys(kind for run in summary for kind in run["kinds"]))
    names = list(dict.fromkeys(name for run in summary for kind in run["kinds"].values() for name in kind))
    count, width = len(names) + bool(curves), 0.8 / len(summary)
    rows, columns = -(-count // 4), min(4, count)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names):
        for i, run in enumerate(summary):
            values = [run["kinds"].get(kind, {}).get(name, {}).get("mean") for kind in kinds]  # None: NaN, no bar
            at = np.arange(len(kinds)) + i * width
            axis.bar(at, np.array(values, np.float64), width, align="edge", label=run["name"])
        axis.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right", fontsize=7)
        axis.set_title(name)
    if curves:
        axis = axes.flat[len(names)]
        for method, points in curves.items():
            axis.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", label=method)
            for x, y, strength in points:
                axis.annotate(f"{strength:g}", (x, y), fontsize=7)
        axis.set(xlabel="psnr_source (dB)", ylabel=gain, title="traded by strength")
        axis.legend(fontsize=7)
    for axis in axes.flat[count:]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=110, format="png")
    os.replace(part, path)
    plt.close(figure)


def trade(summary: Sequence[dict[str, Any]]) -> tuple[str, dict[str, list[tuple[float, float, float]]]]:
    """What edits gain, by the first of three metrics that was measured; and per method (PSNR to the source, this gain,
    strength), where a method's runs differ in strength only.
    """
    seen = {name for run in summary for name in run["kinds"]["all"]}
    gain = next((name for name in ("clip_target", "psnr_true", "iou") if name in seen), "")
    curves = dict[str, list[tuple[float, float, float]]]()
    for run in summary:
        x, y = (run["kinds"]["all"].get(name, {}).get("mean") for name in ("psnr_source", gain))
        if x is not None and y is not None and "strength" in run["run"]:
            curves.setdefault(run["run"]["method"], []).append((x, y, run["run"]["strength"]))
    return gain, {name: each for name, each in curves.items() if len({s for *_, s in each}) == len(each) > 1}


def pyplot() -> Any:
    """matplotlib, drawing into files."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'minidiffedit[figures]', or --no-plots") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
