"""Pictures that are drawn from a seed, photos cut in quarters, and 12 edits of each.

    python scripts/picture_set.py --out FOLDER [--pictures 2000] [--photos FOLDER]

A file is named by its picture and edit: ``00017_crop.jpg``. Each photo in FOLDER must show
something else; its quarters do not overlap, so that each counts as a picture of its own.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

Picture = Image.Image
LONGEST = 520  # pixels of a side
KINDS = ("clouds", "scene", "page", "pattern", "chart", "smooth")
WORDS = 9
LEAST_SPREAD = 1  # grey values: pictures of one colour show the same whatever they are of
LEAST_PHOTO = 300  # pixels of a quarter's shorter side


def noise(rng: np.random.Generator, size: tuple[int, int], octaves: int, fall: float) -> np.ndarray:
    """Return smooth noise from 0 to 1, (height, width): grids of random values, finer and finer."""
    total = np.zeros(size[::-1])
    for octave in range(octaves):
        side = 3 * 2**octave
        grid = Image.fromarray(rng.random((side, side + 1), np.float32), "F")
        total += fall**octave * np.asarray(grid.resize(size, Image.Resampling.BICUBIC))
    low, high = total.min(), total.max()
    return (total - low) / (high - low)


def coloured(rng: np.random.Generator, values: np.ndarray) -> Picture:
    """Return values from 0 to 1 as colours of a random palette."""
    stops = np.sort(rng.random(4))
    channels = [np.interp(values, stops, rng.integers(0, 256, 4)) for _ in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def colour(rng: np.random.Generator) -> tuple[int, ...]:
    """Return a random colour."""
    return tuple(rng.integers(0, 256, 3).tolist())


def words(rng: np.random.Generator, count: int) -> str:
    """Return random words."""
    letters = np.array(list(string.ascii_lowercase))
    return " ".join("".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(count))


def draw(seed: int) -> Picture:
    """Return the picture of a number."""
    rng = np.random.default_rng((seed, 16))
    wide, high = rng.integers(LONGEST // 2, LONGEST, 2).tolist()
    size, kind = (wide, high), KINDS[seed % len(KINDS)]
    if kind == "clouds":
        return coloured(rng, noise(rng, size, 7, rng.uniform(0.5, 0.8)))
    if kind == "smooth":
        return coloured(rng, noise(rng, size, 2, 0.5))
    if kind == "pattern":
        y, x = np.mgrid[:high, :wide] / LONGEST
        waves = sum(
            np.sin(2 * np.pi * (rng.normal(0, 12) * x + rng.normal(0, 12) * y + rng.random()))
            for _ in range(3)
        )
        grain = noise(rng, size, 6, 0.8)
        return coloured(rng, (waves + 3) / 6 * 0.6 + 0.4 * grain)
    if kind == "page":
        return page(rng, size)
    picture = coloured(rng, noise(rng, size, 5, 0.5)) if kind == "scene" else plain(rng, size)
    pen = ImageDraw.Draw(picture, "RGBA")
    for _ in range(rng.integers(4, 18)):
        x, y = rng.integers(0, wide), rng.integers(0, high)
        w, h = rng.integers(10, wide // 2), rng.integers(10, high // 2)
        fill = (*colour(rng), int(rng.integers(120, 256)))
        shape = rng.integers(3)
        if shape == 0:
            pen.ellipse((x, y, x + w, y + h), fill)
        elif shape == 1:
            pen.rectangle((x, y, x + w, y + h), fill)
        else:
            points = rng.integers(0, (wide, high), (3, 2))
            pen.polygon([tuple(point) for point in points.tolist()], fill)
    if kind == "scene":
        grain = np.asarray(picture) + rng.normal(0, 8, (high, wide, 3))
        picture = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
    return picture


def plain(rng: np.random.Generator, size: tuple[int, int]) -> Picture:
    """Return an empty sheet."""
    return Image.new("RGB", size, colour(rng))


def page(rng: np.random.Generator, size: tuple[int, int]) -> Picture:
    """Return a page of text with a heading and perhaps a picture."""
    picture = Image.new("RGB", size, tuple(rng.integers(225, 256, 3).tolist()))
    pen, step = ImageDraw.Draw(picture), int(rng.integers(12, 22))
    pen.text((12, 8), words(rng, 2), colour(rng), ImageFont.load_default(step * 2))
    font = ImageFont.load_default(step * 0.8)
    for y in range(8 + 3 * step, size[1] - step, step):
        if rng.random() < 0.85:
            pen.text((12, y), words(rng, int(rng.integers(2, WORDS))), (30, 30, 30), font)
    if rng.random() < 0.5:
        inset = (size[0] // 3, size[1] // 3)
        place = tuple((rng.random(2) * 0.6 * np.array(size)).astype(int).tolist())
        picture.paste(coloured(rng, noise(rng, inset, 6, 0.6)), place)
    return picture


def text_bar(picture: Picture) -> Picture:
    """Return a picture with a line of text on a bar over its lowest eighth."""
    made, (wide, high) = picture.copy(), picture.size
    pen, top = ImageDraw.Draw(made), high - high // 8
    pen.rectangle((0, top, wide, high), (0, 0, 0))
    pen.text((8, top + 4), "when you see it", (255, 255, 255), ImageFont.load_default(high // 12))
    return made


def cropped(picture: Picture) -> Picture:
    """Return the middle: a twentieth less on each side, so 10 % less each way."""
    wide, high = picture.size
    return picture.crop((wide // 20, high // 20, wide - wide // 20, high - high // 20))


def same(picture: Picture) -> Picture:
    """Return the picture."""
    return picture


EDITS: dict[str, tuple[Callable[[Picture], Picture], str, int]] = {  # how, suffix, quality
    "original": (same, "png", 0),
    "jpeg30": (same, "jpg", 30),
    "resize": (lambda p: p.resize((p.width * 6 // 10, p.height * 6 // 10)), "jpg", 90),
    "crop": (cropped, "jpg", 90),
    "brightness": (lambda p: ImageEnhance.Brightness(p).enhance(1.3), "jpg", 90),
    "grey": (lambda p: p.convert("L").convert("RGB"), "jpg", 90),
    "text": (text_bar, "jpg", 90),
    "blur": (lambda p: p.filter(ImageFilter.GaussianBlur(2)), "jpg", 90),
    "border": (lambda p: ImageOps.expand(p, p.width // 20, (255, 255, 255)), "jpg", 90),
    "rotate90": (lambda p: p.transpose(Image.Transpose.ROTATE_90), "jpg", 90),
    "mirror": (ImageOps.mirror, "jpg", 90),
    "webp": (same, "webp", 80),
    "thumbnail": (lambda p: ImageOps.contain(p, (128, 128)), "jpg", 85),
}


def quarters(path: Path) -> list[Picture]:
    """Return the quarters of a photo, shrunk; the photo itself if it is small."""
    with Image.open(path) as opened:
        alpha = opened.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", alpha.size, "white"), alpha).convert("RGB")
    wide, high = whole.size
    parts = [whole]
    if min(wide, high) >= 2 * LEAST_PHOTO:
        middle = [(x, y) for y in (0, high // 2) for x in (0, wide // 2)]
        parts = [whole.crop((x, y, x + wide // 2, y + high // 2)) for x, y in middle]
    return [ImageOps.contain(part, (LONGEST, LONGEST)) for part in parts]


def save(picture: Picture, number: int, out: Path) -> bool:
    """Save a picture and its edits, unless it has one colour only; return whether."""
    if float(np.asarray(picture.convert("L")).std()) < LEAST_SPREAD:
        return False
    for edit, (how, suffix, quality) in EDITS.items():
        options: dict[str, Any] = {"quality": quality} if quality else {"compress_level": 1}
        how(picture).save(out / f"{number:05d}_{edit}.{suffix}", **options)
    return True


def save_drawn(number: int, out: Path) -> bool:
    """Draw a picture and save it; see `save`."""
    return save(draw(number), number, out)


def save_photo(first: int, path: Path, *, out: Path) -> list[bool]:
    """Save the quarters of a photo; see `save`."""
    return [save(part, first + at, out) for at, part in enumerate(quarters(path))]


def make(out: Path, pictures: int, photos: Path | None, processes: int = 2) -> dict[str, int]:
    """Write the set; return how many pictures are drawn, are of photos, and were left out."""
    out.mkdir(parents=True)
    files = sorted(p for p in photos.rglob("*") if p.is_file()) if photos else []
    with ProcessPoolExecutor(processes) as pool:
        saved = pool.map(partial(save_photo, out=out), range(0, 4 * len(files), 4), files)
        shot = [kept for parts in saved for kept in parts]
        numbers = range(4 * len(files), 4 * len(files) + pictures - len(shot))
        drawn = list(pool.map(partial(save_drawn, out=out), numbers, chunksize=8))
    return {"photos": sum(shot), "drawn": sum(drawn), "left out": pictures - sum(shot) - sum(drawn)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--photos", type=Path)
    options = parser.parse_args()
    print(make(options.out, options.pictures, options.photos))
