"""Bytes of a picture file to an upright RGB picture, with what the file says of its making.

Files come from strangers: whatever is wrong with one is an `Unreadable`, which says what.
"""

from __future__ import annotations

import io
import re
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from snipdedup.errors import SnipError

if TYPE_CHECKING:
    from PIL import Image

# The formats, by the names of their plugins in Pillow: none that runs programs, as EPS does.
PLUGINS = ("Jpeg", "Png", "WebP", "Gif", "Tiff", "Bmp", "Avif")
MOST_PIXELS = 200_000_000
ORIENTATION, MAKE, CAMERA, DATE_TIME, EXIF_IFD = 0x0112, 0x010F, 0x0110, 0x0132, 0x8769
# Of the EXIF folder: when the picture was taken, when it was digitised, and offsets from UTC.
TIMES = ((0x9003, 0x9011), (0x9004, 0x9012))
OFFSET = 0x9010
TURNED = (5, 6, 7, 8)  # orientations that swap width and height
BEGINNINGS = (  # how files that are no pictures often begin
    (rb"\s*<(!doctype html|html)", "HTML"), (rb"\s*<(\?xml|svg)", "XML or SVG"), (rb"%PDF", "PDF"),
    (rb"PK\x03\x04", "a zip"), (rb"\x1f\x8b", "gzip"), (rb"\s*[{\[]", "JSON or text"),
    (rb"....ftyp(hei[cx]|hevc|mif1|msf1)", "HEIC, which needs: pip install pillow-heif"),
    (rb"....ftypavif", "AVIF, which this Pillow cannot read; upgrade it: pip install -U pillow"),
    (rb"....ftyp", "a video"), (rb"\0+$", "only zeros"),
)  # fmt: skip


class Unreadable(Exception):  # noqa: N818 - the state of a file, not a fault of the program
    """Why a picture cannot be embedded: a category, or a category, a colon and details."""


class Decoded(NamedTuple):
    """A picture: RGB, upright, perhaps drafted smaller; sizes are those of the file, upright."""

    picture: Image.Image
    width: int
    height: int
    exif_time: str | None  # ISO 8601
    camera: str | None


def require() -> None:
    """Refuse to go on without Pillow."""
    if find_spec("PIL") is None:
        raise SnipError(
            "snip embed needs Pillow; install it with: pip install 'snipdedup-toolkit[images]'"
        )


@cache
def known_formats() -> list[str]:
    """Load the plugins of `PLUGINS`, and HEIC if pillow-heif is installed; return their formats."""
    from PIL import Image

    for name in PLUGINS:
        with suppress(ImportError):  # AVIF in an older Pillow
            import_module(f"PIL.{name}ImagePlugin")
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    wanted = {name.upper() for name in PLUGINS} | {"HEIF"}
    return [name for name in Image.OPEN if name in wanted]


def decode(data: bytes, least: int, most_pixels: int = MOST_PIXELS) -> Decoded:
    """Decode a picture file; a JPEG may be drafted to a shorter side of ``least`` pixels or more.

    Of files with several frames it is the first. What is transparent is white. Raises `Unreadable`.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise Unreadable("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=known_formats()) as opened:
            if opened.width * opened.height > most_pixels:
                size = f"{opened.width:,} x {opened.height:,}"
                raise Unreadable(f"too many pixels: {size}, at most {most_pixels:,}")
            return decode_opened(opened, least)
    except UnidentifiedImageError:
        found = next(
            (kind for begin, kind in BEGINNINGS if re.match(begin, data[:512], re.S | re.I)), ""
        )
        raise Unreadable("not a picture" + (f": found {found}" if found else "")) from None
    except Image.DecompressionBombError as error:
        raise Unreadable(f"too many pixels: {error}") from None
    except MemoryError:
        raise Unreadable("too little memory") from None
    except Unreadable:
        raise
    except Exception as error:  # a damaged file can fail in many ways inside Pillow
        text = " ".join(str(error).split()) or type(error).__name__
        cut = isinstance(error, EOFError) or "truncat" in text.lower()
        raise Unreadable(f"{'truncated' if cut else 'damaged'}: {text}") from None


def decode_opened(opened: Image.Image, least: int) -> Decoded:
    """Decode an opened file."""
    whole = opened.size
    drafted = opened.draft("RGB", (least, least)) is not None
    opened.load()
    try:
        exif = opened.getexif()
        turn, time, camera = exif.get(ORIENTATION), time_of(exif), camera_of(exif)
    except Exception:  # damaged EXIF data; the picture is whole
        turn, time, camera = None, None, None
    # Pillow turns TIFF and HEIC when it loads them, and takes the orientation out
    width, height = whole if drafted else opened.size
    if turn in TURNED:
        width, height = height, width
    return Decoded(upright(to_rgb(opened), turn), width, height, time, camera)


def upright(picture: Image.Image, orientation: Any) -> Image.Image:
    """Return a picture turned and mirrored as its EXIF orientation, 1 to 8, asks for."""
    from PIL import Image

    way = Image.Transpose
    ways = (
        way.FLIP_LEFT_RIGHT, way.ROTATE_180, way.FLIP_TOP_BOTTOM, way.TRANSPOSE, way.ROTATE_270,
        way.TRANSVERSE, way.ROTATE_90,
    )  # fmt: skip
    known = isinstance(orientation, int) and 2 <= orientation <= 8
    return picture.transpose(ways[orientation - 2]) if known else picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a loaded picture of any mode as RGB."""
    from PIL import Image

    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture.copy() if picture.readonly else picture
    if picture.mode[0] in "IF":
        return Image.fromarray(to_bytes(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        ground = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, clear).convert("RGB")
    return picture.convert("RGB")


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Scale grey values of 16 or 32 bits, or floats, to uint8.

    Integers up to 65,535 are taken as 16 bits, floats from 0 to 1 as shares of white. Others are
    stretched from their least to their greatest value; what is not finite is black.
    """
    grey = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(grey.min()), float(grey.max())
    full = 1.0 if values.dtype.kind == "f" else 65535.0
    if low < 0 or high > full:
        grey, full = grey - low, high - low or 1.0
    scaled: np.ndarray = np.rint(grey * 255 / full).astype(np.uint8)
    return scaled


def time_of(exif: Any) -> str | None:
    """Return when a picture was taken, as ISO 8601, with the offset from UTC where it is there."""
    more = exif.get_ifd(EXIF_IFD)
    found = [(more.get(time), more.get(offset)) for time, offset in TIMES]
    for time, offset in [*found, (exif.get(DATE_TIME), more.get(OFFSET))]:
        match = re.match(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d:\d\d:\d\d)", str(time or ""))
        zone = str(offset or "").strip("\0 ")
        zone = zone if re.fullmatch(r"[+-]\d\d:\d\d", zone) else ""
        if match:
            text = f"{match[1]}-{match[2]}-{match[3]}T{match[4]}{zone}"
            try:
                datetime.fromisoformat(text)
            except ValueError:  # 0000:00:00, say
                continue
            return text
    return None


def camera_of(exif: Any) -> str | None:
    """Return make and model of the camera; the make once where the model begins with it."""
    make, model = (str(exif.get(tag) or "").strip("\0 ") for tag in (MAKE, CAMERA))
    both = model if model.lower().startswith(make.lower()) else f"{make} {model}"
    text = "".join(letter for letter in both if letter.isprintable()).strip()
    return text or None
