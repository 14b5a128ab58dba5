"""Forty kinds of odd picture files, good and bad, each made here; `photo` draws a plain picture."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, features


def photo(seed: int = 0, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Return an RGB picture, another one for each seed: coarse shapes, with finer ones on them."""
    rng = np.random.default_rng(seed)
    whole = np.zeros((size[1], size[0], 3), np.float32)
    for side in (4, 8, 16, 32):
        layer = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        whole += np.asarray(layer.resize(size, Image.Resampling.BICUBIC)) * (2 / side)
    return Image.fromarray(np.uint8(whole * (255 / whole.max())))


def write_photos(folder: Path, count: int = 12) -> None:
    """Write JPEG files into two subfolders; a quarter of them are near copies of others."""
    for number in range(count):
        path = folder / f"{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(number % (count * 3 // 4)), "JPEG", quality=90 - number))


def encoded(picture: Image.Image, kind: str, **more: object) -> bytes:
    """Return a picture as the bytes of a file."""
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def with_exif(**tags: object) -> Image.Exif:
    """Return EXIF data: orientation, make, model, time, taken, offset."""
    exif = Image.Exif()
    numbers = {"orientation": 0x0112, "make": 0x010F, "model": 0x0110, "time": 0x0132}
    for name, number in numbers.items():
        if name in tags:
            exif[number] = tags[name]
    inner = {0x9003: tags.get("taken"), 0x9011: tags.get("offset")}
    exif.get_ifd(0x8769).update({tag: value for tag, value in inner.items() if value})
    return exif


def chunk(name: bytes, data: bytes) -> bytes:
    body = name + data
    return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size, and has no pixels."""
    sizes = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    empty = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", sizes) + empty


def good_files() -> dict[str, bytes]:
    """Return files that must be embedded, by name; each shows another picture."""
    number = iter(range(1000))

    def new() -> Image.Image:
        return photo(next(number))

    grey16 = (np.asarray(new().convert("L")).astype(np.uint16) * 257).astype("<u2")
    clear = new().convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    frames = [new(), new()]
    good = {
        "plain.jpg": encoded(new(), "JPEG"),
        "upper case.JPG": encoded(new(), "JPEG"),
        "progressive.jpg": encoded(new(), "JPEG", progressive=True),
        "grey.jpg": encoded(new().convert("L"), "JPEG"),
        "cmyk.jpg": encoded(new().convert("CMYK"), "JPEG"),
        "turned.jpg": encoded(new(), "JPEG", exif=with_exif(orientation=6)),
        "exif nonsense.jpg": encoded(new(), "JPEG", exif=b"Exif\0\0nonsense that is no TIFF"),
        "two in one.jpg": encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "bytes after the end.jpg": encoded(new(), "JPEG") + b"\0" * 999,
        "really a png.jpg": encoded(new(), "PNG"),
        "one pixel.png": encoded(Image.new("RGB", (1, 1), (9, 99, 200)), "PNG"),
        "a line.png": encoded(new().resize((900, 1)), "PNG"),
        "alpha.png": encoded(clear, "PNG"),
        "grey alpha.png": encoded(clear.convert("LA"), "PNG"),
        "palette.png": encoded(new().quantize(32), "PNG"),
        "palette clear.png": encoded(new().quantize(32), "PNG", transparency=3),
        "bilevel.png": encoded(new().convert("1"), "PNG"),
        "grey 16.png": encoded(Image.fromarray(grey16), "PNG"),
        "wide.webp": encoded(new(), "WEBP"),
        "lossless alpha.webp": encoded(clear.rotate(7), "WEBP", lossless=True),
        "moving.webp": encoded(new(), "WEBP", save_all=True, append_images=[new()]),
        "moving.gif": encoded(new(), "GIF", save_all=True, append_images=[new()]),
        "lzw.tif": encoded(new(), "TIFF", compression="tiff_lzw"),
        "pages.tiff": encoded(new(), "TIFF", save_all=True, append_images=[new()]),
        "cmyk.tif": encoded(new().convert("CMYK"), "TIFF"),
        "float.tif": encoded(Image.fromarray(np.asarray(new().convert("F")) / 255), "TIFF"),
        "int32.tif": encoded(new().convert("I"), "TIFF"),
        "plain.bmp": encoded(new(), "BMP"),
        "Grüße 写真 🌄.png": encoded(new(), "PNG"),
        "many.dots.in.name.png": encoded(new(), "PNG"),
    }
    if features.check("avif"):
        good["new.avif"] = encoded(new(), "AVIF")
    return good


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Return files that must fail, by name, with how their reason begins."""
    jpeg, png = encoded(photo(1, (640, 480)), "JPEG"), encoded(photo(2, (640, 480)), "PNG")
    broken = bytearray(png)
    broken[len(png) // 2] ^= 255
    text = PngImagePlugin.PngInfo()
    text.add_text("x", "y" * (80 << 20), zip=True)  # unpacks to far more than the file has
    return {
        "empty.jpg": (b"", "empty file"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut in its header.jpg": (jpeg[:30], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "flipped.png": (bytes(broken), "damaged"),
        "cut.webp": (encoded(photo(3), "WEBP")[:200], "damaged"),
        "cut.gif": (encoded(photo(4), "GIF")[:900], "truncated"),
        "cut.tif": (encoded(photo(5), "TIFF")[:2000], "truncated"),
        "text.jpg": (b"this is no picture", "not a picture"),
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not a picture: found HTML"),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture: found XML"),
        "paper.jpg": (b"%PDF-1.7 ...", "not a picture: found PDF"),
        "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture"),
        "zeros.jpg": (bytes(5000), "not a picture: found only zeros"),
        "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(99), "not a picture: found HEIC"),
        "bomb.png": (png_header(60_000, 60_000), "too many pixels: 60,000 x 60,000"),
        "text bomb.png": (encoded(photo(6), "PNG", pnginfo=text), "damaged"),
        "no pixels.png": (png_header(64, 64), "truncated"),
    }


def write_odd_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Write all; also links to nothing and to itself, a name that is not UTF-8, a folder.

    Returns the names of good files, and how the reason of each bad one begins.
    """
    folder.mkdir(parents=True)
    good, bad = good_files(), bad_files()
    for name, data in good.items():
        (folder / name).write_bytes(data)
    for name, (data, _) in bad.items():
        (folder / name).write_bytes(data)
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "folder.jpg").mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/latin \xe9.jpg")).write_bytes(good["plain.jpg"])
    reasons = {name: reason for name, (_, reason) in bad.items()}
    reasons["latin \\udce9.jpg"] = "not UTF-8"
    return list(good), {**reasons, "gone.jpg": "missing", "circle.jpg": "missing"}
