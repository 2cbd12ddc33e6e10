"""PIE-Bench (Ju et al., 2310.01506) with the settings of its authors' harness, beside what they and others published.

    python -m weights.who_wins --pie FOLDER --model CompVis/stable-diffusion-v1-4 --metrics psnr mse ssim lpips clip

FOLDER holds mapping_file.json and annotation_images/, from the set's authors. Their figures are of 700 pictures and
SD 1.4 (plug-and-play: 1.5) in 50 steps at scale 7.5; prompt-to-prompt takes cross .4, self .6 up to 32 x 32, doubles
the new word of `blended_word` and blends on both, those that a prompt has as a word between blanks; MasaCtrl has no
source text. An edit is measured as in the harness: as a JPEG file of Pillow's usual quality; figures of the background
are of pictures made black inside the mask, over all pixels, LPIPS by SqueezeNet; for the structure distance, pixels of
0 to 255 are shrunk without a filter and normed as if they were 0 to 1. lpips, clip and structure need the eval extra. A
row without options here has those of methods/table.py; nothing is pasted. What differs from what was published stands
with each row, and in the page. Each picture's seed is made of 1234 and of its content.

Edits are kept as `minidiffedit eval` keeps them, as PNG files of some .4 MB each, and their figures beside them: a
second run goes on, and measures more without an edit made again.
"""

