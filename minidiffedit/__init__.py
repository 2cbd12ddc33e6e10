"""Text-driven image editing on Stable Diffusion v1, from scratch in PyTorch: DiffEdit and its family.

Reading order, each file resolving an unknown of the one before: diffedit (the algorithm), ddim, sd, unet, attention,
vae, clip, tokenizer, checkpoint; then path, options, plans, job, result and run, which run any file of methods/ by
name. The names below are resolved on first use, so that importing the package costs nothing.
"""

import os
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ddim import Trajectory, alpha_bar, level_at, levels, move, noises
    from .diffedit import Eps, Mask, Track, encode, find_mask, masked_decode, sample, threshold_maps
    from .files.hub import HubError, download
    from .files.images import composite
    from .files.masks import Steering
    from .files.states import load_state, save_state
    from .job import Step
    from .path import Path
    from .plans import Plan, plan
    from .result import Result
    from .run import edit, execute, generate, picture_mask, resume
    from .sd import StableDiffusion
    from .tokenizer import Tokenizer
    from .views.figures import Figure, figure
    from .views.previews import Previews
    from .views.report import report_page, save_report
    from .views.sheet import Sheet, contact_sheet
    from .views.witness import Witness

__version__ = "0.2.0"


def _spins() -> str:
    """How often a thread of OpenMP looks whether it may go on before it sleeps, by whether others want the cores now.

    A count that loses nothing on a quiet machine holds up one that is busy, and the other way round: measured in
    kernels/README.md. Linux counts those who run; elsewhere there is mostly no libgomp to tell.
    """
    running = set[int]()
    for _ in range(5):
        try:
            with open("/proc/loadavg") as file:
                running.add(int(file.read().split()[3].partition("/")[0]))
        except (OSError, ValueError, IndexError):
            return "5000"
        time.sleep(0.001)
    return "1000" if min(running) > 1 else "5000"


# libgomp reads this once, when torch is loaded.
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = _spins()

_HOME = {
    "ddim": "Trajectory alpha_bar level_at levels move noises",
    "diffedit": "Eps Mask Track encode find_mask masked_decode sample threshold_maps",
    "files.hub": "HubError download",
    "files.images": "composite",
    "files.masks": "Steering",
    "files.states": "load_state save_state",
    "job": "Step",
    "path": "Path",
    "plans": "Plan plan",
    "result": "Result",
    "run": "edit execute generate picture_mask resume",
    "sd": "StableDiffusion",
    "tokenizer": "Tokenizer",
    "views.figures": "Figure figure",
    "views.previews": "Previews",
    "views.report": "report_page save_report",
    "views.sheet": "Sheet contact_sheet",
    "views.witness": "Witness",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = [
    "Eps", "Figure", "HubError", "Mask", "Path", "Plan", "Previews", "Result", "Sheet", "StableDiffusion",
    "Steering", "Step", "Tokenizer", "Track", "Trajectory", "Witness", "alpha_bar", "composite", "contact_sheet",
    "download", "edit", "encode", "execute", "figure", "find_mask", "generate", "level_at", "levels", "load_state",
    "masked_decode", "move", "noises", "picture_mask", "plan", "report_page", "resume", "sample", "save_report",
    "save_state", "threshold_maps",
]  # fmt: skip


if not TYPE_CHECKING:  # a checker must see the names above, not one door that opens for any name

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
