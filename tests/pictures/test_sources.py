"""What IMAGES may be, from the disk and from servers; keys, captions, order, shards."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from odd_files import encoded, photo
from servers import Server

import snipdedup
from snipdedup.errors import SnipError
from snipdedup.metadata.tables import open_metadata
from snipdedup.pictures import sources
from snipdedup.pictures.items import Text, read_texts
from snipdedup.pictures.sources import find_pictures
from snipdedup.storage import listing

JPEG = [encoded(photo(number), "JPEG") for number in range(12)]


def write(folder, names):
    """Write a picture under each name; names of texts are (name, bytes)."""
    for number, given in enumerate(names):
        name, data = given if isinstance(given, tuple) else (given, JPEG[number % 12])
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def embed(images, tmp_path, **more):
    """Embed; return the rows of the metadata, those that failed, and the result."""
    out = tmp_path / "out"
    result = snipdedup.embed(images, out=out, threads=1, **more)
    tables = [pq.read_table(path) for path in sorted((out / "metadata").iterdir())]
    rows = pa.concat_tables(tables).to_pylist()
    features = [np.load(path) for path in sorted((out / "img_emb").iterdir())]
    assert [len(part) for part in features] == [table.num_rows for table in tables]
    return rows, pq.read_table(out / "failed.parquet").to_pylist(), result


def keys(images, shard_rows=100, **more):
    shards = find_pictures(str(images), shard_rows, **more).shards
    return [[item.key for item in shard.items(Counter())] for shard in shards]


# ---- files


def test_a_folder_is_read_with_its_folders_in_natural_order(tmp_path):
    names = [
        "b/10.jpg",
        "b/9.png",
        "a.jpg",
        "b/c/1.webp",
        ".git/x.jpg",
        "b/.x.jpg",
        "10/z.jpg",
        "9/z.jpg",
    ]
    folder = write(tmp_path / "p", names)
    assert keys(folder) == [["9/z", "10/z", "a", "b/9", "b/10", "b/c/1"]]
    assert keys(folder, 4) == [["9/z", "10/z", "a", "b/9"], ["b/10", "b/c/1"]]


def test_keys_are_unique(tmp_path):
    names = ["a.jpg", "a.png", "a.jpg.png", "b.JPG", "c.jpg", "c.JPG", "d/a.jpg"]
    found = keys(write(tmp_path / "p", names))[0]
    assert sorted(found) == ["a.jpg", "a.jpg.png", "a.png", "b", "c.JPG", "c.jpg", "d/a"]


def test_captions_and_urls_are_those_beside_a_picture(tmp_path):
    described = {"caption": "of json", "url": "https://h/x.jpg", "width": 9}
    write(tmp_path / "p", [
        "a.jpg", ("a.txt", "  Grüße\n".encode()), ("a.json", json.dumps(described).encode()),
        "b.jpg", ("b.json", json.dumps(described).encode()), "c.jpg", ("c.json", b"{broken"),
        "d.jpg", ("d.json", b"[1]"), "e.jpg", ("e.txt", b"\xff\xfe"), "f.jpg",
    ])  # fmt: skip
    rows, failed, result = embed(tmp_path / "p", tmp_path)
    assert {row["key"]: (row["caption"], row["url"]) for row in rows} == {
        "a": ("Grüße", "https://h/x.jpg"), "b": ("of json", "https://h/x.jpg"), "c": (None, None),
        "d": (None, None), "e": ("\ufffd\ufffd", None), "f": (None, None),
    }  # fmt: skip
    assert not failed
    assert result.rows == 6
    assert not (tmp_path / "out" / "text_emb").exists()  # a hash reads no text


def test_a_json_that_is_no_text_is_none():
    assert read_texts(None, b'{"caption": 3, "URL": "u", "text": "t"}') == Text("t", "u")
    assert read_texts(None, b'{"caption": "\\ud800"}').caption == "\\ud800"
    assert read_texts(b"", b'{"caption": "x"}') == Text("", None)


def test_globs_lists_and_commas(tmp_path, monkeypatch):
    folder = write(tmp_path / "p", ["x/2.jpg", "x/10.jpg", "y/1.png", ("x/2.txt", b"two"), "z"])
    monkeypatch.chdir(tmp_path)
    assert keys("p/*/*.jpg") == [["2", "10"]]
    assert keys("p/x/10.jpg,p/y/1.png") == [["x/10", "y/1"]]
    assert keys("p/y,p/x") == [["y/1", "x/2", "x/10"]]
    assert keys("p/z") == [["z"]]
    (tmp_path / "list.txt").write_text(f"p/z\n\n{folder}/x/2.jpg\np/gone.jpg\n")
    assert keys("list.txt") == [["z", "x/2", "gone"]]
    rows, failed, _ = embed("list.txt", tmp_path)
    assert [(row["key"], row["caption"]) for row in rows] == [("z", None), ("x/2", "two")]
    assert failed == [{"source": str(tmp_path / "p/gone.jpg"), "key": "gone",
                       "reason": "missing: it was there when the files were listed"}]  # fmt: skip
    write(tmp_path, ["a,b.jpg"])
    assert keys("a,b.jpg") == [["a,b"]]


def test_two_stars_in_a_glob_are_any_folders(tmp_path, monkeypatch):
    write(tmp_path / "p", ["a.jpg", "x/b.jpg", "x/y/c.jpg", "x/.z/d.jpg", "x/y/e.png"])
    monkeypatch.chdir(tmp_path)
    assert keys("p/**/*.jpg") == [["a", "x/b", "x/y/c"]]
    assert keys("p/**/**/*.png") == [["e"]]
    assert keys("p/*") == [["a"]]


def test_equal_numbers_have_an_order(tmp_path, monkeypatch):
    names = ["1.jpg", "01.jpg", "001.jpg", "2.jpg", "02.jpg"]
    write(tmp_path / "p", names)
    monkeypatch.chdir(tmp_path)
    for listed in (names, names[::-1]):
        places = [(name, tmp_path / "p" / name) for name in listed]
        monkeypatch.setattr(sources, "files_below", lambda _, places=places: places)
        monkeypatch.setattr(listing, "glob", lambda *_, listed=listed, **__: [
            f"p/{name}" for name in listed
        ])  # fmt: skip
        for images in ("p", "p/*"):
            assert keys(images) == [["001", "01", "1", "02", "2"]]


@pytest.mark.parametrize("line", ["/", ".", "a\0b.jpg", "~no such user/a.jpg"])
def test_what_names_no_file_is_refused_with_its_line(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"a.jpg\n\n{line}\n")
    with pytest.raises(SnipError, match=r"list\.txt: line 3: expected the path or URL of a file"):
        find_pictures(tmp_path / "list.txt", 10)


def test_names_may_be_long(tmp_path, monkeypatch):
    name = "a" * 251
    write(tmp_path / "p", [f"{name}.jpg", ("b\x85.jpg", JPEG[1])])
    (tmp_path / "list.txt").write_text(f"p/{name}.jpg\np/{name}{name}.jpg\np/b\x85.jpg\n")
    monkeypatch.chdir(tmp_path)
    rows, failed, _ = embed("list.txt", tmp_path)
    assert [row["key"] for row in rows] == [name, "b\x85"]
    assert [row["reason"] for row in failed] == ["cannot be read: File name too long"]
    assert keys(f"p/{name}.jpg") == [[name]]
    assert keys("p") == [[name, "b\x85"]]


def test_what_is_beside_pictures_is_left_out_and_counted(tmp_path):
    table = pa.table({"key": ["a"], "width": [3]})
    folder = write(
        tmp_path / "p", ["a.jpg", ("x.md", b""), ("a.txt", b""), ("y.md", b""), ("Thumbs", b"")]
    )
    pq.write_table(table, folder / "00000.parquet")  # what img2dataset writes beside its files
    found = find_pictures(str(folder), 10)
    assert found.left_out == {"": 1, ".md": 2, ".parquet": 1}
    assert keys(folder) == [["a"]]


def test_what_was_left_out_is_said_with_the_most_common_first(tmp_path):
    others = [(f"x.{letter}", b"") for letter in "abcdefg"] + [("y.z", b""), ("z.z", b"")]
    _, _, result = embed(write(tmp_path / "p", ["a.jpg", *others]), tmp_path)
    assert "by their names: 2 .z, 1 .a, 1 .b, 1 .c, 1 .d, 1 .e, 2 more" in str(result)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.mkdir(), r"no picture found in .*/p: expected \.jpg, .* give a list"),
        (lambda p: write(p, [("a.md", b"")]), "no picture found in"),
        (lambda p: None, "no such file or folder"),
        (lambda p: (p.mkdir(), (p / "a.tar").write_bytes(gzip.compress(b"x" * 999))),
         r"a\.tar: a compressed tar; expected a plain one"),
        (lambda p: (p.mkdir(), pq.write_table(pa.table({"x": [1]}), p / "a.parquet")),
         r"a\.parquet: expected a column of picture files .* found x int64"),
        (lambda p: (p.mkdir(), (p / "a.parquet").write_bytes(b"nonsense")), "not a parquet file"),
    ],
)  # fmt: skip
def test_what_has_no_pictures_is_refused(tmp_path, make, said):
    make(tmp_path / "p")
    with pytest.raises(SnipError, match=said):
        snipdedup.embed(tmp_path / "p", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dedup_of_photos_says_what_comes_first(tmp_path):
    for folder in (
        write(tmp_path / "p", ["a.jpg"]),
        write(tmp_path / "q", ["x/a.jpg"]).parent / "q",
    ):
        with pytest.raises(SnipError, match=rf"first: snip embed {folder} --out OUT"):
            snipdedup.dedup(folder)


# ---- tars


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Two tars by webdataset's own writer, as img2dataset makes them."""
    wds = pytest.importorskip("webdataset")
    place = tmp_path / "set"
    place.mkdir()
    for number, rows in ((2, range(3)), (10, range(3, 8))):
        with wds.TarWriter(str(place / f"{number}.tar")) as sink:
            for row in rows:
                described = {"caption": f"no {row}", "url": f"https://h/{row}", "key": f"k{row}"}
                sink.write(
                    {"__key__": f"k{row}", "jpg": JPEG[row], "txt": f"no {row}", "json": described}
                )
    pq.write_table(pa.table({"key": ["k0"]}), place / "2.parquet")
    (place / "2_stats.json").write_text("{}")
    return place


