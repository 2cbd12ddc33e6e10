"""words: where a picture's attention looks for each word of a text."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files.images import write_picture
from ..options import options_of
from ..plans import COMMON, function_at, plan_words
from ..run import execute_path
from ..views.report import save_report
from ..views.witness import Witness
from ..views.word_page import chosen, numbers, word_page
from . import common


def add_words(parser: argparse.ArgumentParser, words: list[str]) -> None:
    settled = plan_words("")
    own = {*options_of(function_at(settled.functions["path"])), *COMMON} - {"paste", "seed", "encode_text"}
    settled = replace(settled, options={name: one for name, one in settled.options.items() if name in own})
    common.add_image(parser, "the page (.png, .jpg, .webp; default: NAME-words.png here)")
    parser.add_argument("--source", required=True, metavar="TEXT", help="what the picture shows")
    parser.add_argument("--words", metavar="WORD,WORD", help="only these words or phrases (default: every word)")
    common.add_options(parser.add_argument_group("options of the encoding, which is looked at"), settled)
    parser.add_argument("--report", type=Path, metavar="FILE", help="a page (.html) too: each level, step by step")
    common.add_no_metadata(parser)
    common.add_dry_run(parser)
    common.add_model(parser)


def run_words(args: argparse.Namespace) -> dict[str, Any]:
    settled = plan_words(**common.arguments(args, plan_words("")))
    shown = chosen(settled.given["source"], args.words)
    picture, output = common.picture_and_output(args, "words")
    rows = {"encode": common.predicted(args, settled)[0]["encode"]}
    if args.dry_run:
        return common.dry_run(args, [settled], rows, picture.size)
    sd, seen = common.load(args), Witness()
    with common.progress(args.quiet, rows) as watch:
        done = execute_path(settled, sd, picture, watch=watch, witness=seen)
    record = common.record_of(args, done)
    (look,) = seen.looks
    write_picture(word_page(done, look, shown), output, common.text_chunks(args, record))
    result = {"output": str(output), "words": numbers(look, shown)}
    if args.report:
        save_report(done, args.report, picture=args.picture or args.image)
        result["report"] = str(args.report)
    return result | common.outcome(args, done, rows, record)


def say_words(result: dict[str, Any]) -> str:
    if "output" not in result:
        return common.say_dry(result)
    lines = [result[key] for key in ("output", "report") if key in result]
    for one in result["words"]:
        level = one["levels"][0]
        share, (x, y) = level["share"], level["peak"]
        lines.append(
            f"{one['word']:16} {share:6.1%} of the attention, most of it at {x:.0%} from the left, {y:.0%} from above"
        )
    return "\n".join(lines)
