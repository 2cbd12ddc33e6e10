"""The program's commands by name. The module of one is imported when it is asked for: there `add_NAME` puts its options
into a parser, given the words after the name, `run_NAME` makes a result of the arguments, `say_NAME` words of that.
"""

import argparse
from importlib import import_module
from typing import Any, NamedTuple

LONGEST_LINE = 800  # characters of an error or a warning
OWN = "options of the method"
MOST_SHOWN = 20  # options that a command's help shows, rare ones among them
USUAL = {
    "-h", "-o", "-n", "--method", "--methods", "--target", "--source", "--edit", "--instruction", "--negative-prompt",
    "--mask", "--reference", "--points", "--steps", "--strength", "--guidance-scale", "--mask-threshold", "--seed",
    "--size", "--width", "--height", "--rows", "--columns", "--values", "--metrics", "--like", "--overwrite",
    "--report", "--save-mask", "--save-state", "--dry-run", "--model", "--vae", "--lora", "--crop",
}  # fmt: skip


def shown(text: str) -> str:
    """On one line, not endless, and nothing in it steers the terminal: names and values may be a hostile file's."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} [...] {line[-LONGEST_LINE // 3 :]}"


def flag(name: str) -> str:
    """--mask-threshold for mask_threshold; of what can be given several times the singular."""
    return f"--{name.replace('_', '-')}" if name != "edits" else "--edit"


class Command(NamedTuple):
    """about: one line of help; module: in this folder; examples: command lines without the program's name."""

    about: str
    module: str
    examples: tuple[str, ...] = ()

    def parser(self, commands: Any, name: str) -> argparse.ArgumentParser:
        """allow_abbrev is off: --mask-t would be --mask-threshold today and two options tomorrow."""
        text = "\n  minidiffedit ".join([self.about[0].upper() + self.about[1:] + ".\n", *self.examples])
        how = argparse.RawDescriptionHelpFormatter
        parser = commands.add_parser(name, help=self.about, description=text, allow_abbrev=False, formatter_class=how)
        parser.set_defaults(parser=parser)
        return parser

    def fill(self, parser: argparse.ArgumentParser, name: str, words: list[str]) -> None:
        """Put the options into the parser; --help shows the usual ones, all of a method that is named, --help-all all.
        Raises ValueError for a method that there is not.
        """
        module = import_module(f".{self.module}", __package__)
        parser.set_defaults(run=getattr(module, f"run_{name}"), say=getattr(module, f"say_{name}"))
        getattr(module, f"add_{name}")(parser, words)
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument("--quiet", action="store_true", help="no progress, no warnings")
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        shorten(parser, words)


def shorten(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Usage on one line; of many options the help shows the usual ones, and all of a method that the words name."""
    options = [one for one in parser._actions if one.option_strings]
    needed = [f"{one.option_strings[-1]} {one.metavar}" for one in options if one.required]
    positional = [str(one.metavar) for one in parser._actions if not one.option_strings]
    parser.usage = " ".join(["%(prog)s", *positional, *needed, "[options]"])
    if len(options) <= MOST_SHOWN:
        return
    parser.add_argument("--help-all", action="help", help="show every option")
    named = "--method" in words
    own = [one for group in parser._action_groups if named and group.title == OWN for one in group._group_actions]
    rare = [one for one in options if not (one.required or one in own or USUAL & {*one.option_strings})]
    for one in rare if "--help-all" not in words else ():
        one.help = argparse.SUPPRESS


TEXTS = '--source "a horse" --target "a zebra"'
COMMANDS = {
    "edit": Command(
        "edit a picture by text, by any method",
        "editing",
        (
            f"edit photo.png {TEXTS} -o zebra.png",
            'edit photo.png --target "a zebra" --mask mask.png --seed 3 --dry-run',
            f"edit photo.png {TEXTS} --count 4",
            "edit other.png --like zebra.png --strength .6",
        ),
    ),
    "resume": Command(
        "go on from a saved edit; only changes are paid for", "editing", ("resume run.safetensors --mask-threshold .4",)
    ),
    "mask": Command("find the mask of an edit, without the edit", "editing", (f"mask photo.png {TEXTS}",)),
    "generate": Command(
        "make a picture from text alone", "editing", ('generate "a photo of a horse on a beach" -o horse.png',)
    ),
    "ui": Command("a page in the browser to edit on", "ui", ("ui photo.png --model mini",)),
    "learn": Command("learn weights of one picture, as a LoRA", "learn"),
    "methods": Command("list the editing methods, or show one", "methods"),
    "tour": Command("write a notebook that takes an edit apart, to learn from", "methods"),
    "words": Command(
        "show where a picture's attention looks for each word",
        "word_maps",
        ('words photo.png --source "a horse" --words horse',),
    ),
    "sheet": Command(
        "edit a picture over two options, or by several methods, on one page",
        "pages",
        (f"sheet photo.png {TEXTS} --rows strength=.4,.6,.8 --columns seed=0,1,2",),
    ),
    "figure": Command("draw one of the usual figures of an edit", "pages", (f"figure threshold photo.png {TEXTS}",)),
    "report": Command("write the page of a saved edit", "pages", ("report run.safetensors -o page.html",)),
    "batch": Command(
        "edit many pictures; goes on where it stopped",
        "many",
        ('batch photos --target "a zebra" -o edited', "batch list.csv --strength .6 -o edited"),
    ),
    "eval": Command(
        "edit a data set and measure; goes on where it stopped",
        "many",
        ("eval weights/mini/scenes --methods diffedit masactrl --model mini",),
    ),
    "info": Command("what a model file or folder is, from its headers alone", "models"),
    "verify": Command("check a model: sha256, headers, one known edit", "models"),
    "download": Command("fetch official weights", "models"),
    "bench": Command("measure this machine: seconds, rates, memory, errors", "models"),
}