def check_shards(rows):
    assert [row["key"] for row in rows] == [f"k{n}" for n in range(8)]
    assert [row["member"] for row in rows] == [f"k{n}.jpg" for n in range(8)]
    assert [row["caption"] for row in rows] == [f"no {n}" for n in range(8)]
    assert [row["url"] for row in rows] == [f"https://h/{n}" for n in range(8)]
    assert [row["bytes"] for row in rows] == [len(JPEG[n]) for n in range(8)]


def test_tars_are_shards(shards, tmp_path):
    rows, failed, _ = embed(shards, tmp_path / "new")
    check_shards(rows)
    assert {row["tar"] for row in rows[:3]} == {str(shards / "2.tar")}
    assert not failed
    assert [len(np.load(tmp_path / f"new/out/img_emb/img_emb_000{n}.npy")) for n in (0, 1)] == [
        3,
        5,
    ]


def test_members_of_one_key_and_folders_in_tars(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(write(tmp_path / "p", ["x"]), "sub")
        for name in ("sub/a.jpg", "sub/b.left.jpg", "sub/b.right.jpg", "sub/b.txt", "sub/c.jpg",
                     "sub/c.png", "._d.jpg", "d.x.y.jpg", "e.cls"):  # fmt: skip
            add(tar, name, JPEG[0] if name.endswith(("jpg", "png")) else b"both")
    rows, failed, _ = embed(tmp_path / "a.tar", tmp_path)
    assert [(row["key"], row["caption"]) for row in rows] == [
        ("sub/a", None), ("sub/b.left", "both"), ("sub/b.right", "both"), ("sub/c.jpg", None),
        ("sub/c.png", None), ("d", None),
    ]  # fmt: skip
    assert not failed


def test_a_tar_that_was_cut_gives_what_is_whole(shards, tmp_path):
    whole = (shards / "10.tar").read_bytes()
    (shards / "10.tar").write_bytes(whole[: whole.index(JPEG[5]) + 100])
    rows, failed, _ = embed(shards, tmp_path / "new")
    assert [row["key"] for row in rows] == ["k0", "k1", "k2", "k3", "k4"]
    assert [row["key"] for row in failed] == ["k5", "10"]
    assert failed[0]["reason"].startswith("truncated")
    assert failed[1]["reason"].startswith("truncated: the tar ends too early")
    (shards / "10.tar").write_bytes(b"no tar at all" * 999)
    _, failed, _ = embed(shards, tmp_path / "newer")
    assert [row["source"] for row in failed] == [f"{shards}/10.tar: "]


# ---- parquet


def image_table():
    """A table as HF datasets writes it: the schema, its metadata, and rows without bytes."""
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "Value"}}}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": JPEG[n], "path": f"{n}.jpg"} for n in range(4)]
    images[1] = {"bytes": None, "path": "1.jpg"}
    schema = pa.schema(
        [("image", kind), ("label", pa.int64()), ("width", pa.int64()), ("text", pa.string())],
        {"huggingface": json.dumps(info)},
    )
    columns = {"image": images, "label": [5, 6, 7, 8], "width": [1, 2, 3, 4], "text": list("abcd")}
    return pa.table(columns, schema)


