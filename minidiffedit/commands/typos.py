"""What was meant perhaps: words that no command takes, by what is near and by what neighbouring tools call it."""

import argparse
import difflib
import os
import re
from collections.abc import Collection

from . import flag

# Neighbours' names (diffusers, A1111, ComfyUI, CompVis' scripts) -> ours, the first that the command has.
NEIGHBOURS = {
    "cfg cfg-scale guidance scale text-guidance-scale unconditional-guidance-scale": "--guidance-scale",
    "prompt target-prompt edit-prompt text caption": "--target TEXT",
    "source-prompt original-prompt src-prompt": "--source",
    "init-image init-img input input-image img source-image file": "--image",
    "num-inference-steps inference-steps sampling-steps ddim-steps num-steps n-steps": "--steps",
    "denoising-strength denoise denoising inpaint-strength edit-strength encode-ratio": "--strength",
    "negative neg negative-text neg-prompt uncond": "--negative-prompt",
    "out outfile outdir output-dir output-path save save-image": "--output",
    "n-samples num-images num-images-per-prompt n-iter samples candidates batch-count batch-size": "--count",
    "ckpt checkpoint model-path model-id sd-model pretrained-model-name-or-path weights": "--model",
    "mask-image mask-img inpaint-mask": "--mask",
    "threshold mask-thresholding mask-thresholding-ratio": "--mask-threshold",
    "num-maps num-maps-per-mask n-maps": "--maps",
    "mask-encode-strength": "--mask-strength",
    "random-seed manual-seed generator": "--seed",
    "w": "--width", "h": "--height", "resolution img-size image-size": "--size --width",
    "fp16 half float16 bf16 precision full-precision no-half": "--dtype",
    "lowvram medvram low-vram cpu-offload enable-model-cpu-offload": "--low-memory",
    "gpu cuda cpu use-cpu": "--device",
    "force yes y clobber": "--overwrite",
    "offline local-only": "--local-files-only",
}  # fmt: skip
OURS = {f"--{name}": ours.split() for names, ours in NEIGHBOURS.items() for name in names.split()}
COMMANDS = {"img2img": "edit --method sdedit", "txt2img": "generate", "inpaint": "edit --mask FILE", "list": "methods"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def strange_option(words: list[str], parser: argparse.ArgumentParser) -> str:
    """What to say of the first option that the parser does not know, "" if it knows all. It is looked for before the
    parser looks for what is missing: `--prompt` is no missing --target.
    """
    known = parser._option_string_actions
    words = words[: words.index("--")] if "--" in words else words
    for before, word in zip(["", *words], words):
        name = word.partition("=")[0]
        if not re.match(r"--?[A-Za-z]", name) or " " in name or name in known:
            continue
        if not name.startswith("--") and name[:2] in known and not name[2:].isalpha():  # -n4
            continue
        if before in known and known[before].nargs != 0 and name[:2] != "--":
            return f"{before} needs a value; one that begins with - is written {before}={word}"
        from ..plans import holders

        method, option = parser.get_default("method"), name[2:].replace("-", "_")
        found = holders("edits" if name == flag("edits") else option, method) if method else []
        having = [f"{flag(kind)} {one}" for kind, one in found]
        whose = f" of {method}" if method and ("method", method) not in found else ""  # else of another command
        if having and not {*OURS.get(name, ())} & known.keys():
            ways = f"; it comes with {', '.join(having[:3])}" if whose and "--method" in known else ""
            return f"there is no option {name}{whose}{ways}{', ...' if ways and having[3:] else ''}"
        ours = meant(name, [*known, *(str(one.metavar) for one in parser._actions if not one.option_strings)])
        return f"there is no option {name}{whose}" + (f" (did you mean {ours}?)" if ours else "")
    return ""


def meant(name: str, known: list[str]) -> str:
    """An option or a positional that is known, by the neighbours' name for it or by what is near; "" if none is."""
    plain = f"--{name.lstrip('-').lower().replace('_', '-')}"
    close = difflib.get_close_matches(plain, known, 1, 0.75)
    return next((one for one in (plain, *OURS.get(plain, ()), *close) if one in known), "")


def strange_command(word: str, commands: Collection[str]) -> str:
    from ..methods.table import SYSTEMS

    if {word, word.rpartition("+")[2]} & SYSTEMS.keys():  # some end in a plus
        return f"{word} is a method, not a command: `minidiffedit edit --method {word}`"
    if word in COMMANDS:
        return f"no command {word!r}: `minidiffedit {COMMANDS[word]}`"
    if word.lower().endswith(PICTURES) or os.path.isfile(word):
        return f"a command comes first: `minidiffedit edit {word} --target TEXT`"
    close = difflib.get_close_matches(word.lower(), commands, 1, 0.6)
    return f"no command {word!r}" + (f" (did you mean {close[0]}?)" if close else f"; there are {', '.join(commands)}")


def strange_words(unknown: list[str], commands: Collection[str]) -> str:
    """What to say of words that are no option's and no command's."""
    if any(word.lower().endswith(PICTURES) or os.path.isfile(word) for word in unknown):
        return f"one picture at a time, got {' '.join(unknown)} besides: `minidiffedit batch FOLDER` edits many"
    return f"too many words: {' '.join(unknown)} (a text of several words stands in quotes)"
