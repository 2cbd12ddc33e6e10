"""The world of the miniature: emoji objects on painted places, with captions, exact masks and exact edits.

A scene is a small description (`Scene`) from which picture, masks and caption follow; an edit is another description
that differs in one thing, so everything else is equal pixel for pixel. A seed decides the whole scene.
Objects are glyphs of the Noto Color Emoji font (SIL Open Font License 1.1, which does not extend to pictures made
with the font); the places are painted here.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 192  # pixels
FONT_NAME = "NotoColorEmoji.ttf"
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "~/Library/Fonts", "~/.fonts",
                "~/.local/share/fonts", "C:/Windows/Fonts")  # fmt: skip
TRAIN_SEEDS = range(0, 1_000_000)
EVAL_SEEDS = range(10_000_000, 11_000_000)

# Heads where the head is the clearer picture at 70 to 115 pixels, whole animals elsewhere.
OBJECTS = {
    "a horse": "🐴", "a zebra": "🦓", "a dog": "🐶", "a cat": "🐱", "a cow": "🐄", "a sheep": "🐑",
    "an elephant": "🐘", "a camel": "🐫", "a tiger": "🐯", "a rabbit": "🐇", "a rooster": "🐓", "a pig": "🐖",
    "a panda": "🐼", "an apple": "🍎", "a pear": "🍐", "an orange": "🍊", "a lemon": "🍋", "a strawberry": "🍓",
    "a bowl of fruit": "🍚", "a bowl of salad": "🥗", "a bouquet of flowers": "💐", "a cake": "🎂", "a car": "🚗",
    "a bus": "🚌", "a bicycle": "🚲", "a sailboat": "⛵",
}  # fmt: skip
# "a bowl of fruit" has no glyph: these stand in the bowl of the rice glyph. (glyph, x, y, size), in parts of the tile.
FRUIT = (("🍌", 0.50, 0.26, 0.50), ("🍎", 0.29, 0.35, 0.40), ("🍊", 0.72, 0.36, 0.40), ("🍇", 0.50, 0.42, 0.36))

# place -> the words that join an object to it
PLACES = {
    "a grass field": "on a grass field",
    "a sandy beach": "on a sandy beach",
    "the snow": "in the snow",
    "a wooden table": "on a wooden table",
    "a brick road": "on a brick road",
    "the sea at sunset": "by the sea at sunset",
}
TEMPLATES = ("a photo of {}", "{}", "a picture of {}")

# Every third object is never seen in one of the places while training (9 of 156 pairs).
HELD_OUT = frozenset((name, list(PLACES)[(i // 3 + 2) % len(PLACES)]) for i, name in enumerate(OBJECTS) if i % 3 == 0)


class SceneError(ValueError):
    """A scene that cannot be made; the message says what can."""


@dataclass(frozen=True)
class Thing:
    """One object: its centre and its longer side in parts of the picture's side, its turn in degrees, its tint."""

    name: str
    x: float
    y: float
    size: float
    angle: float = 0.0
    flip: bool = False
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)  # factors on red, green, blue


@dataclass(frozen=True)
class Scene:
    """A place, the number that decides its texture, and 0 to 2 things from left to right."""

    place: str
    look: int
    things: tuple[Thing, ...] = ()

    def picture(self) -> np.ndarray:
        """(192, 192, 3) uint8."""
        canvas = paint_place(self.place, self.look)
        for thing in self.things:
            colour, alpha = draw_thing(thing)
            canvas += alpha[..., None] * (colour - canvas)
        return np.rint(canvas.clip(0, 255)).astype(np.uint8)

    def masks(self) -> list[np.ndarray]:
        """One (192, 192) float32 alpha in [0, 1] per thing."""
        return [draw_thing(thing)[1] for thing in self.things]

    def alpha(self) -> np.ndarray:
        """The largest alpha of all things, (192, 192) float32."""
        return np.max([np.zeros((SIDE, SIDE), np.float32), *self.masks()], axis=0)

    def caption(self, template: str = TEMPLATES[0], with_place: bool = True) -> str:
        things = " and ".join(thing.name for thing in self.things)
        if not things:
            return template.format(self.place)
        return template.format(f"{things} {PLACES[self.place]}" if with_place else things)

    def swap(self, name: str, index: int = 0) -> "Scene":
        """The same scene with thing `index` replaced, at the same centre, size and turn."""
        things = list(self.things)
        things[index] = replace(things[index], name=check(name, OBJECTS, "object"))
        return replace(self, things=tuple(things))

    def remove(self, index: int = 0) -> "Scene":
        return replace(self, things=self.things[:index] + self.things[index + 1 :])

    def add(self, thing: Thing) -> "Scene":
        return replace(self, things=(*self.things, thing))

    def move_to(self, place: str) -> "Scene":
        """The same things in another place."""
        return replace(self, place=check(place, PLACES, "place"))


