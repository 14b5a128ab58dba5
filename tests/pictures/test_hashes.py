"""Hashes: equal to other libraries' formulas, near for copies, far for others, also plain ones."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import scipy.fft
from odd_files import photo
from PIL import Image, ImageFilter

from snipdedup.errors import UsageError
from snipdedup.pictures.hashes import pdq_bits, phash_bits
from snipdedup.pictures.models import open_model

SIZES = ((300, 200), (64, 64), (511, 33), (40, 512), (500, 512), (7, 90), (3, 3), (129, 128))
KNOWN_PHASH = {
    0: "e709ce4695a126080cefd064fe45cd77b0ea999c1b329ed6e255eb793ec0a443",
    1: "cc65e6e067e8d31145332785cda1c8fed5ec3eae90343653a4d628e7ba21e30b",
}
KNOWN_PDQ = {
    0: "b116651781fe5f6b153334fca66d9dcc2b867759513f1385fa98283242d43139",
    1: "aa64e843422ef7cab592e5361644b89e9bd5bf89c2d954f2e651c4650bd303b3",
}


def unpacked(bits):
    assert bits.dtype == np.uint8
    assert bits.shape == (32,)
    return np.unpackbits(bits).astype(bool)


def distance(one, other):
    return int((unpacked(one) != unpacked(other)).sum())


def imagehash_phash(picture):
    """As ``imagehash.phash(picture, hash_size=16)`` computes it, with scipy's transform."""
    grey = picture.convert("L").resize((64, 64), Image.Resampling.LANCZOS)
    values = scipy.fft.dctn(np.asarray(grey, float), type=2)[:16, :16]
    return (values > np.median(values)).ravel()


@pytest.mark.parametrize("size", SIZES)
def test_phash_has_the_bits_of_imagehash(size):
    for seed in range(5):
        picture = photo(seed, size)
        assert (unpacked(phash_bits(picture)) == imagehash_phash(picture)).all()


def test_phash_of_known_pictures():
    # what ImageHash 4.3.2 says of these two, with Pillow 13.0.0
    found = {seed: phash_bits(photo(seed, (300, 200))).tobytes().hex() for seed in (0, 1)}
    assert found == KNOWN_PHASH


def box(values, window):
    """Mean over a window along the first axis, cut off at the ends."""
    ahead = window // 2 + 1
    spans = [(max(0, i + ahead - window), min(len(values), i + ahead)) for i in range(len(values))]
    return np.array([values[low:high].mean(axis=0) for low, high in spans])


