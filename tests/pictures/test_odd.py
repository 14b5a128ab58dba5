"""Odd files and odd tars: all that is good is embedded, all that is bad says why, nothing stops."""

from __future__ import annotations

import io
import json
import re
import tarfile
import time
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from odd_files import encoded, photo, write_odd_files
from PIL import Image, ImageOps

import snipdedup
from snipdedup.pictures import containers
from snipdedup.pictures.containers import TarShard
from snipdedup.pictures.models import open_model
from snipdedup.storage.out_folder import read_manifest

JPEG = [encoded(photo(number), "JPEG") for number in range(4)]


@pytest.fixture(scope="module")
def odd(tmp_path_factory, snip):
    """The folder, the names of good files, the reasons of bad ones, and OUT."""
    place = tmp_path_factory.mktemp("odd")
    good, bad = write_odd_files(place / "odd")
    (place / "odd" / "notes.md").write_text("no picture")
    (place / "odd" / ".hidden.jpg").write_text("no picture")
    said = snip("embed", "odd", "--out", "out", "--threads", 2, cwd=place)
    return place, good, bad, said.stdout


def test_there_are_forty_kinds(odd):
    assert len(odd[1]) + len(odd[2]) >= 40


def test_good_files_have_rows_and_bad_ones_reasons(odd):
    place, good, bad, _ = odd
    rows = pq.read_table(place / "out/metadata/metadata_0000.parquet").to_pylist()
    assert sorted(row["path"] for row in rows) == sorted(str(place / "odd" / n) for n in good)
    failed = pq.read_table(place / "out/failed.parquet").to_pylist()
    assert sorted(row["source"] for row in failed) == sorted(str(place / "odd" / n) for n in bad)
    for row in failed:
        expected = bad[row["source"].rpartition("/")[2]]
        assert row["reason"].startswith(expected), row
    assert len(np.load(place / "out/img_emb/img_emb_0000.npy")) == len(rows)


def test_features_are_those_of_pillows_plain_conversion(odd):
    """By a loop that knows nothing of the command; rows in a mode that RGB cannot hold apart."""
    place, _, _, _ = odd
    rows = pq.read_table(place / "out/metadata/metadata_0000.parquet").to_pylist()
    features = np.load(place / "out/img_emb/img_emb_0000.npy").astype(np.float32)
    model = open_model("phash", device="cpu", threads=1)
    seen = 0
    for row, feature in zip(rows, features, strict=True):
        with Image.open(row["path"]) as opened:
            opened.load()
            whole = ImageOps.exif_transpose(opened)
        if whole.mode[0] in "IF" or whole.has_transparency_data:
            continue  # tests of `decode` have these
        plain = model.encode(model.prepare(whole.convert("RGB"))[None])[0]
        assert plain @ feature / np.linalg.norm(feature) / np.linalg.norm(plain) > 0.9, row["key"]
        assert (row["width"], row["height"]) == whole.size, row["key"]
        seen += 1
    assert seen > 20


def test_keys_are_names_without_suffix_where_that_is_enough(odd):
    rows = pq.read_table(odd[0] / "out/metadata/metadata_0000.parquet").to_pylist()
    keys = {row["path"].rpartition("/")[2]: row["key"] for row in rows}
    assert keys["plain.jpg"] == "plain.jpg"  # there is plain.bmp, too
    assert keys["turned.jpg"] == "turned"
    assert keys["many.dots.in.name.png"] == "many.dots.in.name"
    assert len(set(keys.values())) == len(keys)


def test_the_summary_counts_what_failed_and_what_was_left_out(odd):
    place, good, bad, said = odd
    assert f"{len(good)} of {len(good) + len(bad)} pictures embedded by phash" in said
    assert "7 not a picture" in said
    assert "left out, as no pictures by their names: 1 .md" in said
    assert "next: snip dedup out --out clean" in said
    manifest = read_manifest(place / "out", "embed")
    assert sum(manifest["failed"].values()) == len(bad) == manifest["counts"]["failed"]
    assert manifest["shards"][0]["rows"] == len(good)


# ---- odd tars


def tar_of(path, members, **more):
    """Write a tar of (name, bytes), or of whole `TarInfo`s; return its bytes."""
    with tarfile.open(path, "w", **more) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path.read_bytes()


