"""report: the page of a saved edit."""

import argparse
from pathlib import Path
from typing import Any

from .common import add_command, add_model, check_outputs
from .editing import load_named, name_model


def add(commands: Any) -> None:
    report = add_command(commands, "report", run_report, say_report, "write the page of a saved edit")
    report.add_argument("state", type=Path, metavar="STATE", help="what `edit --save-state` wrote")
    report.add_argument("-o", "--output", type=Path, metavar="FILE", help="the page (default: NAME.html here)")
    report.add_argument(
        "--decode-previews", action="store_true", help="show some predictions through the autoencoder too"
    )
    add_model(report)


def run_report(args: argparse.Namespace) -> dict[str, Any]:
    from ..views.report import save_report
    from ..files.states import load_state, read_record

    _, record = read_record(args.state)
    output = args.output or Path(f"{args.state.stem}.html")
    check_outputs([args.state], [], report=output)
    name_model(args, record)
    state = load_state(args.state, load_named(args, record))
    save_report(state, output, state=args.state, decode_previews=args.decode_previews)
    return {"output": str(output), "bytes": output.stat().st_size, "seed": state.seed, "verdict": state.verdict}


def say_report(result: dict[str, Any]) -> str:
    return f"{result['output']}\n{result['bytes']:,} bytes; opens in any browser, from disk"
