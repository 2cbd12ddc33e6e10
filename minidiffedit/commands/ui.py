"""ui: a page in the browser to edit on, served from this machine."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Command, add_model, load_model, say_note

if TYPE_CHECKING:
    from ..page.runs import Choice

NAMED: tuple[str, ...] = ("vae", "lora", "embedding", "device", "dtype", "attention", "variant")
NAMED += ("revision", "cache_dir", "compile", "low_memory")


def add_ui(parser: argparse.ArgumentParser, words: list[str]) -> None:
    parser.add_argument("picture", nargs="?", type=Path, metavar="IMAGE", help="a picture to begin with")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="where it listens (%(default)s)")
    about = "who may come: 127.0.0.1, this machine alone (%(default)s); 0.0.0.0 is everyone who can reach it"
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=about)
    about = "a further model to choose on the page; one is in memory at a time; repeatable"
    parser.add_argument("--other-model", action="append", default=[], metavar="MODEL", help=about)
    add_model(parser)


def run_ui(args: argparse.Namespace) -> dict[str, Any]:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError('the page needs Gradio: pip install "minidiffedit[ui]", in a clone ".[ui]"') from None
    from ..files.hub import DEFAULT
    from ..files.images import read_picture
    from ..page.runs import Choice, Studio
    from ..page.ui import Setup, served

    if args.picture:
        read_picture(args.picture)
    models, unnamed = [args.model or DEFAULT, *args.other_model], not (args.model or args.other_model)

    def load(choice: Choice) -> Any:
        return load_model(chosen(args, choice._replace(model="" if unnamed else choice.model)))

    def named(choice: Choice) -> tuple[list[str], str]:
        said = vars(chosen(args, choice))
        known = {name: said[name] for name in NAMED if said[name] not in ("auto", None, False, [])}
        return in_a_command(choice.model, known), in_python(choice.model, known)

    studio = Studio(load, Choice(models[0], args.vae or "", tuple(args.lora)))
    setup = Setup(models, args.vae or "", args.lora, named, args.picture)
    with served(studio, setup, args.host, args.port) as url:
        say_note(f"{url} shows the page; Ctrl-C ends it")
        while True:
            time.sleep(3600)


def chosen(args: argparse.Namespace, choice: "Choice") -> argparse.Namespace:
    said = {"model": choice.model or None, "vae": choice.vae or None, "lora": [*choice.loras]}
    return argparse.Namespace(**vars(args) | said)


def in_a_command(model: str, known: dict[str, Any]) -> list[str]:
    """The model's part of a command line. known: its options, so far as they are not as usual."""
    from ..views.report import option

    each = [(name, one) for name, value in known.items() for one in (value if isinstance(value, list) else [value])]
    return [word for name, one in [("model", model), *each] for word in option(name, one)]


def in_python(model: str, known: dict[str, Any]) -> str:
    """The same as a call."""
    names = {"embedding": "embeddings"}
    words = [f"{names.get(n, n)}={str(value) if isinstance(value, Path) else value!r}" for n, value in known.items()]
    return f"StableDiffusion.load({', '.join([repr(model), *words])})"


COMMANDS = {
    "ui": Command("a page in the browser to edit on", add_ui, run_ui, lambda _: "", ("ui photo.png --model mini",)),
}