import argparse
import datetime
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minidiffedit import StableDiffusion
from minidiffedit.cost import cost
from minidiffedit.fast import choose_device
from minidiffedit.files.images import read_picture, to_rgb, write_whole
from minidiffedit.files.states import fingerprint
from minidiffedit.many.datasets import PIE_SIDE, Item, open_dataset, read_json
from minidiffedit.many.evaluate import (
    LOADERS,
    PLAIN,
    append_row,
    evaluate,
    load_networks,
    mean,
    measures,
    plan_of,
    read_rows,
)
from minidiffedit.many.perceptual import IMAGENET, load_dino
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
    method is told what the picture shows; apart: how this differs from what was published.
    """

    options: dict[str, Any] = field(default_factory=dict)
    published: Sequence[float | None] = (None,) * len(COLUMNS)
    words: bool = False
    source: bool = True
    apart: str = ""


CROSS: dict[str, Any] = {"cross_steps": 0.4, "self_steps": 0.6, "self_levels": 2}
FRIENDLY = CROSS | {"steps": 50, "strength": 0.76, "source_scale": 1.0, "guidance_scale": 7.5}  # 12 of 50 are skipped
STYLE: dict[str, Any] = {"cross_steps": 0.6, "self_steps": 0.6, "learned_steps": 0.5}
UGLY = {"negative_prompt": "ugly, blurry, black, low res, unrealistic"}
ZERO = (
    "guided away from the empty text, towards the target; theirs: away from a caption that BLIP made, towards it and "
    "the difference of both texts, and their inversion's noise is regularised"
)
FEATURES = "the source's row reads its text; theirs the empty one"
H_EDIT = "the figures are of h-Edit's authors, whose settings are not known"
BLENDED = (
    "both words are looked for in both prompts; theirs: the first in the source, the second in the target, and where "
    "neither is found the source stays"
)
ROWS = {
    "ddim+prompt-to-prompt": Row(CROSS, (69.43, 17.87, 208.80, 219.88, 71.14, 25.01, 22.44), words=True, apart=BLENDED),
    "null-text+prompt-to-prompt": Row(
        CROSS, (13.44, 27.03, 60.67, 35.86, 84.11, 24.75, 21.86), words=True, apart=BLENDED
    ),
    "negative-prompt+prompt-to-prompt": Row(
        CROSS, (16.17, 26.21, 69.01, 39.73, 83.40, 24.61, 21.87), words=True, apart=BLENDED
    ),
    "style-diffusion": Row(
        STYLE, (11.65, 26.05, 66.10, 38.63, 83.42, 24.78, 21.72), apart="the direct variant; theirs reads CLIP's tokens"
    ),
    "direct+prompt-to-prompt": Row(CROSS, (11.65, 27.22, 54.55, 32.86, 84.76, 25.02, 22.10), words=True, apart=BLENDED),
    "ddim+masactrl": Row(published=(28.38, 22.17, 106.62, 86.97, 79.67, 23.96, 21.16), source=False),
    "direct+masactrl": Row(published=(24.70, 22.64, 87.94, 81.09, 81.33, 24.38, 21.35), source=False),
    "ddim+pix2pix-zero": Row(published=(61.68, 20.44, 172.22, 144.12, 74.67, 22.80, 20.54), apart=ZERO),
    "direct+pix2pix-zero": Row(published=(49.22, 21.53, 138.98, 127.32, 77.05, 23.31, 21.05), apart=ZERO),
    "ddim+plug-and-play": Row(UGLY, (28.22, 22.28, 113.46, 83.64, 79.05, 25.41, 22.55), apart=FEATURES),
    "direct+plug-and-play": Row(UGLY, (24.29, 22.46, 106.06, 80.45, 79.68, 25.41, 22.62), apart=FEATURES),
    "edit-friendly-ddpm": Row(published=(12.9, 25.87, 60.9, None, 83.7, 25.4, None), apart=H_EDIT),
    "ledits++": Row(published=(23.4, 23.36, 88.8, None, 81.1, 25.4, None), apart=H_EDIT),
    "edit-friendly+prompt-to-prompt": Row(
        FRIENDLY,
        (15.1, 26.30, 57.0, None, 84.0, 25.5, None),
        apart="the harness's settings, but always refined (theirs: replaced, where both have as many words); " + H_EDIT,
    ),
    # .75 over the source's row, which has no difference, and the target's, as they count it, are .5 of the target's
    "proxedit": Row({"quantile": 0.5}, apart="without prompt-to-prompt, which the harness has beside it"),
    "diffedit": Row(),
    "sdedit": Row(),
}
# Of 100 of the set's pictures, by a survey of this model family (its table 2): our row, then FID, SSIM, CLIP, HPS.
SURVEY = {
    "InstructPix2Pix": ("", 74.23, 0.61, 25.86, 22.28),
    "SINE": ("", 164.30, 0.51, 25.32, 20.93),
    "Imagic": ("", 152.75, 0.45, 24.54, 20.41),
    "prompt-to-prompt": ("ddim+prompt-to-prompt", 82.11, 0.64, 26.43, 22.17),
    "plug-and-play": ("ddim+plug-and-play", 99.23, 0.47, 26.27, 21.73),
    "MasaCtrl": ("ddim+masactrl", 118.02, 0.51, 24.19, 21.19),
}


def words(folder: Path) -> dict[str, list[str]]:
    """By picture, its blended_word: two words, the source's and the target's, or none."""
    place = next(one for one in (folder, folder / "data") if (one / "mapping_file.json").is_file())
    found = {}
    for name, entry in read_json(place / "mapping_file.json", dict).items():
        if not isinstance(entry, dict) or not isinstance(said := entry.get("blended_word") or "", str):
            raise ValueError(f"{place}/mapping_file.json: {name} must hold a blended_word of two words, or none")
        found[name] = pair[:2] if len(pair := said.split()) > 1 else []
    return found


def run_of(name: str, item: Item, pair: Sequence[str], steps: int | None) -> dict[str, Any]:
    """A row's run on a picture. Each word is left out where its prompt has it not."""
    row = ROWS[name]
    run = {"method": name, **row.options} | ({"steps": steps} if steps and "steps" in blank_plan(name).options else {})
    if "paste" in blank_plan(name).options:
        run["paste"] = False
    if row.words and pair:
        seen = [word for word, prompt in zip(pair, (item.source, item.target)) if word in prompt.split()]
        run |= {"blend": ", ".join(dict.fromkeys(word.strip(",.") for word in seen))} if seen else {}
        run |= {"reweight": f"{pair[1].strip(',.')}=2"} if pair[1] in item.target.split() else {}
    return run


# ---------------------------------------------------------------- figures


def networks_of(metrics: Sequence[str]) -> dict[str, Any]:
    """Raises ValueError for a missing package, OSError for weights."""
    device = str(choose_device("auto"))
    found = load_networks([name for name in metrics if name != "structure"], device)
    return found | ({"structure": load_dino(device=device, prepare=for_dino)} if "structure" in metrics else {})


def for_dino(picture: Image.Image) -> Tensor:
    """(1, 3, h, w) as the harness's: 0 to 255 as float32, the shorter side 224, the longer at most 480, no filter
    before shrinking (torchvision 0.13's Resize of a tensor), then ImageNet's mean and spread of 0 to 1.
    """
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    w, h = picture.size
    scale = min(224 / min(w, h), 480 / max(w, h))
    small = F.interpolate(pixels, (int(scale * h), int(scale * w)), mode="bilinear", align_corners=False)
    mean, spread = (torch.tensor(one)[:, None, None] for one in IMAGENET)
    return (small - mean) / spread


