"""A folder of odd files: all good ones are embedded, all bad ones say why, nothing stops."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from odd_files import write_odd_files
from PIL import Image, ImageOps

from snipdedup.pictures.models import open_model
from snipdedup.storage.out_folder import read_manifest


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
