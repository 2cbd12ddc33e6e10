"""`make evidence`: what the paper (2210.11427) and this project claim of DiffEdit, measured on the miniature.

    python -m weights.evidence -o .evidence            # --quick: 16 scenes a claim instead of 40 to 104

Scenes are drawn anew from evaluation seeds, one object is swapped for another in each, and every claim compares
settings on the same scenes (`bench.py` edits and measures; rows are kept, a second run goes on). Written:
evidence.json, evidence.md and plots.

Each claim is a few contrasts, numbers that are positive where the claim holds. Their 95 % intervals come from 4,000
resamples of the scenes, the same for all settings (percentile bootstrap, paired). The rule of the verdict:
- reproduced: every contrast's interval lies above its margin (0 where none is named);
- contradicted: some contrast's interval lies below its margin;
- not reproduced: anything else, fewer than LEAST scenes included.
"""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minidiffedit import level_at, levels
from minidiffedit.files.images import write_whole
from minidiffedit.many.evaluate import pyplot, write_json
from weights.bench import Setting, add_options, jobs, resamples, run, save_plot
from weights.shell import count, run_command

FIRST = 100_000  # the scenes' numbers; the benchmark's begin at 0
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
LEAST = 10
ARMS = ("sdedit", "encode", "mask", "both")
# Rows know squared errors; pictures differ by so many of 255.
ROOTS = {"rmse_source": "mse_source", "background_rmse": "background_mse"}
NAMES = {
    "success": "judged a success", "iou": "IoU with the true mask", "rmse_source": "difference to the source, of 255",
    "background_rmse": "background difference, of 255", "psnr_true": "PSNR to the true edit, dB",
    "coverage": "share of the picture in the mask", "iou_between_seeds": "IoU between seeds", "drift": "latent drift",
    "outside_drift": "latent drift outside the mask",
}  # fmt: skip


class Means:
    """Means over the scenes of a claim, and over resamples of them: m(label, figure) -> (1 + RESAMPLES,)."""

    def __init__(self, table: dict[str, list[dict[str, Any]]]):
        self.table, (scenes,) = table, {len(rows) for rows in table.values()}
        self.weights = resamples((scenes,))

    def __call__(self, label: str, figure: str) -> np.ndarray:
        values = np.array([row[ROOTS.get(figure, figure)] for row in self.table[label]], np.float64)
        return self.weights @ (np.sqrt(values) if figure in ROOTS else values)


@dataclass(frozen=True)
class Contrast:
    """value(means) -> (1 + RESAMPLES,), the first of the scenes as they are; positive where the claim holds."""

    says: str
    value: Callable[[Means], np.ndarray]
    unit: str
    margin: float = 0.0

    def judged(self, m: Means) -> dict[str, Any]:
        values = self.value(m)
        low, high = np.percentile(values[1:], [2.5, 97.5])
        verdict = "reproduced" if low > self.margin else "contradicted" if high < self.margin else "not reproduced"
        verdict = "not reproduced" if m.weights.shape[1] < LEAST else verdict
        return {
            "says": self.says, "effect": float(values[0]), "low": float(low), "high": float(high),
            "margin": self.margin, "unit": self.unit, "verdict": verdict,
        }  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """settings by label, in the order of the plot; panels: the figures that are plotted; scenes in the full form."""

    name: str
    says: str
    settings: dict[str, Setting]
    contrasts: tuple[Contrast, ...]
    panels: tuple[str, ...]
    scenes: int = 104


def more(figure: str, more: str, less: str, says: str, unit: str, margin: float = 0.0) -> Contrast:
    return Contrast(says, lambda m: m(more, figure) - m(less, figure), unit, margin)


# ---------------------------------------------------------------- the trade-off


def label(arm: str, strength: float) -> str:
    return f"{arm} {strength:g}"


