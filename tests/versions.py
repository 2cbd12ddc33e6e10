"""The fast tests with the lowest declared versions and with the newest ones, on every Python that is here.

    make test-versions                                            # all; VERSIONS=FOLDER for the environments (20 GB)
    make test-versions TRIED="--only lowest --python 3.10 -- -x"  # a part; what follows -- goes to pytest

Lowest: each run-time package at its bound in pyproject.toml, on the oldest Python that is here. The peers in the tests
(diffusers, transformers) are then the last releases that go with those, and triton is torch's own: LOWEST_PEERS below.
A test of something that an old release lacks says so where it stands, and is counted as skipped, never left out here.
Newest: whatever pip finds now, on each Python. The environments stay, and are brought up to date by the next run.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MINORS = range(10, 20)
LOWEST_PEERS = ["diffusers==0.32.2", "transformers==4.48.0", "matplotlib==3.8.0"]
SHOWN = ("torch", "safetensors", "tokenizers", "numpy", "pillow", "huggingface_hub", "diffusers", "transformers")
TELL = f"import importlib.metadata as m; print(*(m.version(name) for name in {SHOWN}))"


def pythons() -> dict[str, str]:
    """ "3.10" -> a Python of that kind that answers: on the path, or of pyenv."""
    found = {}
    for minor in MINORS:
        on_path = shutil.which(f"python3.{minor}")
        kept = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        for candidate in [on_path, *map(str, kept)]:
            if (
                candidate
                and subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
            ):
                found[f"3.{minor}"] = candidate
                break
    return found


def listed(name: str) -> list[str]:
    """The requirements in pyproject.toml's list of that name (Python 3.10 has no reader of TOML)."""
    block = re.search(rf"^{name} = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert block, name
    return re.findall(r'^ +"(.+)",', block[1], re.M)


def lowest() -> list[str]:
    pinned = [requirement.replace(">=", "==") for requirement in listed("dependencies")]
    peers = {re.split("[=>]", peer)[0] for peer in [*LOWEST_PEERS, "triton>"]}
    return [*pinned, *LOWEST_PEERS, *(test for test in listed("test") if re.split("[=>]", test)[0] not in peers)]


def tried(which: str, version: str, python: str, into: Path, options: list[str]) -> tuple[str, bool]:
    """Its row of the table, and whether all tests passed."""
    folder = into / f"{which}-{version}"
    inside = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if which == "lowest":
        installs = [[*pip, *lowest()], [*pip, "--no-deps", "--editable", ROOT]]
    else:
        installs = [[*pip, "--upgrade", "--upgrade-strategy", "eager", "--editable", f"{ROOT}[test]"]]
    if any(subprocess.run(install).returncode for install in installs):
        return f"{which:<8}{version:<6}{'?':<14}could not be installed: pip says why above", False
    versions = subprocess.run([inside, "-c", TELL], check=True, capture_output=True, text=True).stdout.split()
    print(f"\n{which}, Python {version}: {', '.join(map(' '.join, zip(SHOWN, versions)))}", flush=True)
    run = [inside, "-m", "pytest", "-m", "not slow", *options]
    lines = []
    with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    ended = next(
        (line.strip(" =\n") for line in reversed(lines) if re.search(r"\d (passed|failed|error)", line)), "no tests ran"
    )
    return f"{which:<8}{version:<6}{versions[0]:<14}{ended}", process.returncode == 0


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    found = {version: path for version, path in pythons().items() if not args.python or version in args.python}
    if lacking := [one for one in args.python or () if one not in found] or ["3.10 or newer"] * (not found):
        raise SystemExit(f"error: Python {', '.join(lacking)} is not here")
    if args.only != "newest":
        yield "lowest", *next(iter(found.items()))
    if args.only != "lowest":
        yield from (("newest", *pair) for pair in found.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / ".versions")
    parser.add_argument("--only", choices=["lowest", "newest"])
    parser.add_argument("--python", nargs="+", metavar="3.N", help="of these alone")
    parser.add_argument("--workers", default="2")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="of pytest")
    args = parser.parse_args()
    rows = [tried(*one, args.into, ["-n", args.workers, "--dist", "worksteal", *args.options]) for one in wanted(args)]
    print("\n" + "\n".join(row for row, _ in rows))
    return int(not all(right for _, right in rows))


if __name__ == "__main__":
    sys.exit(main())
