"""Pictures by key and path: the right one for each, and nothing outside the folder."""

from __future__ import annotations

import base64
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from snipdedup.errors import SnipError
from snipdedup.inspection import thumbnails


def picture(shade, size=(300, 200), kind="PNG", mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, tuple([shade] * len(mode))).save(file, kind)
    return file.getvalue()


def opened(url):
    head, _, data = url.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def shade(url):
    return int(np.asarray(opened(url).convert("L")).mean().round())


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_a_thumbnail_is_small_and_keeps_its_shape():
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        found = opened(thumbnails.thumbnail(picture(90, (600, 300), kind)))
        assert found.size == (168, 84)
        assert abs(np.asarray(found).astype(int) - 90).max() <= 3
    assert opened(thumbnails.thumbnail(picture(1, (20, 10)))).size == (20, 10)  # not enlarged
    assert opened(thumbnails.thumbnail(picture(1, (3000, 1)))).size == (168, 1)


def test_what_is_transparent_is_white_as_a_model_sees_it():
    url = thumbnails.thumbnail(picture(0, mode="RGBA"))
    assert abs(np.asarray(opened(url)).astype(int) - 255).max() <= 2


def test_a_turned_photo_is_turned_back():
    file = io.BytesIO()
    whole = Image.new("RGB", (100, 50), (0, 0, 0))
    exif = whole.getexif()
    exif[0x0112] = 6  # orientation: a quarter turn
    whole.save(file, "JPEG", exif=exif)
    assert opened(thumbnails.thumbnail(file.getvalue())).size == (50, 100)


@pytest.mark.parametrize(
    "data",
    [b"", b"not a picture", picture(9)[:200], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
)
def test_what_is_no_picture_is_none(data):
    assert thumbnails.thumbnail(data) is None


def test_too_many_pixels_are_not_unpacked(monkeypatch):
    monkeypatch.setattr(thumbnails, "MOST_PIXELS", 300 * 200 - 1)
    assert thumbnails.thumbnail(picture(9)) is None


# ---- a folder


def test_a_folder_is_read_flat_by_shard_and_deep(tmp_path):
    places = {
        "a": "a.png",
        "000120003": "00012/000120003.JPG",  # as img2dataset lays them out
        "deep": "x/y/deep.jpeg",
        "dotted.name": "dotted.name.webp",
    }
    for number, (key, place) in enumerate(places.items()):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(50 * number))
        path.with_suffix(".txt").write_text(key)
    (tmp_path / "broken.png").write_bytes(b"oh")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twice.png").write_bytes(picture(0))
    found = thumbnails.by_key(str(tmp_path), [*places, "none", "broken", "twice"])
    assert {key: round(shade(url) / 50) for key, url in found.pictures.items()} == {
        key: number for number, key in enumerate(places)
    }
    assert found.unreadable == ["broken"]
    assert found.ambiguous == ["twice"]


def test_a_key_never_leads_out_of_its_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(0))
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "ok.png").write_bytes(picture(0))
    keys = ["../secret", str(tmp_path / "secret"), "sub/ok", "..\\secret", "", ".", "..", "a\0b"]
    assert thumbnails.by_key(str(tmp_path / "in"), keys).pictures == {}
    assert thumbnails.by_key(str(tmp_path / "in"), ["ok"]).pictures.keys() == {"ok"}


def test_no_such_folder(tmp_path):
    with pytest.raises(SnipError, match="no such folder of pictures, and no tar"):
        thumbnails.by_key(str(tmp_path / "none"), ["a"])


# ---- tars


def test_tars_are_read_by_key(tmp_path):
    write_tar(
        tmp_path / "00000.tar",
        [
            ("000000001.json", b"{}"), ("000000001.jpg", picture(50)),
            ("sub/000000002.seg.png", picture(100)), ("other.png", picture(7)),
        ],
    )  # fmt: skip
    write_tar(tmp_path / "00001.tar", [("000010001.png", picture(150)), ("bad.png", b"x")])
    keys = ["000000001", "000000002", "000010001", "bad", "none"]
    for spec in (tmp_path, f"{tmp_path}/0000*.tar"):
        found = thumbnails.by_key(str(spec), keys)
        assert {key: round(shade(url) / 50) for key, url in found.pictures.items()} == {
            "000000001": 1, "000000002": 2, "000010001": 3,
        }  # fmt: skip
        assert found.unreadable == ["bad"]
    one = thumbnails.by_key(str(tmp_path / "00001.tar"), keys)
    assert one.pictures.keys() == {"000010001"}


def test_likely_tars_come_first_and_the_rest_is_not_read(tmp_path, monkeypatch):
    for number in range(4):
        write_tar(tmp_path / f"{number:05d}.tar", [(f"{number:05d}0001.png", picture(0))])
    opened_tars, real = [], tarfile.open
    monkeypatch.setattr(
        thumbnails.tarfile, "open", lambda path, mode: opened_tars.append(path.name) or real(path)
    )
    thumbnails.by_key(str(tmp_path), ["000020001", "000030001"])
    assert opened_tars == ["00002.tar", "00003.tar"]


def test_links_in_a_tar_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        entry = tarfile.TarInfo("k.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    found = thumbnails.by_key(str(tmp_path), ["k"])
    assert (found.pictures, found.unreadable) == ({}, [])


def test_a_broken_tar_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(SnipError, match=r"a\.tar: truncated or not a tar"):
        thumbnails.by_key(str(tmp_path), ["k"])


# ---- paths


def test_paths_of_a_column(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out.png").write_bytes(picture(50))
    (tmp_path / "in" / "a.png").write_bytes(picture(100))
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "in" / "notes.txt").write_bytes(picture(100))
    names = [str(tmp_path / "out.png"), "a.png", "../out.png", "link.png", "notes.txt", "none.png"]
    inside = thumbnails.by_path(names, str(tmp_path / "in"))
    assert {name: round(shade(url) / 50) for name, url in inside.pictures.items()} == {"a.png": 2}
    anywhere = thumbnails.by_path([str(tmp_path / "out.png"), "a\0.png"], None)
    assert list(anywhere.pictures) == [str(tmp_path / "out.png")]
