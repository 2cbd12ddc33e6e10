"""ui: a page in the browser to edit on, served from this machine."""

import argparse
import time
from pathlib import Path
from typing import Any

from .common import Command, add_model, load_model, say_note

USUAL = {"device": "auto", "dtype": "auto", "attention": "auto"}
NAMED = ("vae", "device", "dtype", "attention", "variant", "revision", "cache_dir")


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
    from ..page.runs import Studio
    from ..page.ui import Setup, served

    if args.picture:
        read_picture(args.picture)
    models, loras = [args.model or DEFAULT, *args.other_model], tuple(args.lora)

    def load(model: str, lora: Any) -> Any:
        args.lora, args.model = [*lora], model if args.model or args.other_model else None
        return load_model(args)

    def named(choice: tuple[str, tuple[str, ...]]) -> tuple[list[str], str]:
        return in_a_command(args, *choice), in_python(args, *choice)

    studio = Studio(load, (models[0], loras))
    with served(studio, Setup(models, loras, named, args.picture), args.host, args.port) as url:
        say_note(f"{url} shows the page; Ctrl-C ends it")
        while True:
            time.sleep(3600)


def in_a_command(args: argparse.Namespace, model: str, lora: tuple[str, ...]) -> list[str]:
    """The model's part of a command line."""
    said = ["--model", model]
    for name in NAMED:
        if (value := getattr(args, name)) != USUAL.get(name):
            said += [f"--{name.replace('_', '-')}", str(value)]
    said += [word for one in lora for word in ("--lora", one)]
    said += [word for one in args.embedding for word in ("--embedding", one)]
    return said + [f"--{name.replace('_', '-')}" for name in ("compile", "low_memory") if getattr(args, name)]


def in_python(args: argparse.Namespace, model: str, lora: tuple[str, ...]) -> str:
    """The same as a call."""
    found = {name: value for name in NAMED if (value := getattr(args, name)) != USUAL.get(name)}
    found |= {name: True for name in ("compile", "low_memory") if getattr(args, name)}
    found |= {"lora": [*lora]} if lora else {}
    found |= {"embeddings": args.embedding} if args.embedding else {}
    words = [f"{name}={str(value) if isinstance(value, Path) else value!r}" for name, value in found.items()]
    return f"StableDiffusion.load({', '.join([repr(model), *words])})"


def say_ui(result: dict[str, Any]) -> str:
    return ""


COMMANDS = {
    "ui": Command("a page in the browser to edit on", add_ui, run_ui, say_ui, ("ui photo.png --model mini",)),
}