def as_jpeg(picture: Image.Image) -> Image.Image:
    """What is left of a picture in a file of the harness."""
    file = io.BytesIO()
    picture.save(file, "JPEG")
    return Image.open(file).convert("RGB")


class Figures:
    """What was measured of edits, by the keys of their lines, kept in figures.jsonl beside their pictures."""

    def __init__(self, folder: Path, metrics: Sequence[str], networks: dict[str, Any]):
        self.folder, self.metrics, self.networks = folder, metrics, networks
        self.path, self.found = folder / "figures.jsonl", dict[str, dict[str, Any]]()
        for line in read_rows(self.path):
            if line.keys() != {"key", "metric", "figures"}:
                raise ValueError(f"{self.path} holds lines that are no figures; remove it or name another folder")
            self.found.setdefault(line["key"], {})[line["metric"]] = line["figures"]

    def of(self, key: str, item: Item) -> dict[str, float | None]:
        """Of one edit, by name. Raises ValueError where its picture, the source or the mask cannot be read."""
        known = self.found.setdefault(key, {})
        if missing := [name for name in self.metrics if name not in known]:
            edited, source = (
                to_rgb(read_picture(path)) for path in (self.folder / "pictures" / f"{key}.png", item.picture)
            )
            pair, truth = (np.asarray(as_jpeg(edited)), np.asarray(source)), item.truth(source.size)
            for name in missing:
                about: dict[str, Any] = {"mask": truth, "texts": (item.source, item.target), "pie": True}
                known[name] = measures([name], *pair, **about, networks=self.networks)
                append_row(self.path, {"key": key, "metric": name, "figures": known[name]})
        return {figure: value for name in self.metrics for figure, value in known[name].items()}


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: the means by row, and in brackets the published ones; rows: those of the model that an edit costs."""
    lines = [f"| method | {' | '.join(name for name, _, _ in COLUMNS)} | rows | pictures |", "|---" * 10 + "|"]
    for name, some in rows.items():
        done = [row for row in some if "error" not in row]
        cells = list[str]()
        for (_, figure, times), published in zip(COLUMNS, ROWS[name].published):
            said = average(done, figure, times)
            cells.append(f"{said} ({published:.2f})".strip() if published is not None else said)
        costs, made = mean([row["cost"] for row in done]), str(len(done))
        if ROWS[name].words:
            made += f", {sum('blend' in row['run'] for row in done)} blended"
        lines.append(f"| `{name}` | {' | '.join(cells)} | {'' if costs is None else f'{costs:,.0f}'} | {made} |")
    return "\n".join(lines)


def average(done: Sequence[dict[str, Any]], figure: str, times: float = 1) -> str:
    """For print; "" where nothing was measured."""
    value = mean([one for row in done if (one := row["metrics"].get(figure)) is not None])
    return "" if value is None else f"{times * value:.2f}"


def survey(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: ours where there is a row and it was measured, the survey's in brackets."""
    lines = ["| the survey's | FID | SSIM | CLIP | HPS |", "|---|---|---|---|---|"]
    for name, (ours, fid, ssim, clip, hps) in SURVEY.items():
        done = [row for row in rows.get(ours, ()) if "error" not in row]
        same, text = average(done, "ssim_source"), average(done, "clip_target")
        about = f"{name} (`{ours}`)" if done else name
        cells = f"({fid:.2f})", f"{same} ({ssim:.2f})".strip(), f"{text} ({clip:.2f})".strip(), f"({hps:.2f})"
        lines.append(f"| {about} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pie", type=Path, metavar="FOLDER", help="PIE-Bench instead of the miniature's scenes")
    parser.add_argument("--limit", type=count, metavar="N", help="of --pie only the first N pictures")
    choices = [*PLAIN[:3], *(name for name in LOADERS if name != "fid")]
    parser.add_argument("--metrics", nargs="+", choices=choices, metavar="X", help="of --pie (psnr mse ssim)")
    parser.add_argument("--only", nargs="+", choices=[*ROWS], metavar="METHOD", help="of --pie (all of its rows)")