def test_a_table_of_hf_datasets(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    pq.write_table(image_table(), path, row_group_size=2)
    rows, failed, _ = embed(tmp_path / "data", tmp_path)
    assert [row["key"] for row in rows] == [f"{path.stem}-00000{n}" for n in (0, 2, 3)]
    own = [(row["label"], row["source_width"], row["text"], row["image_path"]) for row in rows]
    assert own == [(5, 1, "a", "0.jpg"), (7, 3, "c", "2.jpg"), (8, 4, "d", "3.jpg")]
    assert [(row["caption"], row["width"], row["parquet_row"]) for row in rows] == [
        ("a", 96, 0), ("c", 96, 2), ("d", 96, 3)
    ]  # fmt: skip
    assert failed == [{"source": f"{path}: 1", "key": f"{path.stem}-000001",
                       "reason": "no bytes in this row: only the path 1.jpg"}]  # fmt: skip


def test_a_table_of_img2dataset(tmp_path):
    columns = {
        "url": ["u0", "u1"], "key": ["000000000", "000000001"], "status": ["success"] * 2,
        "width": [9, 9], "sha256": ["x", "y"], "jpg": [JPEG[0], JPEG[1]], "caption": ["a", None],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "00000.parquet")
    rows, failed, _ = embed(tmp_path / "00000.parquet", tmp_path)
    assert not failed
    assert [(r["key"], r["url"], r["caption"], r["status"], r["source_width"], r["source_sha256"],
             r["width"]) for r in rows] == [
        ("000000000", "u0", "a", "success", 9, "x", 96),
        ("000000001", "u1", None, "success", 9, "y", 96),
    ]  # fmt: skip


def test_a_column_is_named_where_there_are_several(tmp_path):
    columns = {"uid": [7], "image": [JPEG[0]], "mask": [encoded(photo(1, (50, 50)), "PNG")]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert embed(tmp_path / "a.parquet", tmp_path)[0][0]["width"] == 96
    rows, _, _ = embed(tmp_path / "a.parquet", tmp_path / "new", column="mask")
    assert (rows[0]["width"], rows[0]["key"], rows[0]["uid"]) == (50, "7", 7)
    with pytest.raises(SnipError, match="name one with --column"):
        embed(tmp_path / "a.parquet", tmp_path / "newer", column="uid")


def test_a_table_without_a_good_picture_keeps_its_columns(tmp_path):
    (tmp_path / "p").mkdir()
    for number, data in enumerate((JPEG[0], b"nothing")):
        table = pa.table({"image": [data], "label": [number]})
        pq.write_table(table, tmp_path / f"p/{number}.parquet")
    rows, failed, _ = embed(tmp_path / "p", tmp_path)
    assert [row["label"] for row in rows] == [0]
    assert len(failed) == 1
    assert open_metadata(tmp_path / "out/metadata").rows == 1


def test_no_two_columns_have_one_name(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "source_width": ["x"], "width": [7], "image_path": ["own"],
        "image": pa.array([{"bytes": JPEG[0], "path": "a.jpg"}], kind),
    }  # fmt: skip
    (tmp_path / "p").mkdir()
    for number, names in enumerate((list(columns), list(columns)[::-1])):
        pq.write_table(pa.table(columns).select(names), tmp_path / f"p/{number}.parquet")
    snipdedup.embed(tmp_path / "p", out=tmp_path / "out")
    metadata = open_metadata(tmp_path / "out/metadata")
    for file in metadata.files:
        row = pq.read_table(file.path).to_pylist()[0]
        assert (row["width"], row["source_width"], row["source_source_width"]) == (96, "x", 7)
        assert (row["image_path"], row["source_image_path"]) == ("own", "a.jpg")


def test_a_table_with_a_name_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(JPEG[:1]), pa.array([1]), pa.array([2])], list("jxx"))
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SnipError, match="several columns are called x; rename them"):
        embed(tmp_path / "a.parquet", tmp_path)


