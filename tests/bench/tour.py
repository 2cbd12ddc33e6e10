"""`make tour`: run the notebook from top to bottom and keep what it shows.

python tests/bench/tour.py                  # writes minidiffedit/data/tour.ipynb anew, with its outputs
"""

import base64
import hashlib
import io
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

TOUR = Path(__file__).parents[2] / "minidiffedit" / "data" / "tour.ipynb"


def digest(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the code: what the outputs were made by."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def pack(notebook: nbformat.NotebookNode) -> None:
    """Its pictures in fewer bytes, pixel for pixel the same."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if "image/png" in output.get("data", ()):
            packed = io.BytesIO()
            with Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))) as picture:
                picture.save(packed, "PNG", optimize=True)
            output.data["image/png"] = base64.b64encode(packed.getvalue()).decode()


def run(folder: Path) -> nbformat.NotebookNode:
    """The notebook after a run in `folder`, in its own process. Raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(TOUR, 4)
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(folder)}}).execute()
    pack(notebook)
    notebook.metadata["code_that_ran"] = digest(notebook)
    return notebook


def main() -> int:
    start = time.perf_counter()
    notebook = run(TOUR.parent)
    nbformat.write(notebook, TOUR)
    size = TOUR.stat().st_size / 1e6
    print(f"{TOUR}: {len(notebook.cells)} cells, {size:.1f} MB, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