def true_mask(before: Scene, after: Scene) -> np.ndarray:
    """Where an edit may act: (192, 192) float32. The things that differ, old and new; all but the things if the place
    changed.
    """
    if before.place != after.place:
        return 1 - np.minimum(before.alpha(), after.alpha())
    changed = set(before.things) ^ set(after.things)
    return np.max([np.zeros((SIDE, SIDE), np.float32), *(draw_thing(thing)[1] for thing in changed)], axis=0)


def check(name: str, known: dict[str, str], kind: str) -> str:
    """The full name of an object or place; "horse" finds "a horse". Raises SceneError with the known names."""
    for article in ("", "a ", "an ", "the "):
        if article + name in known:
            return article + name
    raise SceneError(f"unknown {kind} {name!r}; known: {', '.join(known)}")


def scene(seed: int, object: str | None = None, place: str | None = None, count: int | None = None) -> Scene:
    """The scene of a seed. object, place: fixed instead of drawn, the rest stays as the seed has it.
    count: 0, 1 or 2 things; drawn if None (one in 82 of 100 scenes, none in 9, two in 9).
    """
    rng = np.random.default_rng(seed)
    names, places = list(OBJECTS), list(PLACES)
    drawn_place, look = places[rng.integers(len(places))], int(rng.integers(2**31))
    drawn_count = int(rng.choice([0, 1, 2], p=[0.09, 0.82, 0.09]))
    first, second = (names[i] for i in rng.choice(len(names), 2, replace=False))
    place = check(place, PLACES, "place") if place else drawn_place
    first = check(object, OBJECTS, "object") if object else first
    if second == first:  # possible only when `object` is given
        second = names[(names.index(first) + 1) % len(names)]
    count = drawn_count if count is None else count
    if object and not count:
        count = 1

    def thing(name: str, low: float, high: float, left: float, right: float) -> Thing:
        """Size within low..high, centre where the whole tile fits between left and right."""
        size, free = float(rng.uniform(low, high)), rng.random(2).tolist()
        half = size / 2 + 0.02
        x = left + half + free[0] * max(0.0, right - left - 2 * half)
        y = half + (0.3 + 0.7 * free[1]) * (1 - 2 * half)  # rather low: things stand on the ground
        tint = tuple(float(v) for v in rng.uniform(0.92, 1.08, 3))
        return Thing(name, x, y, size, float(rng.uniform(-8, 8)), bool(rng.integers(2)), tint)  # type: ignore[arg-type]

    if count == 0:
        return Scene(place, look)
    if count == 1:
        return Scene(place, look, (thing(first, 0.36, 0.60, 0.0, 1.0),))
    return Scene(place, look, (thing(first, 0.34, 0.46, 0.0, 0.5), thing(second, 0.34, 0.46, 0.5, 1.0)))


def is_held_out(s: Scene) -> bool:
    return any((thing.name, s.place) in HELD_OUT for thing in s.things)


# --- drawing ---


@cache
def font() -> ImageFont.FreeTypeFont:
    for folder in FONT_FOLDERS:
        for path in sorted(Path(folder).expanduser().rglob(FONT_NAME)):
            return ImageFont.truetype(str(path), 109)  # the only size this bitmap font has
    raise SceneError(f"{FONT_NAME} not found; on Debian or Ubuntu: apt-get install fonts-noto-color-emoji")


def glyph(character: str) -> Image.Image:
    """One emoji, cut to its own box, RGBA."""
    tile = Image.new("RGBA", (136, 128))
    ImageDraw.Draw(tile).text((0, 0), character, font=font(), embedded_color=True)
    return tile.crop(tile.getbbox())


