"""Pictures laid out on one page with labelled rows and columns; Pillow alone. Knows nothing of models or edits.

Labels are in the typeface that Pillow carries, so that a page looks the same on every machine; it has Latin letters
without accents, and other writing is shown as question marks.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
BLACK, GREY, GAP = "#202020", "#606060", 8


class Panel(NamedTuple):
    """A picture of any mode and size, and a word or two below it. drawn: it was made for the page and is not scaled."""

    picture: Image.Image
    caption: str = ""
    drawn: bool = False


@dataclass(frozen=True)
class Page:
    """What stands on a page: title and notes, a line of panels, then the grid. left, top: (name, value) of each row
    and column, the name small above the value; height: the longer side of every picture, in pixels.
    """

    title: str
    notes: str
    head: Sequence[Panel]
    grid: Sequence[Sequence[Panel]]
    left: Sequence[tuple[str, str]]
    top: Sequence[tuple[str, str]]
    height: int = 192

    def draw(self) -> Image.Image:
        """PIL RGB, as large as it must be: nothing is cut, and nothing overlaps."""
        size = max(13, self.height // 15)
        fonts = small, large = ImageFont.load_default(size), ImageFont.load_default(size + 3)
        line = round(1.35 * (size + 3))
        lines = [[scaled(panel, self.height) for panel in row] for row in ([self.head] if self.head else [])]
        lines += [[scaled(panel, self.height) for panel in row] for row in self.grid]
        first = int(bool(self.head))  # line of the grid
        margin, column = longest(self.left, fonts), longest(self.top, fonts)
        column = max([column, *(across(panel, small) for row in lines[first:] for panel in row)])
        x0 = GAP + (margin + 2 * GAP if margin else 0)
        most = max((len(row) for row in lines[first:]), default=0)
        wide = GAP + sum(across(panel, small) + GAP for row in lines[:first] for panel in row)
        width = max(x0 + (column + GAP) * most, wide, 2 * GAP + 24 * size)
        text = [(one, large, BLACK) for one in wrapped(self.title, large, width - 2 * GAP)]
        text += [(one, small, GREY) for one in wrapped(self.notes, small, width - 2 * GAP)]
        heights = [max(panel.picture.height for panel in row) for row in lines]
        steps = [tall + line * any(panel.caption for panel in row) + GAP for tall, row in zip(heights, lines)]
        above = 2 * line + GAP // 2 if self.top else 0

        page = Image.new("RGB", (width, 2 * GAP + line * len(text) + sum(steps) + above), "white")
        draw = ImageDraw.Draw(page)
        y = GAP
        for one, font, colour in text:
            draw.text((GAP, y), one, fill=colour, font=font)
            y += line
        y += GAP
        for j, (row, tall, step) in enumerate(zip(lines, heights, steps)):
            if j == first:
                for i, pair in enumerate(self.top):
                    label(draw, x0 + i * (column + GAP) + column // 2, y + line, pair, fonts, "mm")
                y += above
            x = GAP if j < first else x0
            if j >= first and self.left:
                label(draw, GAP + margin, y + tall // 2, self.left[j - first], fonts, "rm")
            for panel in row:
                room = across(panel, small) if j < first else column
                put(page, panel, (x, y, room, tall), small)
                x += room + GAP
            y += step
        return page


def longest(labels: Sequence[tuple[str, str]], fonts: tuple[Font, Font]) -> int:
    """The width of the widest label, in pixels."""
    return math.ceil(max((font.getlength(plain(t)) for pair in labels for font, t in zip(fonts, pair)), default=0))


def label(draw: Any, x: int, y: int, pair: tuple[str, str], fonts: tuple[Font, Font], anchor: str) -> None:
    """Name and value one above the other, or what there is of them alone, about the height y."""
    said = [(plain(t), font, fill) for t, font, fill in zip(pair, fonts, (GREY, BLACK)) if t]
    line = sum(font.getbbox("Ay")[3] for font in fonts) / 2 * 1.25
    for i, (text, font, fill) in enumerate(said):
        draw.text((x, y + line * (i - (len(said) - 1) / 2)), text, fill=fill, font=font, anchor=anchor)


def put(page: Image.Image, panel: Panel, box: tuple[int, int, int, int], font: Font) -> None:
    """A panel at the foot of its box (x, y, width, height), the caption below."""
    x, y, width, height = box
    page.paste(panel.picture, (x + (width - panel.picture.width) // 2, y + height - panel.picture.height))
    draw = ImageDraw.Draw(page)
    draw.text((x + width // 2, y + height + 3), plain(panel.caption), fill=GREY, font=font, anchor="ma")


def across(panel: Panel, font: Font) -> int:
    """The wider of picture and caption, in pixels."""
    return max(panel.picture.width, math.ceil(font.getlength(plain(panel.caption))))


def scaled(panel: Panel, height: int) -> Panel:
    """As RGB, the longer side as told."""
    picture = panel.picture.convert("RGB")
    scale = 1 if panel.drawn else height / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return panel._replace(picture=picture if size == picture.size else picture.resize(size, how))


def wrapped(text: str, font: Font, width: int) -> list[str]:
    """Lines no longer than `width` pixels, broken at spaces; a single word that is longer is broken too."""
    lines = [""]
    for word in plain(text).split():
        while word:
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= width:
                lines[-1], word = longer, ""
            elif lines[-1]:
                lines.append("")
            else:
                fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                lines[-1], word = word[:fits], word[fits:]
    return [line for line in lines if line]


def plain(text: str) -> str:
    """What the typeface can show of a text."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(c if c.isascii() else "?" for c in letters if not unicodedata.combining(c))