def reached(m: Means) -> dict[str, np.ndarray]:
    """Per arm, the mean over distances of the success that its strengths reach within that distance to the source.

    Each resample has its curves: linear between strengths, from (0, 0), never falling, flat beyond the last strength;
    over distances from 0 to the largest that every arm comes to.
    """
    curves = {arm: [[m(label(arm, s), f) for s in STRENGTHS] for f in ("rmse_source", "success")] for arm in ARMS}
    far = np.min([np.max(distance, axis=0) for distance, _ in curves.values()], axis=0)
    areas = {}
    for arm, (distance, success) in curves.items():
        d, s = (np.vstack([np.zeros_like(far), values]).T for values in (distance, success))
        order = np.argsort(d, axis=1)
        d, s = np.take_along_axis(d, order, axis=1), np.maximum.accumulate(np.take_along_axis(s, order, axis=1), axis=1)
        grids = np.linspace(0, far, 101).T
        areas[arm] = np.array([np.interp(grid, x, y).mean() for grid, x, y in zip(grids, d, s)])
    return areas


def better(arm: str, than: str, says: str) -> Contrast:
    def value(m: Means) -> np.ndarray:
        areas = reached(m)
        return areas[arm] - areas[than]

    return Contrast(says, value, "share of edits, mean over distances")


def slope(figure: str) -> Callable[[Means], np.ndarray]:
    """Least squares over the strengths of DiffEdit, per 1 of strength."""
    at = np.array(STRENGTHS) - np.mean(STRENGTHS)
    return lambda m: sum(w * m(label("both", s), figure) for w, s in zip(at / (at @ at), STRENGTHS))  # type: ignore[return-value]


# ---------------------------------------------------------------- Proposition 1


