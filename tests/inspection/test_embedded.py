"""Pictures that the report finds by itself, second numbers, and what it says beside a picture."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup.features.origin import origin_of
from snipdedup.inspection import embedded
from snipdedup.metadata.gather import RowTexts
from snipdedup.metadata.tables import open_metadata

Image = pytest.importorskip("PIL.Image")
COUNT = 6  # pictures, each with a smaller copy
TIME = "2021:03:04 05:06:07"


def draw(number, size):
    """A picture file of blurred noise, with EXIF data where its number is even."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))
    exif, file = Image.Exif(), io.BytesIO()
    if number % 2 == 0:
        exif[0x0132] = TIME
    small.resize((size, size * 3 // 4), Image.Resampling.BICUBIC).save(file, "JPEG", exif=exif)
    return file.getvalue()


PICTURES = {
    f"{n}{kind}": draw(n, side) for n in range(COUNT) for kind, side in (("a", 320), ("b", 200))
}


def lay_out(folder, how):
    """Write the pictures as files, members of tars or rows of parquet files; return IMAGES."""
    images = folder / "photos"
    images.mkdir()
    names = sorted(PICTURES)
    for part, some in enumerate((names[:7], names[7:])):
        if how == "tar":
            with tarfile.open(images / f"{part:05d}.tar", "w") as tar:
                for name in some:
                    info = tarfile.TarInfo(f"{name}.jpg")
                    info.size = len(PICTURES[name])
                    tar.addfile(info, io.BytesIO(PICTURES[name]))
        elif how == "parquet":
            column = [{"bytes": PICTURES[name], "path": f"{name}.jpg"} for name in some]
            table = pa.table({"key": some, "image": column})
            pq.write_table(table, images / f"p{part}.parquet", row_group_size=3)
        else:
            (images / str(part)).mkdir()
            for name in some:
                (images / str(part) / f"{name}.jpg").write_bytes(PICTURES[name])
    if how == "list":
        files = sorted(images.rglob("*.jpg"))
        (folder / "list.txt").write_text("\n".join(map(str, files)))
        return folder / "list.txt"
    return images / "*" / "*.jpg" if how == "glob" else images


def rows_of(page):
    """What the page holds of each row, by its number."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    body = json.loads(data)
    rows = [dict(zip(body["fields"], row, strict=False)) for row in body["rows"]]
    return {row["row"]: row for row in rows}


def shown(page):
    """The thumbnails of the page, by row."""
    prefix = "data:image/jpeg;base64,"
    return {
        number: Image.open(io.BytesIO(base64.b64decode(row["picture"].removeprefix(prefix))))
        for number, row in rows_of(page).items()
        if row.get("picture")
    }


def colour(picture):
    return np.asarray(picture.convert("RGB").resize((6, 6)), np.float32)


@pytest.mark.parametrize("how", ["folder", "glob", "list", "tar", "parquet"])
def test_a_report_finds_pictures_by_itself(tmp_path, how, monkeypatch):
    photos, out = tmp_path / "set", tmp_path / "out"
    images = lay_out(tmp_path, how)
    monkeypatch.chdir(tmp_path)  # what is typed is relative, and the report is made elsewhere
    assert truth.snip("embed", images.relative_to(tmp_path), "--out", "set", "--threads", 1)[0] == 0
    monkeypatch.chdir("/")
    status, said, complaint = truth.snip("dedup", photos, "--out", out, "--also", f"{photos}:.7")
    assert status == 0, complaint
    assert "usual for phash" in said
    removed = np.load(out / "is_dup.npy")
    assert removed.sum() == COUNT
    status, said, _ = truth.snip("report", out)
    assert status == 0
    assert f"pictures of {2 * COUNT} of the {2 * COUNT} rows shown" in said
    page = (out / "report.html").read_text("utf-8")
    table = pq.read_table(photos / "metadata")
    pictures = shown(page)
    assert sorted(pictures) == list(range(2 * COUNT))
    for row, name in enumerate(key.rpartition("/")[2] for key in table["key"].to_pylist()):
        original = colour(Image.open(io.BytesIO(PICTURES[name])))
        assert np.abs(original - colour(pictures[row])).mean() < 12
        size = f"320 × 240 · {len(PICTURES[name]) / 1000:.1f} kB"
        if name[1] == "b":
            size = f"200 × 150 · {len(PICTURES[name]) / 1000:.1f} kB"
        time = " · 2021-03-04 05:06:07" if int(name[0]) % 2 == 0 else ""
        assert rows_of(page)[row]["facts"] == size + time
    assert "It must match in other features, too: <bdi>set</bdi> 0.7 or more." in page
    groups = pq.read_table(out / "groups.parquet").to_pylist()
    for row in groups:
        if row["is_dup"]:
            number = f"{min(row['also_similarity_1'], 0.9999):.4f}"
            number = "1" if row["also_similarity_1"] == 1 else number
            assert rows_of(page)[row["row"]]["also"] == f"set {number}"
    assert not re.findall(r'(src|href)="(?!data:|#)', page)


@pytest.mark.parametrize("how", ["folder", "tar", "parquet"])
def test_a_picture_that_was_changed_is_not_shown(tmp_path, how, monkeypatch):
    images = lay_out(tmp_path, how)
    assert truth.snip("embed", images, "--out", tmp_path / "set", "--threads", 1)[0] == 0
    assert truth.snip("dedup", tmp_path / "set", "--out", tmp_path / "out")[0] == 0
    shutil.rmtree(images)
    monkeypatch.setitem(PICTURES, "0a", draw(77, 320))  # another picture takes its place
    lay_out(tmp_path, how)
    status, said, _ = truth.snip("report", tmp_path / "out")
    assert status == 0
    assert f"pictures of {2 * COUNT - 1} of the {2 * COUNT} rows shown" in said
    assert "  1 pictures changed since they were embedded" in said
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert sorted(shown(page)) == list(range(1, 2 * COUNT))
    assert [row["row"] for row in rows_of(page).values() if row.get("changed")] == [0]
    status, _, _ = truth.snip("why", tmp_path / "out", 0, "--html", tmp_path / "why.html")
    assert status == 0
    tiles = (tmp_path / "why.html").read_text("utf-8").split("<figure")[1:]
    assert [("changed since it was embedded" in tile, "<img" in tile) for tile in tiles] == [
        (True, False), (False, True), *[(True, False)] * (len(tiles) - 2)
    ]  # fmt: skip


def test_a_page_with_pictures_is_not_replaced_by_one_without(tmp_path):
    images = lay_out(tmp_path, "folder")
    assert truth.snip("embed", images, "--out", tmp_path / "set")[0] == 0
    assert truth.snip("dedup", tmp_path / "set", "--out", tmp_path / "out")[0] == 0
    assert truth.snip("report", tmp_path / "out")[0] == 0
    assert truth.snip("report", tmp_path / "out")[0] == 0
    shutil.move(tmp_path / "set" / "snip.json", tmp_path / "elsewhere.json")
    status, _, line = truth.snip("report", tmp_path / "out")
    assert (status, "has pictures, the new page would have none" in line) == (1, True)


def test_no_file_outside_of_the_source_is_opened(tmp_path):
    """Absolute paths, ``..`` and links that lead out are left out; so is what is no file."""
    images = lay_out(tmp_path, "folder")
    assert truth.snip("embed", images, "--out", tmp_path / "set", "--threads", 1)[0] == 0
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(PICTURES["0a"])
    shutil.copytree(images, tmp_path / "photos_too")
    (images / "link.jpg").symlink_to(secret)
    inside, real = images / "0" / "0a.jpg", f"{images}/0/../0/0a.jpg"
    (images / "good.jpg").symlink_to(inside)
    paths = [
        str(secret), str(images / "link.jpg"), f"{images}/../secret.jpg", "../secret.jpg",
        f"{tmp_path}/photos_too/0/0a.jpg", "link.jpg", str(images), "a\0b", "", "s3://bucket/a.jpg",
        str(inside), real, "0/0a.jpg", str(images / "good.jpg"),
    ]  # fmt: skip
    pq.write_table(pa.table({"path": paths}), tmp_path / "m.parquet")
    texts = RowTexts(open_metadata(tmp_path / "m.parquet"))
    found = embedded.by_place(origin_of(tmp_path / "set"), texts, np.arange(len(paths)))
    assert sorted(map(int, found.pictures)) == list(range(10, len(paths)))


def test_tars_and_tables_outside_or_changed_are_left_out(tmp_path):
    images = lay_out(tmp_path, "tar")
    assert truth.snip("embed", images, "--out", tmp_path / "set", "--threads", 1)[0] == 0
    tar, other = images / "00000.tar", shutil.copy(images / "00000.tar", tmp_path / "other.tar")
    places = [(tar, "0a.jpg"), (other, "0a.jpg"), (tar, "none.jpg"), (tar, None), (tar, "0b.jpg")]
    (images / "broken.tar").write_bytes(tar.read_bytes()[:700])
    places.append((images / "broken.tar", "0b.jpg"))
    table = pa.table({"tar": [str(t) for t, _ in places], "member": [m for _, m in places]})
    pq.write_table(table, tmp_path / "m.parquet")
    texts = RowTexts(open_metadata(tmp_path / "m.parquet"))
    found = embedded.by_place(origin_of(tmp_path / "set"), texts, np.arange(len(places)))
    assert sorted(found.pictures) == ["0", "4"]


def test_an_odd_row_number_of_a_table_hides_no_other(tmp_path):
    images = lay_out(tmp_path, "parquet")
    assert truth.snip("embed", images, "--out", tmp_path / "set", "--threads", 1)[0] == 0
    numbers = ["0", "x", "9" * 5000, "-1", "1"]
    table = pa.table({"parquet": [str(images / "p0.parquet")] * 5, "parquet_row": numbers})
    pq.write_table(table, tmp_path / "m.parquet")
    texts = RowTexts(open_metadata(tmp_path / "m.parquet"))
    found = embedded.by_place(origin_of(tmp_path / "set"), texts, np.arange(5))
    assert sorted(found.pictures) == ["0", "4"]


def test_a_sheet_names_the_pictures(tmp_path):
    images = lay_out(tmp_path, "tar")
    assert truth.snip("embed", images, "--out", tmp_path / "set", "--threads", 1)[0] == 0
    assert truth.snip("dedup", tmp_path / "set", "--out", tmp_path / "out")[0] == 0
    sheet = tmp_path / "sheet.csv"
    assert truth.snip("audit", tmp_path / "out", "--sheet", sheet)[0] == 0
    text = sheet.read_text("utf-8-sig")
    for name in PICTURES:
        assert f"{images}/0000{int(sorted(PICTURES).index(name) >= 7)}.tar: {name}.jpg" in text


def test_names_and_facts_are_strangers_texts(tmp_path):
    """Names of second features and what the metadata says beside a picture are escaped."""
    evil = '<b>x\' onclick="alert(1)"'
    rows = np.repeat(np.eye(3, 8, dtype=np.float32), 2, axis=0)
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / f"{evil}.npy", rows)
    facts = {"exif_time": [evil] * 6, "width": [evil] * 3 + ["12"] * 3,
             "height": ["9"] * 3 + ["9" * 5000, "9", "9"],
             "bytes": ["9" * 5000, "2500000", "x", "999", "1000", None]}  # fmt: skip
    pq.write_table(pa.table({"key": list("abcdef"), **facts}), tmp_path / "m.parquet")
    words = ("--metadata", tmp_path / "m.parquet", "--also", f"{tmp_path / evil}.npy:.5")
    assert truth.snip("dedup", tmp_path / "x.npy", *words, "--out", tmp_path / "out")[0] == 0
    assert truth.snip("report", tmp_path / "out")[0] == 0
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "<b>x" not in page
    assert 'onclick="' not in page
    rows = rows_of(page)
    assert [rows[row]["also"] for row in (1, 3, 5)] == [f"{evil}.npy 1"] * 3
    starts = ["", "2.5 MB · ", "", "1.0 kB · ", "12 × 9 · 1.0 kB · ", "12 × 9 · "]
    assert [rows[row]["facts"] for row in range(6)] == [start + evil for start in starts]