def test_a_table_beside_pictures_hides_them_only_with_pictures(tmp_path):
    folder = write(tmp_path / "p", ["a.jpg"])
    pq.write_table(pa.table({"key": ["t"], "phash": [b"12345678"]}), folder / "0.parquet")
    assert keys(folder) == [["a"]]
    pq.write_table(pa.table({"key": ["t"], "JPG": [JPEG[1]]}), folder / "0.parquet")
    assert keys(folder) == [["t"]]
    pq.write_table(image_table(), folder / "0.parquet")
    assert keys(folder) == [[f"0-00000{n}" for n in range(4)]]


def test_tables_of_one_set_have_the_same_columns(tmp_path):
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"image": [JPEG[0]]}), tmp_path / "p/0.parquet")
    pq.write_table(pa.table({"image": [JPEG[0]], "x": [1]}), tmp_path / "p/1.parquet")
    with pytest.raises(SnipError, match="do not both have the columns x"):
        embed(tmp_path / "p", tmp_path)


# ---- servers


def test_tars_tables_and_pictures_of_a_web_server(shards, tmp_path):
    pq.write_table(image_table(), shards / "t.parquet")
    with Server() as server:
        names = ("2.tar", "10.tar", "t.parquet")
        server.files = {name: (shards / name).read_bytes() for name in names}
        server.files |= {"a/1.jpg": JPEG[1], "a/2.jpg": b"", "b.jpg": JPEG[2]}
        rows, _, _ = embed(f"{server.url}/2.tar,{server.url}/10.tar", tmp_path / "1")
        check_shards(rows)
        assert rows[0]["tar"] == f"{server.url}/2.tar"
        rows, _, _ = embed(f"{server.url}/t.parquet", tmp_path / "2")
        assert [row["label"] for row in rows] == [5, 7, 8]
        lines = [f"{server.url}/{name}" for name in ("a/1.jpg", "a/2.jpg", "b.jpg", "gone.jpg")]
        (tmp_path / "list.txt").write_text("\n".join(lines))
        rows, failed, _ = embed(tmp_path / "list.txt", tmp_path / "3")
        assert [row["key"] for row in rows] == ["a/1", "b"]
        assert [row["source"] for row in failed] == [lines[1], lines[3]]


def test_a_folder_in_a_bucket(tmp_path, monkeypatch):
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    served = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    served.start()
    address = f"http://127.0.0.1:{served.get_host_and_port()[1]}"
    try:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            monkeypatch.setenv(f"AWS_{name}", "x")
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        system = s3fs.S3FileSystem()
        system.mkdir("photos")
        names = ["x/2.jpg", "x/10.jpg", "y.png", ("x/2.txt", b"two")]
        system.put(f"{write(tmp_path / 'p', names)}/", "photos/", recursive=True)
        rows, failed, _ = embed("s3://photos", tmp_path)
        assert [(row["key"], row["caption"]) for row in rows] == [
            ("x/2", "two"), ("x/10", None), ("y", None)
        ]  # fmt: skip
        assert rows[0]["path"] == "s3://photos/x/2.jpg"
        assert not failed
    finally:
        served.stop()
        s3fs.S3FileSystem.clear_instance_cache()