def slow_pdq(picture):
    """PDQ in floats, step by step: two means each way, the middle of each 64th, part of a DCT."""
    grey = np.asarray(picture.convert("L"), float)
    for _ in range(2):
        grey = box(grey, -(-grey.shape[0] // 128))
        grey = box(grey.T, -(-grey.shape[1] // 128)).T
    places = [((np.arange(64) + 0.5) * side / 64).astype(int) for side in grey.shape]
    values = scipy.fft.dctn(grey[np.ix_(*places)], type=2, norm="ortho")[1:17, 1:17]
    return (values > np.median(values)).ravel()


@pytest.mark.parametrize("size", SIZES)
def test_pdq_follows_its_description(size):
    for seed in range(5):
        picture = photo(seed, size)
        # a frequency beside the median may change places with another
        assert (unpacked(pdq_bits(picture)) != slow_pdq(picture)).sum() <= 2


def test_pdq_of_known_pictures():
    # what pdqhash 0.2.8, which wraps the authors' program, says; last word first, as it prints
    for seed, known in KNOWN_PDQ.items():
        theirs = np.unpackbits(np.frombuffer(bytes.fromhex(known), np.uint8))[::-1].astype(bool)
        assert (unpacked(pdq_bits(photo(seed, (300, 200)))) != theirs).sum() <= 2


@pytest.mark.parametrize("bits", [phash_bits, pdq_bits])
def test_copies_are_near_and_others_far(bits):
    pictures = [photo(seed, (320, 240)) for seed in range(12)]
    first = [bits(picture) for picture in pictures]
    edits = {
        "half": lambda p: p.resize((160, 120)),
        "twice": lambda p: p.resize((640, 480)),
        "grey": lambda p: p.convert("L").convert("RGB"),
        "blur": lambda p: p.filter(ImageFilter.GaussianBlur(1)),
        "darker": lambda p: p.point(lambda value: value * 3 // 4),
    }
    for edit in edits.values():
        again = [bits(edit(picture)) for picture in pictures]
        table = np.array([[distance(one, other) for other in again] for one in first])
        assert table.diagonal().max() <= 31
        assert table[~np.eye(12, dtype=bool)].min() > 80
    turned = [bits(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) for picture in pictures]
    assert min(map(distance, first, turned)) > 80  # a mirrored picture is another one


def plain_pictures():
    """Single colours, gradients, stripes, steps, both ways, and sums of such; each another one."""
    rng = np.random.default_rng(5)
    for number in range(60):
        at = np.arange(240)
        profile = [
            np.full(240, number), np.linspace(0, 60 + 3 * number, 240),
            128 + 90 * np.sin(at / (5 + number)), np.repeat(rng.integers(0, 256, 8), 30),
        ][number % 4]  # fmt: skip
        grey = np.repeat(profile[:, None], 200, axis=1)
        if number % 8 == 7:
            grey = grey / 2 + np.repeat(rng.integers(0, 120, 8), 25)
        grey = grey.T if number % 3 else grey
        colour = np.stack([grey, np.full_like(grey, 4 * number % 256), grey], -1)
        yield Image.fromarray(colour.astype(np.uint8))


@pytest.mark.parametrize("bits", [phash_bits, pdq_bits])
def test_plain_pictures_match_what_looks_alike_only(bits):
    pictures = list(plain_pictures())
    found = [bits(picture) for picture in pictures]
    table = np.array([[distance(one, other) for other in found] for one in found])
    assert table[~np.eye(len(found), dtype=bool)].min() > 80
    assert bits(pictures[0].copy()).tobytes() == found[0].tobytes()
    shrunk = pictures[3].resize((64, 64), Image.Resampling.BOX)
    assert found[3].tobytes() == hashlib.sha256(shrunk.tobytes()).digest()
    white = [bits(Image.new("RGB", size, "white")) for size in ((10, 10), (700, 300), (1, 1))]
    assert len({each.tobytes() for each in white}) == 1


def drawn_shapes():
    """Shapes that equal their mirror image, on one colour; no two of them alike."""
    at = np.abs(np.arange(128) - 63.5)
    x, y = at[None, :], at[:, None]
    sizes = (18, 26, 34, 42, 50)
    insides = [
        *(x**2 + y**2 < r**2 for r in sizes), *(np.maximum(x, y) < r for r in sizes),
        *(x + y < r for r in sizes),
        *((np.minimum(x, y) < 9) & (np.maximum(x, y) < r) for r in sizes),
        *((x**2 + y**2 < r**2) & (x**2 + y**2 > r**2 / 2) for r in sizes),
    ]  # fmt: skip
    for inside in insides:
        grey = np.uint8(np.where(inside, 60, 230))
        yield Image.fromarray(np.stack([grey, grey, grey], -1))


@pytest.mark.parametrize("bits", [phash_bits, pdq_bits])
def test_drawn_shapes_are_no_copies_of_each_other(bits):
    found = [bits(picture) for picture in drawn_shapes()]
    table = np.array([[distance(one, other) for other in found] for one in found])
    assert table[~np.eye(len(found), dtype=bool)].min() > 31


@pytest.mark.parametrize("name", ["phash", "pdq"])
def test_cosine_tells_the_distance(name):
    model = open_model(name)
    prepared = np.stack([model.prepare(photo(seed)) for seed in range(9)])
    rows = model.encode(prepared)
    assert (rows.dtype, rows.shape) == (np.float32, (9, model.dim))
    assert (rows.astype(np.float16) == rows).all()
    apart = [[distance(one, other) for other in prepared] for one in prepared]
    assert (rows @ rows.T == 1 - 2 * np.array(apart) / 256).all()
    assert (model.encode(prepared[4:6]) == rows[4:6]).all()
    assert model.threshold == 1 - 2 * model.described["distance"] / 256
    assert model.encode_texts(["a cat"]) is None


def test_hashes_take_no_preprocessing():
    with pytest.raises(UsageError, match="--preprocess is for learned models; pdq needs none"):
        open_model("pdq", preprocess="size=224")