def bounds(c: float, k1: float, k2: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """On SD's levels 0..50: strength, SDEdit's bound, the encoding's (Proposition 1; derived here, norms as root mean
    squares, the decoding without guidance).

    In y = x / sqrt(a), with s = sqrt(1 / a - 1), decoding is dy/ds = eps. SDEdit starts at x0 + s noise and moves by at
    most C per unit of s: |y0 - x0| <= (1 + C) s. From the encoding, whose own way back leads to x0, a text that shifts
    eps by at most K2, eps being K1-Lipschitz in x, leads away by at most the integral of K2 exp(K1 arsinh s') over s'
    from 0 to s (Gronwall; arsinh because x = y / sqrt(1 + s^2)).
    """
    s = np.sqrt(1 / np.array(levels(50).a) - 1)
    s = np.concatenate([[0.0], s[1:]])
    fine = np.linspace(0, s[-1], 20_001)
    steps = k2 * np.exp(k1 * np.arcsinh(fine))
    integral = np.concatenate([[0.0], np.cumsum((steps[1:] + steps[:-1]) / 2 * np.diff(fine))])
    return np.arange(51) / 50, (1 + c) * s, np.interp(s, fine, integral)


def constants(m: Means) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C, K1, K2, each (1 + RESAMPLES,): the largest over levels of the mean over scenes, estimates where Proposition 1
    has suprema.
    """
    found = []
    for name in ("C", "K1", "K2"):
        by_level = np.array([row[name] for row in m.table["constants"]])
        found.append((m.weights @ by_level).max(axis=1))
    return tuple(found)  # type: ignore[return-value]


def below(arm: str) -> Callable[[Means], np.ndarray]:
    """The smallest distance, over the strengths, of an arm's drift below its bound."""

    def value(m: Means) -> np.ndarray:
        at = [level_at(s, 50) for s in STRENGTHS]
        curves = [bounds(*values)[1 if arm == "sdedit" else 2][at] for values in zip(*constants(m))]
        drifts = np.stack([m(label(arm, s), "drift") for s in STRENGTHS], axis=1)
        return (np.array(curves) - drifts).min(axis=1)

    return value


def crossing(m: Means) -> np.ndarray:
    """The strength up to which the encoding's bound is the tighter one, 0 if it never is."""
    found = []
    for values in zip(*constants(m)):
        strength, sdedit, encoding = bounds(*values)
        tighter = encoding[1:] < sdedit[1:]
        found.append(strength[len(tighter) if tighter.all() else int(np.argmin(tighter))])
    return np.array(found)


def nearer(m: Means) -> np.ndarray:
    return np.min([m(label("sdedit", s), "drift") - m(label("encode", s), "drift") for s in STRENGTHS], axis=0)


# ---------------------------------------------------------------- the claims

HELPS = "success", "iou", "background_rmse"

CLAIMS = (
    Claim(
        "ablation",
        "mask and encoding each improve on SDEdit, both together are best: more edits succeed at a distance",
        {label(arm, s): Setting(arm, strength=s) for arm in ARMS for s in STRENGTHS},
        (
            better("mask", "sdedit", "the mask alone improves on SDEdit"),
            better("encode", "sdedit", "the encoding alone improves on SDEdit"),
            better("both", "mask", "both improve on the mask alone"),
            better("both", "encode", "both improve on the encoding alone"),
        ),
        (),
        72,
    ),
    Claim(
        "strength",
        "a larger strength edits more and keeps less of the source",
        {label("both", s): Setting(strength=s) for s in STRENGTHS},
        (
            Contrast("success rises with strength", slope("success"), "share of edits per 1 of strength"),
            Contrast("so does the distance to the source", slope("rmse_source"), "of 255 per 1 of strength"),
        ),
        ("success", "rmse_source"),
        72,
    ),
    Claim(
        "threshold",
        "a threshold of .25 marks too much and disturbs the background, .75 too little to edit",
        {f"{t:g}": Setting(mask_threshold=t) for t in (0.25, 0.5, 0.75)},
        (
            more("coverage", "0.25", "true", "at .25 the mask is larger than the object", "of the picture"),
            more("coverage", "true", "0.75", "at .75 it is smaller", "of the picture"),
            more("background_rmse", "0.25", "0.5", "the background changes more at .25 than at .5", "of 255"),
            more("success", "0.5", "0.75", "more edits succeed at .5 than at .75", "share of edits"),
        ),
        (*HELPS, "coverage"),
    ),
    Claim(
        "default threshold",
        "a threshold of .5 marks the object better than .25 and .75",
        {f"{t:g}": Setting(mask_threshold=t) for t in (0.25, 0.5, 0.75)},
        (
            more("iou", "0.5", "0.25", "better than .25", "IoU"),
            more("iou", "0.5", "0.75", "better than .75", "IoU"),
        ),
        (),
    ),
    Claim(
        "maps",
        "more maps make the mask steadier and better: 10 rather than 3 or 1",
        {f"{n}": Setting(maps=n) for n in (1, 3, 10)}
        | {f"{n} again": Setting("mask alone", maps=n) for n in (1, 3, 10)},
        (
            more("iou_between_seeds", "10 again", "1 again", "10 maps are steadier between seeds than 1", "IoU"),
            more("iou_between_seeds", "10 again", "3 again", "10 are steadier than 3", "IoU"),
            more("iou", "10", "1", "10 mark the object better than 1", "IoU"),
        ),
        ("iou_between_seeds", *HELPS),
    ),
    Claim(
        "mask strength",
        "noise of strength .5 marks the object better than .25 and .75",
        {f"{s:g}": Setting(mask_strength=s) for s in (0.25, 0.5, 0.75)},
        (
            more("iou", "0.5", "0.25", "better than .25", "IoU"),
            more("iou", "0.5", "0.75", "better than .75", "IoU"),
        ),
        HELPS,
    ),
    Claim(
        "reference",
        "the source caption is a better reference for the mask than the empty text",
        {"caption": Setting(), "empty": Setting(reference="")},
        (
            more("iou", "caption", "empty", "the mask is better", "IoU"),
            more("success", "caption", "empty", "more edits succeed", "share of edits"),
        ),
        HELPS,
    ),
    Claim(
        "text of the encoding",
        "encoding under the empty text, as the paper does, is no worse than under the source caption",
        {"empty": Setting(), "caption": Setting(encode_text="source")},
        (
            more("success", "empty", "caption", "not 5 points fewer edits succeed", "share of edits", -0.05),
            more("psnr_true", "empty", "caption", "not .25 dB further from the true edit", "dB", -0.25),
        ),
        ("success", "psnr_true", "background_rmse"),
    ),
    Claim(
        "refine",
        "more passes per step lower the error of the inversion",
        {f"{k}": Setting("reconstruction", refine=k, picture=False) for k in (1, 2, 3)},
        (
            more("drift", "1", "2", "2 passes come back nearer than 1", "latent root mean square"),
            more("drift", "2", "3", "3 nearer than 2", "latent root mean square"),
        ),
        ("drift",),
        72,
    ),
    Claim(
        "blend",
        "blending with the level just left, one level off, disturbs the background",
        {"level reached": Setting(), "level left": Setting(blend="left")},
        (
            more("outside_drift", "level left", "level reached", "the latent outside the mask drifts", "rms"),
            more("background_rmse", "level left", "level reached", "the background changes more", "of 255"),
        ),
        ("success", "outside_drift", "background_rmse", "psnr_true"),
    ),
    Claim(
        "bounds",
        "Proposition 1: an encoding keeps nearer to the source than noise, and its bound is tighter up to a strength",
        {label(arm, s): Setting(arm, strength=s, guidance_scale=1.0, picture=False)
         for arm in ("sdedit", "encode") for s in STRENGTHS} | {"constants": Setting("constants", strength=1.0)},
        (
            Contrast("the encoding stays nearer at every strength", nearer, "latent root mean square, the smallest"),
            Contrast("SDEdit's drift lies below its bound", below("sdedit"), "the same"),
            Contrast("the encoding's drift lies below its bound", below("encode"), "the same"),
            Contrast("the encoding's bound is tighter up to a strength above 0", crossing, "strength"),
        ),
        (),
        40,
    ),
)  # fmt: skip


def judge(claim: Claim, rows: dict[tuple[int, str], dict[str, Any]], scenes: int) -> dict[str, Any]:
    """The claim's figures, contrasts and verdict, from the rows of its first scenes by (number, setting)."""
    m = Means(table(claim, rows, scenes))
    contrasts = [contrast.judged(m) for contrast in claim.contrasts]
    verdicts = [contrast["verdict"] for contrast in contrasts]
    verdict = "contradicted" if "contradicted" in verdicts else "not reproduced"
    figures = {}
    for name, some in m.table.items():
        numbers = [key for key in some[0] if all(isinstance(row[key], bool | float) for row in some)]
        wanted = [*numbers, *(root for root, of in ROOTS.items() if of in numbers)]
        ranges = {key: (m(name, key)[0], *np.percentile(m(name, key)[1:], [2.5, 97.5])) for key in wanted}
        figures[name] = {key: dict(zip(("mean", "low", "high"), map(float, three))) for key, three in ranges.items()}
    edits = scenes * sum(s.arm not in ("mask alone", "constants") for s in claim.settings.values())
    return {
        "claim": claim.says, "verdict": "reproduced" if set(verdicts) == {"reproduced"} else verdict,
        "scenes": scenes, "edits": edits, "contrasts": contrasts, "figures": figures,
    }  # fmt: skip


def table(claim: Claim, rows: dict[tuple[int, str], dict[str, Any]], scenes: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by label, the same scenes in the same order under each; "true": what the mask's share should be."""
    numbers = range(FIRST, FIRST + scenes)
    found = {name: [rows[number, str(s)] for number in numbers] for name, s in claim.settings.items()}
    if any(setting.arm == "both" for setting in claim.settings.values()):
        some = next(some for name, some in found.items() if claim.settings[name].arm == "both")
        found["true"] = [{"coverage": row["true_coverage"]} for row in some]
    return found


# ---------------------------------------------------------------- pictures of it


def bars(axis: Any, found: dict[str, Any], figure: str, labels: list[str]) -> None:
    """Means and intervals of one figure, a point per setting."""
    three = [found[name][figure] for name in labels]
    mean = np.array([one["mean"] for one in three])
    spread = np.abs([[one["low"] for one in three], [one["high"] for one in three]] - mean)
    axis.errorbar(range(len(labels)), mean, spread, fmt="o", capsize=4)
    axis.set_xticks(range(len(labels)), [name.removesuffix(" again") for name in labels])
    axis.set_xlim(-0.5, len(labels) - 0.5)
    axis.set_ylabel(NAMES[figure], fontsize=8)


def plot_ablation(results: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    found = results["ablation"]["figures"]
    for axis, x in zip(axes, ("rmse_source", "background_rmse")):
        for arm in ARMS:
            points = [(found[label(arm, s)][x], found[label(arm, s)]["success"]) for s in STRENGTHS]
            at = np.array([[one["mean"] for one in point] for point in points]).T
            low, high = (np.array([[one[end] for one in point] for point in points]).T for end in ("low", "high"))
            xerr, yerr = ([at[i] - low[i], high[i] - at[i]] for i in (0, 1))
            axis.errorbar(*at, yerr=yerr, xerr=xerr, fmt="o-", capsize=2, elinewidth=0.6, label=arm)
            axis.annotate(f"{STRENGTHS[-1]:g}", at[:, -1], fontsize=7)
        axis.set(xlabel=NAMES[x], ylabel=NAMES["success"], xlim=(0, None), ylim=(-0.02, 1.02))
    axes[0].set_title("the four arms, each traced by strength")
    axes[0].legend(title="mask + encoding = both", fontsize=8)
    found, twin = results["strength"]["figures"], axes[2].twinx()
    for axis, key, colour in ((axes[2], "success", "C0"), (twin, "rmse_source", "C1")):
        three = np.array([[found[label("both", s)][key][end] for s in STRENGTHS] for end in ("mean", "low", "high")])
        axis.plot(STRENGTHS, three[0], "o-", color=colour)
        axis.fill_between(STRENGTHS, three[1], three[2], color=colour, alpha=0.2)
        axis.set_ylabel(NAMES[key], color=colour)
    axes[2].set(xlabel="strength", title="DiffEdit over its strength")
    save_plot(plt, figure, path, 100)


def plot_settings(results: dict[str, Any], path: Path) -> None:
    """A row of panels per claim."""
    plt = pyplot()
    chosen = [claim for claim in CLAIMS if claim.name in results and claim.panels and claim.name != "strength"]
    columns = max(len(claim.panels) for claim in chosen)
    size = (3.4 * columns, 2.5 * len(chosen))
    figure, axes = plt.subplots(len(chosen), columns, figsize=size, layout="constrained", squeeze=False)
    for claim, row in zip(chosen, axes):
        found = results[claim.name]["figures"]
        for axis, key in zip(row, claim.panels):
            steady = key == "iou_between_seeds"
            bars(axis, found, key, [name for name, s in claim.settings.items() if (s.arm == "mask alone") == steady])
        row[0].set_title(f"{claim.name}: {results[claim.name]['verdict']}", fontsize=9, loc="left")
        for axis in row[len(claim.panels) :]:
            axis.axis("off")
    save_plot(plt, figure, path, 100)


def plot_bounds(result: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    strength, sdedit, encoding = bounds(**result["constants"])
    for values, arm, colour in ((sdedit, "sdedit", "C0"), (encoding, "encode", "C1")):
        axis.plot(strength[1:], values[1:], color=colour, label=f"{arm}: bound")
        mean = [result["figures"][label(arm, s)]["drift"]["mean"] for s in STRENGTHS]
        axis.plot(STRENGTHS, mean, "o--", color=colour, label=f"{arm}: measured, guidance 1")
    axis.set(yscale="log", xlabel="strength", ylabel=NAMES["drift"] + " (root mean square)")
    axis.set_title(
        ", ".join(f"{name.upper()} = {value:.3g}" for name, value in result["constants"].items()), fontsize=9
    )
    axis.legend(fontsize=8)
    save_plot(plt, figure, path, 100)


def page(results: dict[str, Any]) -> str:
    """The verdicts as a table in Markdown."""
    lines = ["| claim | verdict | contrasts: effect [95 % interval] | edits |", "|---|---|---|---|"]
    for result in results.values():
        each = []
        for one in result["contrasts"]:
            margin = f", margin {one['margin']:g}" if one["margin"] else ""
            each.append(
                f"{one['says']}: {one['effect']:+.3g} [{one['low']:+.3g}, {one['high']:+.3g}] {one['unit']}{margin}"
            )
        lines.append(f"| {result['claim']} | **{result['verdict']}** | {'; '.join(each)} | {result['edits']} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the command


def plan(claims: list[Claim], scenes: dict[str, int]) -> list[Any]:
    """The jobs: what claims share is done once, and the first scenes serve them all."""
    groups: dict[tuple[Setting, ...], list[tuple[int, str]]] = {}
    for i in range(max(scenes.values())):
        settings = tuple(dict.fromkeys(s for c in claims if i < scenes[c.name] for s in c.settings.values()))
        groups.setdefault(settings, []).append((FIRST + i, "swap"))
    return [job for settings, numbers in groups.items() for job in jobs(numbers, list(settings))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.evidence", description="Measure the claims.")
    names = [claim.name for claim in CLAIMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CLAIM", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="16 scenes a claim")
    parser.add_argument("--scenes", type=count, metavar="N", help=f"scenes a claim instead, {LEAST} and up")
    parser.add_argument("--assets", type=Path, metavar="DIR", help="copy the plots there as evidence-NAME.png, too")
    add_options(parser, ".evidence")
    run_command(parser, measure)


def measure(args: argparse.Namespace) -> None:
    pyplot()  # its want is said before the work
    folder = args.output if len({*args.only}) == len(CLAIMS) else args.output / "only"  # the whole stays
    args.output.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    claims = [claim for claim in CLAIMS if claim.name in args.only]
    scenes = {claim.name: args.scenes or (16 if args.quick else claim.scenes) for claim in claims}
    done = run(plan(claims, scenes), args.output / "rows.jsonl", args.model, args.judge, args.workers, ("psnr", "mse"))
    rows = {(row["number"], row["setting"]): row for row in done}
    results = {claim.name: judge(claim, rows, scenes[claim.name]) for claim in claims}
    plots = []
    if {"ablation", "strength"} <= set(results):
        plots.append(folder / "ablation.png")
        plot_ablation(results, plots[-1])
    if any(claim.panels and claim.name != "strength" for claim in claims):
        plots.append(folder / "settings.png")
        plot_settings(results, plots[-1])
    if "bounds" in results:
        m = Means(table(next(c for c in CLAIMS if c.name == "bounds"), rows, scenes["bounds"]))
        results["bounds"]["constants"] = dict(zip(("c", "k1", "k2"), (float(v[0]) for v in constants(m))))
        plots.append(folder / "bounds.png")
        plot_bounds(results["bounds"], plots[-1])
    report = {"weights": done[0]["model"], "edits": len({(n, s) for n, s in rows}), "claims": results}
    write_json(folder / "evidence.json", report)
    write_whole(folder / "evidence.md", page(results).encode())
    if args.assets:
        args.assets.mkdir(parents=True, exist_ok=True)
        for path in plots:
            shutil.copyfile(path, args.assets / f"evidence-{path.name}")
    for name, result in results.items():
        print(f"{name:20} {result['verdict']:15} {result['edits']:5} edits on {result['scenes']} scenes")
        for one in result["contrasts"]:
            print(
                f"    {one['verdict']:15} {one['effect']:+8.4f} [{one['low']:+.4f}, {one['high']:+.4f}]  {one['says']}"
            )
    print(f"written: {folder}/evidence.json, evidence.md, {', '.join(path.name for path in plots)}")


if __name__ == "__main__":
    main()