def measure(args: argparse.Namespace) -> None:
    """Raises ValueError for a folder that is not PIE-Bench's, and for edits that failed, once all are told."""
    items = open_dataset(args.pie)[: args.limit]
    if items[0].layout != "pie":
        raise ValueError(f"{args.pie} is a data set, but not PIE-Bench: it has no mapping_file.json")
    args.metrics, names = [*dict.fromkeys(args.metrics or PLAIN[:3])], [*dict.fromkeys(args.only or ROWS)]
    own, networks, sd = words(args.pie), networks_of(args.metrics), StableDiffusion.load(args.model)
    figures = Figures(args.output / "pie", args.metrics, networks)
    runs = {name: [run_of(name, item, own[item.name], args.steps) for item in items] for name in names}
    rows = edits(sd, items, runs, figures)
    errors = [f"{row['item']}, {name}: {row['error']}" for name in names for row in rows[name] if "error" in row]
    if len(errors) == len(names) * len(items):
        raise ValueError(f"no edit was made; {errors[0]}")
    text = page(rows, errors, args, sd)
    write_whole(args.output / "pie.md", f"{text}\n".encode())
    print(f"{text}\nwritten: {args.output}/pie.md, pie/edits.jsonl, pie/figures.jsonl, pie/pictures")
    if errors:
        raise ValueError(f"{len(errors)} edits failed, as told above; the same command tries them again")


def edits(
    sd: StableDiffusion, items: Sequence[Item], runs: dict[str, list[dict[str, Any]]], figures: Figures
) -> dict[str, list[dict[str, Any]]]:
    """By row of ROWS, a line for each picture: of `evaluate`, with its figures and its cost. runs: as many of each."""
    known, rows = fingerprint(sd), dict[str, list[dict[str, Any]]]({name: [] for name in runs})
    costs = {name: [rows_of(run, heard(item, name)) for run, item in zip(runs[name], items)] for name in runs}
    total = sum(map(sum, costs.values()))
    print(f"{len(items)} pictures by {len(runs)} methods: {total:,} rows of the model in all, less what methods share")
    for at, item in enumerate(tqdm(items, desc="pictures", unit="picture", disable=None)):
        for source in (True, False):
            if not (some := [name for name in runs if ROWS[name].source == source]):
                continue
            asked, about = [runs[name][at] for name in some], {"seed": SEED, "identity": known, "save_pictures": True}
            done = evaluate(sd, [heard(item, some[0])], asked, figures.folder, metrics=(), **about)
            for name, row in zip(some, done):
                row["cost"] = costs[name][at]
                rows[name].append(row if "error" in row else row | {"metrics": figures.of(row["key"], item)})
    return rows


def heard(item: Item, name: str) -> Item:
    """What a method is told of a picture."""
    return item if ROWS[name].source else replace(item, source="")


COSTS: dict[Any, int] = {}


def rows_of(run: dict[str, Any], item: Item) -> int:
    """Rows of the model that the edit alone costs, which no word decides; 0 where the edit will be refused."""
    about = json.dumps([{name: value for name, value in run.items() if name != "reweight"} | {"blend": "blend" in run}])
    if about not in COSTS:
        try:
            COSTS[about] = sum(cost(plan_of(run, SEED, item, None)).values())
        except ValueError:
            return 0
    return COSTS[about]


def page(rows: dict[str, list[dict[str, Any]]], errors: list[str], args: argparse.Namespace, sd: Any) -> str:
    names = ("steps", "limit", "metrics", "only")
    asked = {name: value for name in names if (value := getattr(args, name)) is not None}
    said = [f"--{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in asked.items()]
    command = " ".join([f'make compare MODEL={args.model} COMPARE="--pie {args.pie}', *said]) + '"'
    pictures = len(next(iter(rows.values())))
    about = [
        f"{pictures} pictures of {args.pie.name} by {sd.name}, {sd.dtype}".replace("torch.", ""),
        f"seeds made of {SEED}, nothing pasted, edits measured as JPEG files, LPIPS by SqueezeNet",
        "in brackets what was published of 700 pictures and SD 1.4 (plug-and-play: 1.5) in 50 steps",
    ]
    apart = [f"`{name}`: {ROWS[name].apart}." for name in rows if ROWS[name].apart]
    if args.steps not in (None, 50):
        apart.insert(0, f"In {args.steps} steps: no figure here stands for the published settings.")
    if sd.side != PIE_SIDE:
        apart.insert(0, f"A model of {sd.side} x {sd.side} pixels: no figure here is to be compared with the brackets.")
    shown = errors[:MOST_ERRORS] + ([f"{len(errors)} errors in all"] if len(errors) > MOST_ERRORS else [])
    date = f"*(`{command}`, {datetime.date.today()})*"
    second = "In brackets what a survey found on 100 of the pictures, with settings of its own:"
    return "\n\n".join(["; ".join(about) + ".", table(rows), *apart, second, survey(rows), *shown, date])
