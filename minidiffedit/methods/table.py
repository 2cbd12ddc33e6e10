"""Every editing system by name: a row, not a branch. A new method is a file in this folder and one row of SYSTEMS; a
published combination of what is there is a row alone.
"""

from typing import Any, NamedTuple


class System(NamedTuple):
    """paper: its arXiv number, or its authors and place. edit: "module:function" in this folder, empty where there is none
    yet. inversion, mask: rows of INVERSIONS and MASKS, where the editor takes a path and a mask. options: where their
    defaults differ from the functions' own. status: L1 works and is proven on small weights (`tests/`), todo, blocked.
    letter: A inference on plain SD v1, B with gradients, C a checkpoint of its own, D another network. weights: base,
    inpainting or instruct. note: what is missing, or why it is blocked.
    """

    paper: str
    edit: str = ""
    inversion: str = ""
    options: dict[str, Any] = {}
    mask: str = ""
    status: str = "L1"
    letter: str = "A"
    weights: str = "base"
    note: str = ""


# What makes a `path` of a picture; any of them feeds any editor that takes one.
INVERSIONS = {
    "ddim": "inversions:ddim",
    "direct": "inversions:direct",
    "null-text": "null_text:null_text",
    "noise": "inversions:noise",
}

# What makes a `mask` where none is given.
MASKS = {
    "contrast": "diffedit:contrast",
    "contrasts": "diffedit_regions:contrasts",
}

PAPER = {"encode_text": "null", "strength": 0.8}  # DiffEdit's encoding: under no text, up to .8 of the noise

SYSTEMS = {
    "diffedit": System("2210.11427", "diffedit:decode", "ddim", PAPER, mask="contrast"),
    "diffedit-regions": System("2210.11427", "diffedit_regions:decode_edits", "ddim", PAPER, mask="contrasts"),
    "user-mask": System("2210.11427", "diffedit:decode", "ddim", PAPER, note="DiffEdit's decoding under your mask"),
    "encode-only": System("2210.11427", "diffedit:decode_all", "ddim", PAPER, note="DiffEdit without its mask"),
    "mask-only": System("2210.11427", "diffedit:decode", "noise", mask="contrast", note="DiffEdit from random noise"),
    "reconstruction": System("2210.11427", "diffedit:reconstruct", "ddim", PAPER, note="what the encoding loses"),
    "sdedit": System("2108.01073", "sdedit:sdedit"),
    "masactrl": System("2304.08465", "masactrl:masactrl", "direct"),
    "null-text-inversion": System("2211.09794", "replay:replay", "null-text", letter="B"),
    "replay": System("2010.02502", "replay:replay", "ddim", note="an inversion decoded under another text"),
    "sd-inpainting": System("2112.10752", "inpainting:inpaint", letter="C", weights="inpainting"),
    "text-to-image": System("2112.10752", "text_to_image:text_to_image", note="no picture goes in: `generate`"),
}
