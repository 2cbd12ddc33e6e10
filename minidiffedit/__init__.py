"""DiffEdit on Stable Diffusion v1, from scratch in PyTorch.

Reading order, each file resolving an unknown of the one before: diffedit (the algorithm), ddim, sd, unet, attention,
vae, clip, tokenizer, checkpoint; editor joins the first to the rest. The names below are resolved on first use, so that
importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arms import Redrawn, arm, composite, sdedit
    from .ddim import Trajectory, alpha_bar, level_at, levels, move, noises
    from .diffedit import Eps, Mask, Track, encode, find_mask, masked_decode, sample, threshold_maps
    from .editor import Edit, Generation, PictureMask, edit, generate, picture_mask
    from .views.figures import Figure, figure
    from .files.hub import HubError, download
    from .regions import Regions, edit_regions, regional_decode
    from .views.report import report_page, save_report
    from .sd import StableDiffusion
    from .views.sheet import Sheet, contact_sheet
    from .files.states import load_state, resume, save_state
    from .files.masks import Steering
    from .tokenizer import Tokenizer
    from .views.watch import Watch

__version__ = "0.1.0"

_HOME = {
    "arms": ("Redrawn", "arm", "composite", "sdedit"),
    "ddim": ("Trajectory", "alpha_bar", "level_at", "levels", "move", "noises"),
    "diffedit": ("Eps", "Mask", "Track", "encode", "find_mask", "masked_decode", "sample", "threshold_maps"),
    "editor": ("Edit", "Generation", "PictureMask", "edit", "generate", "picture_mask"),
    "views.figures": ("Figure", "figure"),
    "files.hub": ("HubError", "download"),
    "regions": ("Regions", "edit_regions", "regional_decode"),
    "views.report": ("report_page", "save_report"),
    "sd": ("StableDiffusion",),
    "views.sheet": ("Sheet", "contact_sheet"),
    "files.states": ("load_state", "resume", "save_state"),
    "files.masks": ("Steering",),
    "tokenizer": ("Tokenizer",),
    "views.watch": ("Watch",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Edit", "Eps", "Figure", "Generation", "HubError", "Mask", "PictureMask", "Redrawn", "Regions", "Sheet",
    "StableDiffusion", "Steering", "Tokenizer", "Track", "Trajectory", "Watch", "alpha_bar", "arm", "composite",
    "contact_sheet", "download", "edit", "edit_regions", "encode", "figure", "find_mask", "generate", "level_at",
    "levels", "load_state", "masked_decode", "move", "noises", "picture_mask", "regional_decode", "report_page",
    "resume", "sample", "save_report", "save_state", "sdedit", "threshold_maps",
]  # fmt: skip


if not TYPE_CHECKING:  # a checker must see the names above, not one door that opens for any name

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
