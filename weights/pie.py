"""PIE-Bench (Ju et al., 2310.01506) with the settings of its authors' harness, beside what they and others published.

    python -m weights.who_wins --pie FOLDER --model CompVis/stable-diffusion-v1-4 --metrics psnr mse ssim lpips clip

FOLDER holds mapping_file.json and annotation_images/, from the set's authors. Their figures are of 700 pictures and
SD 1.4 (plug-and-play: 1.5) in 50 steps at scale 7.5; prompt-to-prompt takes cross .4, self .6 up to 32 x 32, doubles
the new word of `blended_word` and blends on both; MasaCtrl has no source text. Figures of the background are of
pictures made black inside the mask, over all pixels, LPIPS by SqueezeNet, as there; lpips, clip and structure need the
eval extra. Edit-friendly's and LEDITS++'s are published by h-Edit's authors, who may have set them otherwise. A row
without options here has those of methods/table.py. Lines are kept as `minidiffedit eval` keeps them; a second run goes
on.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minidiffedit import StableDiffusion
from minidiffedit.files.images import write_whole
from minidiffedit.files.states import fingerprint
from minidiffedit.many.datasets import Item, open_dataset, read_json
from minidiffedit.many.evaluate import LOADERS, PLAIN, evaluate, load_networks, mean, plan_of
from minidiffedit.run import blank_plan
from weights.shell import count

SEED, MOST_ERRORS = 1234, 20  # of those that are told
# heading, name in `measures`, how often a figure is counted in print
COLUMNS = (
    ("structure x10^3", "structure", 1e3), ("PSNR", "pie_psnr", 1), ("LPIPS x10^3", "background_lpips", 1e3),
    ("MSE x10^4", "pie_mse", 1e4), ("SSIM x10^2", "pie_ssim", 1e2), ("CLIP whole", "clip_target", 1),
    ("CLIP edited", "clip_edited", 1),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """published: by COLUMNS, None where nothing is known; words: whether blended_word is used; source: whether the
    method is told what the picture shows.
    """

    options: dict[str, Any] = field(default_factory=dict)
    published: Sequence[float | None] = (None,) * len(COLUMNS)
    words: bool = False
    source: bool = True


CROSS: dict[str, Any] = {"cross_steps": 0.4, "self_steps": 0.6, "self_levels": 2}
FRIENDLY: dict[str, Any] = {
    "steps": 100,
    "strength": 0.88,
    "guidance_scale": 9.0,
    "cross_steps": 0.6,
    "self_steps": 0.2,
}
UGLY = {"negative_prompt": "ugly, blurry, black, low res, unrealistic"}
ROWS = {
    "ddim+prompt-to-prompt": Row(CROSS, (69.43, 17.87, 208.80, 219.88, 71.14, 25.01, 22.44), words=True),
    "null-text+prompt-to-prompt": Row(CROSS, (13.44, 27.03, 60.67, 35.86, 84.11, 24.75, 21.86), words=True),
    "negative-prompt+prompt-to-prompt": Row(CROSS, (16.17, 26.21, 69.01, 39.73, 83.40, 24.61, 21.87), words=True),
    "style-diffusion": Row(published=(11.65, 26.05, 66.10, 38.63, 83.42, 24.78, 21.72), words=True),
    "direct+prompt-to-prompt": Row(CROSS, (11.65, 27.22, 54.55, 32.86, 84.76, 25.02, 22.10), words=True),
    "ddim+masactrl": Row(published=(28.38, 22.17, 106.62, 86.97, 79.67, 23.96, 21.16), source=False),
    "direct+masactrl": Row(published=(24.70, 22.64, 87.94, 81.09, 81.33, 24.38, 21.35), source=False),
    "ddim+pix2pix-zero": Row(published=(61.68, 20.44, 172.22, 144.12, 74.67, 22.80, 20.54)),
    "direct+pix2pix-zero": Row(published=(49.22, 21.53, 138.98, 127.32, 77.05, 23.31, 21.05)),
    "ddim+plug-and-play": Row(UGLY, (28.22, 22.28, 113.46, 83.64, 79.05, 25.41, 22.55)),
    "direct+plug-and-play": Row(UGLY, (24.29, 22.46, 106.06, 80.45, 79.68, 25.41, 22.62)),
    "edit-friendly-ddpm": Row(published=(12.9, 25.87, 60.9, None, 83.7, 25.4, None)),
    "ledits++": Row(published=(23.4, 23.36, 88.8, None, 81.1, 25.4, None)),
    "edit-friendly+prompt-to-prompt": Row(FRIENDLY, (15.1, 26.30, 57.0, None, 84.0, 25.5, None)),
    "diffedit": Row(),
    "sdedit": Row(),
}


def words(folder: Path) -> dict[str, dict[str, str]]:
    """By picture, prompt-to-prompt's options for its blended_word, "source target" or empty."""
    place = next(one for one in (folder, folder / "data") if (one / "mapping_file.json").is_file())
    found = {}
    for name, entry in read_json(place / "mapping_file.json", dict).items():
        if not isinstance(entry, dict) or not isinstance(said := entry.get("blended_word") or "", str):
            raise ValueError(f"{place}/mapping_file.json: {name} must hold a blended_word of two words, or none")
        pair = said.split()
        found[name] = {"blend": ", ".join(pair), "reweight": f"{pair[1]}=2"} if len(pair) == 2 else {}
    return found


