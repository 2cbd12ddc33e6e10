"""The judge: a small classifier that says which objects and which place a picture shows.

    python -m weights.judge

It is trained on scenes alone, never on anything the miniature made, so that its word on an edit is independent. The
command trains (and resumes, like `weights.train`), tests on evaluation scenes the miniature's benchmark does not use,
and writes weights/mini/judge/.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from minidiffedit.files.images import write_whole
from minidiffedit.many.evaluate import write_json
from weights.scenes import EVAL_SEEDS, OBJECTS, PLACES, TRAIN_SEEDS, Scene, scene
from weights.shell import count, run_command
from weights.train import Run, add_training, prepare, rendered, to_input

FOLDER = Path(__file__).parent / "mini" / "judge"
RECIPE = (1800, 64, 2e-3)  # steps, batch, largest learning rate
TEST_SEEDS = range(EVAL_SEEDS.start + 500_000, EVAL_SEEDS.stop)


class Judge(nn.Module):
    """Pictures (b, 3, 192, 192) in [-1, 1] -> logits of the objects (b, 26) and of the places (b, 6)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 192)
        layers: list[nn.Module] = [nn.AvgPool2d(2)]
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Conv2d(widths[-1], 256, 3, padding=1), nn.SiLU())
        self.head = nn.Linear(512, len(OBJECTS) + len(PLACES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.features(x)
        both = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        objects, places = self.head(both).split([len(OBJECTS), len(PLACES)], dim=1)
        return objects, places

    @torch.no_grad()
    def says(self, picture: np.ndarray) -> tuple[set[str], str]:
        """(192, 192, 3) uint8 -> the objects it is more sure of than not, and the place."""
        objects, places = self(to_input(np.array(picture)[None], "cpu"))  # a copy: Pillow's own cannot be written
        seen = {name for name, logit in zip(OBJECTS, objects[0]) if logit > 0}
        return seen, list(PLACES)[int(places.argmax())]


def load_judge() -> Judge:
    """The judge that ships. Raises ValueError for a file that is none."""
    judge, path = Judge(), FOLDER / "judge.safetensors"
    try:
        judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is no judge ({why}); `python -m weights.judge` trains one") from error
    return judge.eval()


def labels(s: Scene) -> tuple[np.ndarray, int]:
    names = [thing.name for thing in s.things]
    return np.array([name in names for name in OBJECTS], np.float32), list(PLACES).index(s.place)


def disturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored, shifted, dimmed, blurred and noisy pictures: an edit's decoded picture is never as crisp as a scene."""
    where: dict[str, Any] = {"generator": generator, "device": generator.device}
    if torch.rand((), **where) < 0.5:
        x = x.flip(3)
    x = x.roll(torch.randint(-9, 10, (2,), **where).tolist(), dims=(2, 3))
    if torch.rand((), **where) < 0.5:
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    gain = 1 + 0.15 * torch.randn((len(x), 3, 1, 1), **where)
    return x * gain + 0.06 * torch.randn(x.shape, **where)


def loss_of(judge: Judge, x: Tensor, objects: Tensor, places: Tensor) -> Tensor:
    seen, where = judge(x)
    return F.binary_cross_entropy_with_logits(seen, objects) * 10 + F.cross_entropy(where, places)


def accuracy(judge: Judge, count: int) -> dict[str, float]:
    """On evaluation scenes apart from the benchmark's: the set of objects exactly right, the place right, both."""
    right = np.zeros(3)
    for seed in tqdm(TEST_SEEDS[:count], desc="test", disable=None):
        s = scene(seed)
        seen, place = judge.says(s.picture())
        hits = seen == {thing.name for thing in s.things}, place == s.place
        right += (*hits, all(hits))
    return dict(zip(("objects", "place", "both"), (right / count).tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.judge", description="Train and test the judge.")
    add_training(parser, scenes=20_000)
    parser.add_argument("--test", type=count, default=1000, help="test scenes (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, metavar="DIR", help="(%(default)s)")
    run_command(parser, train)


def train(args: argparse.Namespace) -> None:
    prepare(args, RECIPE)
    chosen = [scene(seed) for seed in TRAIN_SEEDS[-args.scenes :]]
    pictures = torch.from_numpy(rendered(args.work / f"judge-{args.scenes}.npy", chosen)).to(args.device)
    objects, places = (torch.from_numpy(np.array(part)).to(args.device) for part in zip(*(labels(s) for s in chosen)))
    judge = Judge().to(args.device)
    run = Run("judge", judge, args.rate, args)
    for generator in run.steps():
        pick = torch.randint(len(chosen), (args.batch,), generator=generator, device=generator.device)
        x = disturbed(to_input(pictures[pick, ..., :3], args.device), generator)
        loss = loss_of(judge, x, objects[pick], places[pick])
        run.learn(loss)
        if run.step % 100 == 0:
            run.log(loss=loss.item())
    run.save()
    halves = {k: v.cpu().half().contiguous() for k, v in run.average.values.items()}
    tested = Judge()
    tested.load_state_dict({k: v.float() for k, v in halves.items()})
    report = {"steps": run.step, "minutes": round(run.seconds / 60, 1), "scenes": args.scenes, "test_scenes": args.test}
    report |= {"accuracy": accuracy(tested.eval(), args.test)}
    args.output.mkdir(parents=True, exist_ok=True)
    write_whole(args.output / "judge.safetensors", save(halves))
    write_json(args.output / "judge.json", report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