@cache
def sprite(name: str) -> Image.Image:
    """An object on a transparent square: its longer side fills the square, up to a margin for turning."""
    picture = glyph(OBJECTS[name])
    if name == "a bowl of fruit":
        picture = bowl_of_fruit(picture)
    side = round(max(picture.size) * 1.25)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def bowl_of_fruit(rice: Image.Image) -> Image.Image:
    """The bowl of the rice glyph, filled with fruit instead."""
    w, h = rice.size
    picture = Image.new("RGBA", (w, h))
    for character, x, y, size in FRUIT:
        fruit = glyph(character)
        factor = size * w / max(fruit.size)
        fruit = fruit.resize((round(fruit.width * factor), round(fruit.height * factor)), Image.Resampling.LANCZOS)
        corner = max(0, round(x * w - fruit.width / 2)), max(0, round(y * h - fruit.height / 2))
        picture.alpha_composite(fruit, corner)
    rim = round(0.52 * h)  # below it the glyph is bowl only
    picture.alpha_composite(rice.crop((0, rim, w, h)), (0, rim))
    return picture


def draw_thing(thing: Thing) -> tuple[np.ndarray, np.ndarray]:
    """colour (192, 192, 3) float32 0..255, meaningful where alpha (192, 192) float32 in [0, 1] is positive."""
    source = sprite(thing.name)  # Pillow weighs colours by alpha itself when it turns and scales RGBA
    if thing.flip:
        source = source.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = max(1, round(thing.size * SIDE * 1.25))
    source = source.rotate(thing.angle, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.LANCZOS)
    layer = Image.new("RGBA", (SIDE, SIDE))
    layer.paste(source, (round(thing.x * SIDE - side / 2), round(thing.y * SIDE - side / 2)))
    pixels = np.asarray(layer, np.float32)
    alpha = pixels[..., 3] / 255
    return (pixels[..., :3] * np.asarray(thing.tint, np.float32)).clip(0, 255), alpha


def noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Smooth noise of mean 0 and deviation about 1: a rows x columns grid of normals, enlarged; (192, 192) float32."""
    grid = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
    return np.asarray(grid.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def paint_place(place: str, look: int) -> np.ndarray:
    """(192, 192, 3) float32, 0..255. Texture is rather coarse: what an 8x autoencoder cannot keep would only blur."""
    rng = np.random.default_rng(look)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    jitter = rng.uniform(-10, 10, 3)
    horizon = rng.uniform(0.22, 0.40)

    def blend(top: list[float], bottom: list[float], at: np.ndarray) -> np.ndarray:
        return np.asarray(top) + (np.asarray(bottom) - np.asarray(top)) * at[..., None]

    def over(back: np.ndarray, front: np.ndarray, edge: np.ndarray | float) -> np.ndarray:
        """front below the line y = edge, softened over a pixel or two."""
        return back + (front - back) * ((y - edge) * SIDE / 2 + 0.5).clip(0, 1)[..., None]

    if place == "a grass field":
        sky = blend([120, 180, 235], [200, 225, 245], (y / horizon).clip(0, 1))
        ground = blend([95, 165, 60], [60, 125, 40], (y - horizon).clip(0, 1) / (1 - horizon))
        ground = ground + (10 * noise(rng, 5, 5) + 7 * noise(rng, 14, 40))[..., None] * [0.9, 1.0, 0.5]
        canvas = over(sky, ground, horizon + 0.015 * noise(rng, 2, 6))
    elif place == "a sandy beach":
        sky = blend([150, 205, 240], [215, 238, 248], (y / (0.5 * horizon)).clip(0, 1))
        water = blend([40, 150, 190], [110, 205, 215], ((y / horizon) - 0.5).clip(0, 1) * 2)
        water = water + 6 * noise(rng, 24, 5)[..., None]
        sand = blend([240, 215, 160], [222, 188, 125], (y - horizon).clip(0, 1) / (1 - horizon))
        sand = sand + (7 * noise(rng, 6, 6) + 4 * noise(rng, 26, 26))[..., None]
        canvas = over(over(sky, water, 0.5 * horizon), sand, horizon + 0.02 * noise(rng, 2, 4))
    elif place == "the snow":
        sky = blend([165, 180, 200], [205, 215, 228], (y / horizon).clip(0, 1))
        snow = blend([250, 252, 255], [222, 232, 246], (y - horizon).clip(0, 1) / (1 - horizon))
        snow = snow + 8 * noise(rng, 6, 3)[..., None] * [1.0, 0.9, 0.6]
        canvas = over(sky, snow, horizon + 0.03 * noise(rng, 2, 4))
        jitter *= 0.5
    elif place == "a wooden table":
        planks = int(rng.integers(3, 6))
        row = (y + rng.uniform()) * planks
        shade = rng.uniform(-16, 16, 2 * planks + 1)[np.floor(row).astype(int)]
        grain = 9 * noise(rng, 40, 3) + 4 * noise(rng, 20, 6)
        canvas = blend([170, 112, 62], [150, 95, 50], y) + (shade + grain)[..., None] * [1.0, 0.8, 0.6]
        gap = (np.abs(row % 1 - 0.5) - 0.5) * SIDE / planks  # pixels to the nearest gap between planks, negative
        canvas = canvas - (45 * np.exp(-((gap / 1.3) ** 2)))[..., None]
    elif place == "a brick road":
        rows = int(rng.integers(6, 9))
        row = (y + rng.uniform()) * rows
        column = (x + rng.uniform()) * rows / 2 + 0.5 * (np.floor(row) % 2)
        shades = rng.uniform(-18, 18, (2 * rows + 1, 2 * rows + 1))
        shade = shades[np.floor(row).astype(int), np.floor(column).astype(int)]
        canvas = np.asarray([178, 88, 70], np.float32) + (shade + 5 * noise(rng, 20, 20))[..., None] * [1.0, 0.8, 0.7]
        joint = np.minimum(0.5 - np.abs(row % 1 - 0.5), 2 * (0.5 - np.abs(column % 1 - 0.5))) * SIDE / rows
        canvas = canvas + (np.asarray([200, 185, 170]) - canvas) * (1.6 - joint).clip(0, 1)[..., None] * 0.8
    else:  # the sea at sunset
        horizon += 0.12
        sky = blend([95, 60, 130], [255, 150, 70], (y / horizon).clip(0, 1))
        sun = np.exp(-(((x - rng.uniform(0.15, 0.85)) ** 2 + (y - horizon + 0.03) ** 2) / 0.012))
        sky = sky + sun[..., None] * [30.0, 90.0, 60.0]
        sea = blend([190, 105, 95], [45, 40, 95], ((y - horizon) / (1 - horizon)).clip(0, 1))
        sea = sea + 11 * noise(rng, 24, 4)[..., None] * [1.0, 0.7, 0.6]
        canvas = over(sky, sea, horizon)
    return (canvas + jitter).astype(np.float32)


# --- command line ---


def mask_image(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(mask * 255).astype(np.uint8))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.scenes", description="Draw a scene and a true edit of it.")
    parser.add_argument("--seed", type=int, default=EVAL_SEEDS.start, help="evaluation seeds start at 10000000")
    parser.add_argument("--object", help="any of: " + ", ".join(OBJECTS))
    parser.add_argument("--place", help="any of: " + ", ".join(PLACES))
    edit = parser.add_mutually_exclusive_group()
    edit.add_argument("--to", metavar="OBJECT", help="the edit: another object instead")
    edit.add_argument("--to-place", metavar="PLACE", help="the edit: another place")
    edit.add_argument("--remove", action="store_true", help="the edit: the object removed")
    parser.add_argument("-o", "--output", type=Path, default=Path("."), metavar="DIR")
    args = parser.parse_args()
    try:
        before = scene(args.seed, args.object, args.place, count=1)
        after = None
        if args.to:
            after = before.swap(args.to)
        elif args.to_place:
            after = before.move_to(args.to_place)
        elif args.remove:
            after = before.remove()
        if after == before:
            raise ValueError(f"that is no edit: the scene shows {before.caption()!r} already")
        args.output.mkdir(parents=True, exist_ok=True)
        others = [name for name in ("source.png", "target.png", "mask.png") if (args.output / name).exists()]
        if others and not (args.output / "captions.json").exists():
            raise ValueError(f"{args.output} has a {others[0]} of another origin; name another folder with -o")
        if "target.png" in others and after is None:
            (args.output / "target.png").unlink()  # of the scene that was there
        record = {"seed": args.seed, "source": before.caption()} | ({"target": after.caption()} if after else {})
        (args.output / "captions.json").write_text(json.dumps(record) + "\n")
        Image.fromarray(before.picture()).save(args.output / "source.png")
        mask = before.alpha()
        if after is not None:
            Image.fromarray(after.picture()).save(args.output / "target.png")
            mask = true_mask(before, after)
        mask_image(mask).save(args.output / "mask.png")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