def link(name, target, kind=tarfile.LNKTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read_tar(path):
    """The keys of good items, the reasons of others, what was left out."""
    left_out = Counter()
    items = list(TarShard(path).items(left_out))
    good = [item.key for item in items if not item.refused]
    return good, [item.refused for item in items if item.refused], dict(left_out)


def header_at(tar, name):
    return tar.index(f"{name}\0".encode())


def with_checksum(header):
    """A tar's header of 512 bytes with its checksum made right."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


def damaged_tars(whole):
    """(bytes, keys that are read, the reason) of damaged copies of a tar of a, b, c and d."""
    third, fourth = header_at(whole, "c.jpg"), header_at(whole, "d.jpg")
    flipped = bytearray(whole)
    flipped[fourth + 3] ^= 4
    end = fourth + 512 + -(-len(JPEG[3]) // 512) * 512
    back = bytearray(whole)
    back[third + 124 : third + 136] = b"\xff" * 10 + b"\xfe\0"  # the size: -512
    back[third : third + 512] = with_checksum(back[third : third + 512])
    name = bytearray(back)
    name[third + 156] = ord("L")  # a name of -512 letters
    name[third : third + 512] = with_checksum(name[third : third + 512])
    yield whole, "abcd", None
    yield whole[: end + 512], "abcd", None
    yield bytes(flipped), "abc", rf"damaged: the tar has a bad header at byte {fourth:,}"
    yield whole[: fourth + 99], "abc", "truncated: the tar ends too early, within a header"
    yield whole[:fourth], "abc", "truncated: the tar ends too early, without an end mark"
    yield whole[:end], "abcd", "truncated: the tar ends too early, without an end mark"
    yield whole + whole, "abcd", "damaged: the tar goes on after its end mark"
    yield bytes(back), "ab", f"truncated: .* the header at byte {third:,} leads back"
    yield bytes(name), "ab", "damaged: a header of the tar: "


def test_a_damaged_tar_is_no_shorter_one(tmp_path):
    whole = tar_of(tmp_path / "a.tar", [(f"{name}.jpg", JPEG[n]) for n, name in enumerate("abcd")])
    for data, good, reason in damaged_tars(whole):
        (tmp_path / "b.tar").write_bytes(data)
        found, refused, _ = read_tar(tmp_path / "b.tar")
        assert "".join(found) == good, reason
        assert len(refused) == (reason is not None), reason
        assert not reason or re.match(reason, refused[0]), refused


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_no_change_of_a_tars_headers_ends_in_an_error(tmp_path, kind):
    names = ["a.jpg", f"{'long/' * 40}b.jpg", "c.jpg"]
    whole = tar_of(tmp_path / "a.tar", [(name, JPEG[0]) for name in names], format=kind)
    found = whole.split(b"ustar")
    headers = np.cumsum([len(part) + 5 for part in found[:-1]]) - 5 - 257
    rng, path = np.random.default_rng(0), tmp_path / "b.tar"
    for _ in range(300):
        changed, at = bytearray(whole), int(rng.choice(headers))
        for place in at + rng.integers(100, 160, 3):
            changed[place] = rng.choice([0, 255, 128, 48, 49, 55, 120, 83, 76, 75, 32])
        if rng.random() < 0.5:  # in the records of an extended header, too
            changed[at + 512 + rng.integers(30)] = rng.integers(256)
        changed[at : at + 512] = with_checksum(changed[at : at + 512])
        path.write_bytes(changed)
        good, refused, left_out = read_tar(path)
        assert len(good) + len(refused) + sum(left_out.values()) >= 1


def test_links_and_other_files_in_tars(tmp_path):
    tar_of(tmp_path / "a.tar", [
        ("a.jpg", JPEG[0]), ("a.txt", b"one"), link("b.jpg", "a.jpg"), link("b.txt", "a.txt"),
        link("c.jpg", "z.jpg"), link("d.jpg", "a.jpg", tarfile.SYMTYPE),
        link("d.txt", "a.txt", tarfile.SYMTYPE), link("e.jpg", "", tarfile.FIFOTYPE),
        link("y", "", tarfile.DIRTYPE), ("f.md", b""), ("g.md", b""), ("h", b""),
        ("z.jpg", JPEG[1]),
    ])  # fmt: skip
    result = snipdedup.embed(tmp_path / "a.tar", out=tmp_path / "out", threads=1)
    rows = pq.read_table(tmp_path / "out/metadata/metadata_0000.parquet").to_pylist()
    failed = pq.read_table(tmp_path / "out/failed.parquet").to_pylist()
    assert [(row["key"], row["member"], row["caption"]) for row in rows] == [
        ("a", "a.jpg", "one"), ("b", "b.jpg", "one"), ("z", "z.jpg", None)
    ]  # fmt: skip
    assert rows[0]["sha256"] == rows[1]["sha256"] != rows[2]["sha256"]
    assert [(row["key"], row["reason"]) for row in failed] == [
        ("c", "a link in a tar: to z.jpg, which does not lie before it"),
        ("d", "a link in a tar: a symbolic one, to a.jpg"),
    ]
    said = "left out, as no pictures by their names: 2 .md, 1 no suffix, 1 .jpg, 1 .txt"
    assert said in str(result)


def test_pictures_of_one_key_have_their_own_captions(tmp_path):
    described = [json.dumps({"url": f"u{n}", "caption": "no"}).encode() for n in range(2)]
    tar_of(tmp_path / "a.tar", [
        ("img.0.jpg", JPEG[0]), ("img.0.txt", b"zero"), ("img.0.json", described[0]),
        ("img.1.jpg", JPEG[1]), ("img.1.txt", b"one"), ("img.2.jpg", JPEG[2]),
        ("img.json", described[1]),
    ])  # fmt: skip
    items = TarShard(tmp_path / "a.tar").items(Counter())
    assert [(item.key, *item.text) for item in items] == [
        ("img.0", "zero", "u0"), ("img.1", "one", "u1"), ("img.2", "no", "u1")
    ]  # fmt: skip


def test_a_long_group_is_read_fast_and_held_in_bounds(tmp_path, monkeypatch):
    names = [f"img.{number}" for number in range(30_000)]
    members = [(f"{n}{kind}", n.encode()) for n in names for kind in (".jpg", ".txt")]
    tar_of(tmp_path / "a.tar", members)
    monkeypatch.setattr(containers, "GROUP_BYTES", 1000)
    started = time.process_time()
    items = list(TarShard(tmp_path / "a.tar").items(Counter()))
    assert time.process_time() - started < 20  # 30,000 squared take minutes
    assert [(item.key, item.text.caption) for item in items] == [(name, name) for name in names]
