"""Decoding against pictures whose pixels are known: orientations, modes, times, drafts."""

from __future__ import annotations

import io

import numpy as np
import pytest
from odd_files import encoded, photo, png_header, with_exif
from PIL import Image, ImageOps

from snipdedup.pictures.decode import Unreadable, decode, to_bytes

SIDE = 10_000  # more than any picture here has: no JPEG is drafted


def corners(picture):
    """The quarters of a picture in which red, green and blue are the brightest."""
    pixels = np.asarray(picture).astype(int)
    h, w = pixels.shape[:2]
    quarter = {
        "top left": pixels[: h // 2, : w // 2], "top right": pixels[: h // 2, w // 2 :],
        "bottom left": pixels[h // 2 :, : w // 2], "bottom right": pixels[h // 2 :, w // 2 :],
    }  # fmt: skip
    return tuple(max(quarter, key=lambda name: quarter[name][..., c].mean()) for c in range(3))


@pytest.fixture
def upright():
    """Red at the top left, green at the top right, blue at the bottom left; 60 wide, 40 high."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30, 0] = pixels[:20, 30:, 1] = pixels[20:, :30, 2] = 255
    return Image.fromarray(pixels)


# What a camera stores for each orientation, as EXIF 2.3 says: where row 0 and column 0 lie.
STORED = {
    1: lambda p: p,
    2: ImageOps.mirror,
    3: lambda p: p.rotate(180),
    4: ImageOps.flip,
    5: lambda p: ImageOps.mirror(p.rotate(-90, expand=True)),
    6: lambda p: p.rotate(90, expand=True),
    7: lambda p: ImageOps.mirror(p.rotate(90, expand=True)),
    8: lambda p: p.rotate(-90, expand=True),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_turned_upright(upright, orientation, kind):
    data = encoded(STORED[orientation](upright), kind, exif=with_exif(orientation=orientation))
    found = decode(data, SIDE)
    assert corners(found.picture) == ("top left", "top right", "bottom left")
    assert (found.width, found.height) == found.picture.size == (60, 40)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_orientations_that_do_not_exist_turn_nothing(upright, orientation):
    found = decode(encoded(upright, "JPEG", exif=with_exif(orientation=orientation)), SIDE)
    assert corners(found.picture) == ("top left", "top right", "bottom left")


def test_a_large_jpeg_is_drafted_but_keeps_its_size():
    data = encoded(photo(1, (1600, 1200)), "JPEG", exif=with_exif(orientation=6))
    found = decode(data, 128)
    assert (found.width, found.height) == (1200, 1600)
    assert found.picture.size == (150, 200)  # an eighth; a quarter would not be needed
    assert decode(data, 151).picture.size == (300, 400)
    whole = decode(data, SIDE).picture
    assert whole.size == (1200, 1600)
    small = np.asarray(whole.resize((150, 200), Image.Resampling.BOX)).astype(int)
    assert np.abs(small - np.asarray(found.picture)).mean() < 2


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("CMYK", "TIFF"),
     ("L", "JPEG"), ("YCbCr", "TIFF"), ("RGB", "BMP")],
)  # fmt: skip
def test_modes_become_what_pillow_makes_of_them(mode, kind):
    data = encoded(photo(2).convert(mode), kind)
    try:
        plain = Image.open(io.BytesIO(data)).convert("RGB")
    except OSError:
        pytest.skip("this Pillow cannot read what it wrote")
    np.testing.assert_array_equal(np.asarray(decode(data, SIDE).picture), np.asarray(plain))


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA")])
def test_what_is_transparent_is_white(kind, mode):
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0] = [(200, 200, 200, 255), (0, 0, 0, 0), (100, 100, 100, 51)]
    data = encoded(Image.fromarray(pixels).convert(mode), kind, lossless=True)
    row = np.asarray(decode(data, SIDE).picture)[0].astype(int)
    assert row[0].tolist() == [200] * 3
    assert row[1].tolist() == [255] * 3
    assert np.abs(row[2] - (0.2 * 100 + 0.8 * 255)).max() <= 1


def test_a_transparent_colour_of_a_palette_is_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1])
    found = decode(encoded(picture, "PNG", transparency=1), SIDE).picture
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_sixteen_bits_are_scaled_not_cut():
    values = np.array([[0, 256, 257 * 100, 65535]], "<u2")
    for kind in ("PNG", "TIFF"):
        found = np.asarray(decode(encoded(Image.fromarray(values), kind), SIDE).picture)
        assert found[0, :, 0].tolist() == [0, 1, 100, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32([0, 0.5, 1]), [0, 128, 255]),
        (np.float32([-1, 0, 1, np.nan]), [0, 128, 255, 128]),
        (np.float32([0, 100, 200]), [0, 128, 255]),
        (np.int32([0, 65535]), [0, 255]),
        (np.int32([0, 100_000]), [0, 255]),
        (np.float32([7, 7]), [0, 0]),
    ],
)
def test_grey_values_of_any_type(values, expected):
    assert to_bytes(values[None])[0].tolist() == expected


@pytest.mark.parametrize(
    ("tags", "time", "camera"),
    [
        ({}, None, None),
        ({"taken": "2021:03:04 05:06:07"}, "2021-03-04T05:06:07", None),
        ({"taken": "2021:03:04 05:06:07", "offset": "+02:00", "time": "2022:01:01 00:00:00"},
         "2021-03-04T05:06:07+02:00", None),
        ({"time": "2022:01:01 00:00:00", "make": "Canon", "model": "Canon EOS 5D"},
         "2022-01-01T00:00:00", "Canon EOS 5D"),
        ({"taken": "0000:00:00 00:00:00", "make": "NIKON CORPORATION\0", "model": "D70 "},
         None, "NIKON CORPORATION D70"),
        ({"taken": "2021:02:30 05:06:07"}, None, None),
    ],
)  # fmt: skip
def test_time_and_camera(tags, time, camera):
    found = decode(encoded(photo(), "JPEG", exif=with_exif(**tags)), SIDE)
    assert (found.exif_time, found.camera) == (time, camera)


def test_the_bound_on_pixels_is_exact():
    data = encoded(photo(0, (50, 40)), "PNG")
    assert decode(data, SIDE, 2000).picture.size == (50, 40)
    with pytest.raises(Unreadable, match="too many pixels: 50 x 40, at most 1,999"):
        decode(data, SIDE, 1999)
    with pytest.raises(Unreadable, match="too many pixels"):
        decode(png_header(30_000, 30_000), SIDE, 2**40)  # Pillow's own bound, in this process


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_change_of_a_byte_ends_in_another_error():
    """Each of many damaged files is a picture or an `Unreadable`."""
    rng, outcomes = np.random.default_rng(0), set()
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(photo(3, (40, 30)), kind)
        for _ in range(60):
            changed = bytearray(data[: rng.integers(1, len(data) + 1)])
            for at in rng.integers(0, len(changed), 3):
                changed[at] = rng.integers(256)
            try:
                decode(bytes(changed), SIDE, 10**6)
                outcomes.add("picture")
            except Unreadable as error:
                outcomes.add(str(error).partition(":")[0])
    assert {"picture", "truncated", "damaged", "not a picture"} <= outcomes