def run_of(name: str, item: Item, own: dict[str, str], steps: int | None) -> dict[str, Any]:
    """A row's run on a picture; words that a prompt has not are left out, as in the harness."""
    row = ROWS[name]
    run = {"method": name, **row.options} | ({"steps": steps} if steps and "steps" in blank_plan(name).options else {})
    try:
        plan_of(run | own, SEED, item, None)
    except ValueError:
        return run
    return run | own if row.words else run


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: the means by row, and in brackets the published ones."""
    lines = [f"| method | {' | '.join(name for name, _, _ in COLUMNS)} | rows | pictures |", "|---" * 10 + "|"]
    for name, some in rows.items():
        done = [row for row in some if "error" not in row]
        cells = list[str]()
        for (_, figure, times), published in zip(COLUMNS, ROWS[name].published):
            value = mean([one for row in done if (one := row["metrics"].get(figure)) is not None])
            said = "" if value is None else f"{times * value:.2f}"
            cells.append(f"{said} ({published:.2f})".strip() if published is not None else said)
        cost = mean([row["model_rows"] for row in done])
        lines.append(f"| `{name}` | {' | '.join(cells)} | {'' if cost is None else f'{cost:,.0f}'} | {len(done)} |")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pie", type=Path, metavar="FOLDER", help="PIE-Bench instead of the miniature's scenes")
    parser.add_argument("--limit", type=count, metavar="N", help="of --pie only the first N pictures")
    choices = [*PLAIN[:3], *(name for name in LOADERS if name != "fid")]
    parser.add_argument("--metrics", nargs="+", choices=choices, metavar="X", help="of --pie (psnr mse ssim)")


def measure(args: argparse.Namespace) -> None:
    """Raises ValueError for a folder that is not PIE-Bench's."""
    items = open_dataset(args.pie)[: args.limit]
    if items[0].layout != "pie":
        raise ValueError(f"{args.pie} is a data set, but not PIE-Bench: it has no mapping_file.json")
    sd, own = StableDiffusion.load(args.model), words(args.pie)
    metrics = args.metrics or PLAIN[:3]
    networks, known = load_networks(metrics, str(sd.device)), fingerprint(sd)
    options: dict[str, Any] = {"metrics": metrics, "seed": SEED, "identity": known, "networks": networks}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
    for item in tqdm(items, desc="pictures", unit="picture", disable=None):
        for source in (True, False):
            names = [name for name, row in ROWS.items() if row.source == source]
            told = item if source else replace(item, source="")
            runs = [run_of(name, told, own[item.name], args.steps) for name in names]
            for name, row in zip(names, evaluate(sd, [told], runs, args.output / "pie", **options)):
                rows[name].append(row)
    errors = [f"{name}: {row['error']}" for name, some in rows.items() for row in some if "error" in row]
    if len(errors) == len(ROWS) * len(items):
        raise ValueError(f"no edit was made; {errors[0]}")
    each = [*dict.fromkeys(errors)]
    errors = [*each[:MOST_ERRORS], *([f"{len(errors)} errors in all"] if len(each) > MOST_ERRORS else [])]
    text = "\n\n".join(
        [f"{len(items)} pictures of {args.pie.name}; in brackets what was published", table(rows), *errors]
    )
    write_whole(args.output / "pie.md", f"{text}\n".encode())
    print(f"{text}\nwritten: {args.output}/pie.md, pie/edits.jsonl")
