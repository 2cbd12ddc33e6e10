"""The words of a text over a picture: a page of heat maps, and their numbers."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..plans import function_at
from ..result import Result
from .layout import Page, Panel
from .report import coloured, pictured
from .sheet import notes, page_height
from .witness import Looks

STEPS = 4  # of the coarsest level that the page shows one by one
Chosen = dict[str, list[int]]  # a word or phrase -> which of the text's words it is


def chosen(source: str, words: str | None) -> Chosen:
    """Every word, or those that are named, before a model is loaded. Raises ValueError for words that the source does
    not have, and for a source without any.
    """
    of = function_at("words:words_of")(function_at("words:tokenizer")(), source)
    if words is None and of.names:
        return {f"{name} ({i + 1})" if name in of.names[:i] else name: [i] for i, name in enumerate(of.names)}
    at = {phrase: of.positions(phrase) for phrase in function_at("words:listed")(words) or [""]}
    return {phrase: [i for i, span in enumerate(of.spans) if {*span} & {*found}] for phrase, found in at.items()}


def word_page(done: Result, look: Looks, shown: Chosen) -> Image.Image:
    """A row a word: the mean over steps at each level, then the coarsest level at some steps. One scale for each column
    and all words, so that a word that is hardly looked at stays pale.
    """
    assert done.source
    coarse, size = next(iter(look.maps.values())), "{1} x {0}".format
    top = [("mean of all steps", f"{size(*maps.shape[2:])} cells") for maps in look.maps.values()]
    means, at_steps = [maps.mean(0) for maps in look.maps.values()], pictured(len(coarse), STEPS)
    top += [(f"t = {look.steps[i]}", size(*coarse.shape[2:])) for i in at_steps]
    columns = []
    for maps in (*means, *(coarse[i] for i in at_steps)):
        values = torch.stack([maps[at].sum(0) for at in shown.values()])
        columns.append([Panel(over(done.source, one)) for one in (values / values.max()).sqrt()])
    said = " Bright is where a word gets much of the attention; heights are square roots, on one scale for each column."
    settings = {name: one for name, one in done.settings.items() if name not in ("method", "seed")}
    head, left = [Panel(done.source, "the picture")], [("", phrase) for phrase in shown]
    text, height = notes(settings, done.evaluations) + said, page_height(done.source.size)
    return Page(f'"{look.prompt}"', text, head, [*zip(*columns)], left, top, height).draw()


def over(picture: Image.Image, heat: Tensor) -> Image.Image:
    """A heat map (h, w) in 0..1 over a picture in grey, the colder the more transparent."""
    cells = Image.fromarray((heat * 255).round().byte().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    hot, grey = coloured(torch.from_numpy(np.asarray(cells) / 255)).convert("RGB"), picture.convert("L").convert("RGB")
    return Image.composite(hot, grey, cells.point([60 + 6 * v // 10 for v in range(256)]))


def numbers(look: Looks, shown: Chosen) -> list[dict[str, Any]]:
    """Of each word, by level from the coarsest: its share of the attention, where most of it goes (x and y, shares of
    the picture's sides), the map of the mean over steps, and share and largest value at each step.
    """
    found = []
    for phrase, at in shown.items():
        levels = []
        for level, all_words in look.maps.items():
            maps = all_words[:, at].sum(1)  # (steps, h, w)
            mean = maps.mean(0)
            h, w = mean.shape
            y, x = divmod(int(mean.argmax()), w)
            one: dict[str, Any] = {"level": level, "cells": [w, h], "share": plain(mean.mean())}
            one |= {"peak": [plain((x + 0.5) / w), plain((y + 0.5) / h)], "mean": [[*map(plain, row)] for row in mean]}
            steps = zip(look.steps, maps.mean((1, 2)), maps.amax((1, 2)))
            one["steps"] = [{"t": t, "share": plain(share), "most": plain(most)} for t, share, most in steps]
            levels.append(one)
        found.append({"word": phrase, "levels": levels})
    return found


def plain(value: Any) -> float:
    """Five digits are enough, and thousands of them short."""
    return float(f"{float(value):.5g}")
