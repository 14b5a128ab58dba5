"""Wrong input through each command that reads features: one line, exit 1, and nothing written."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup import cli

ROWS = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)


def one(array):
    return lambda folder: np.save(folder / "b.npy", array, allow_pickle=True)


def two(first, second, names=("a.npy", "b.npy")):
    def write(folder):
        for name, array in zip(names, (first, second), strict=True):
            np.save(folder / name, array)

    return write


def spoilt(value):
    rows = ROWS.copy()
    rows[137] = value
    return two(rows[:100], rows[100:])


def cut(size):
    def write(folder):
        np.save(folder / "b.npy", ROWS)
        whole = (folder / "b.npy").read_bytes()
        (folder / "b.npy").write_bytes(whole[:size] if size <= 0 else whole + b"\0" * size)

    return write


WRONG = {
    "no shard": (lambda folder: None, "no shard found in"),
    "stray files only": (lambda folder: (folder / "x.txt").touch(), "no shard found in"),
    "widths": (two(ROWS, ROWS[:, :5]), "b.npy: rows are 5 wide, those of"),
    "1-D": (one(ROWS[0]), "b.npy: expected a 2-D array"),
    "boolean": (one(ROWS > 0), "found bool; this looks like a mask"),
    "integer": (one(ROWS.astype(np.int32)), "b.npy: expected float16, float32 or float64"),
    "object": (one(ROWS.astype(object)), "b.npy: expected plain numbers, found object"),
    "Fortran": (one(np.asfortranarray(ROWS)), "b.npy: Fortran-ordered"),
    "truncated": (cut(-5), "b.npy: truncated"),
    "longer": (cut(3), "b.npy: truncated or damaged"),
    "empty": (cut(0), "b.npy: empty file"),
    "no rows": (one(ROWS[:0]), "no rows at all in"),
    "NaN": (spoilt(np.nan), "row 37"),
    "infinity": (spoilt(-np.inf), "row 37"),
    "zeros": (spoilt(0), "row 37"),
    "mixture": (
        two(ROWS, ROWS, ("img_emb_0.npy", "text_emb_0.npy")),
        "mixes image and text features",
    ),
}
COMMANDS = {
    "dedup": ["dedup"],
    "exact": ["dedup", "--method=exact"],
    "train": ["train", "--steps=2", "--dim=4", "--batch=16", "--hidden=8"],
    "index": ["index", "--m=2", "--nlist=1"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_input(tmp_path, capsys, command, what):
    write, message = WRONG[what]
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    name, *flags = COMMANDS[command]
    status = cli.run([name, str(folder), "--out", str(tmp_path / "OUT"), *flags])
    shown = capsys.readouterr()
    assert status == 1, shown.err
    said = shown.err.splitlines()[-1]
    assert said.startswith("snip: ")
    assert message in said
    assert message != "row 37" or "b.npy" in said
    assert shown.out == ""
    if command == "index" and message == "row 37":  # found on the way: shards before it stay done
        assert not (tmp_path / "OUT" / "snip.json").exists()
    else:
        assert not (tmp_path / "OUT").exists()
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.parametrize("command", COMMANDS)
def test_output_inside_the_input(tmp_path, capsys, command):
    folder = tmp_path / "in"
    folder.mkdir()
    two(ROWS, ROWS)(folder)
    name, *flags = COMMANDS[command]
    assert cli.run([name, str(folder), "--out", str(folder / "OUT"), *flags]) == 1
    assert "lies in the input folder" in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == ["a.npy", "b.npy"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Features, metadata, OUT and an index of them, and a table of rates."""
    folder = tmp_path_factory.mktemp("finished")
    truth.save_shards(folder / "emb", truth.clustered(300, 16, 0), [100])
    table = pa.table({"key": [f"k{i}" for i in range(300)], "caption": ["c"] * 300})
    (folder / "meta").mkdir()
    pq.write_table(table, folder / "meta" / "m.parquet")
    emb, index = folder / "emb", folder / "index"
    words = ("dedup", emb / "img_emb_[01].npy", "--metadata", folder / "meta")
    assert truth.snip(*words, "--out", folder / "clean")[0] == 0
    assert truth.snip("index", emb, "--out", index, "--nlist", 2, "--m", 2)[0] == 0
    np.save(folder / "query.npy", np.ones((1, 16), np.float32))
    return folder


FILES = ("clean/snip.json", "clean/is_dup.npy", "clean/metadata/m.parquet")
INPUTS = ("emb/img_emb_0.npy", "meta/m.parquet")
OUTPUT_FILES = {
    "report": ("report clean --overwrite --html", (*FILES, *INPUTS)),
    "top": ("top clean --prompts", (*FILES, *INPUTS, "index/snip.json")),
    "audit": ("audit clean --sheet", (*FILES, *INPUTS)),
    "search": (
        "search query.npy --index index --metadata meta --html",
        (*FILES, *INPUTS, "index/snip.json", "query.npy"),
    ),
    "index": (
        "index emb --out index --nlist 2 --m 2 --export_faiss",
        (*FILES, "emb/img_emb_0.npy", "index/snip.json", "index/quantizer.faiss"),
    ),
    "plan": ("plan emb --probe --rates", (*FILES, "emb/img_emb_0.npy", "index/snip.json")),
}


@pytest.mark.parametrize("command", OUTPUT_FILES)
def test_an_output_file_never_replaces_a_file_of_ours_or_an_input(finished, monkeypatch, command):
    monkeypatch.chdir(finished)
    words, targets = OUTPUT_FILES[command]
    before = truth.listing(finished)
    for target in targets:
        assert (finished / target).is_file()
        status, said, complaint = truth.snip(*words.split(), target)
        assert (status, said) == (1, ""), (command, target)
        assert target in complaint
        assert truth.listing(finished) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "dedup in --out https://b/out",
            "--out https://b/out: expected a local path, found a URL; or give one of a store",
        ),
        ("dedup in --out OUT --index s3://b/x", "fetch it first: snip download s3://b/x FOLDER"),
        ("filter in --out OUT --is_dup https://h/is_dup.npy", "is_dup.npy: expected a local path"),
        ("download in s3://b/out", "OUT s3://b/out: expected a local path, found a URL; snip w"),
        ("report s3://b/clean", "fetch it first: snip download s3://b/clean FOLDER"),
    ],
)
def test_a_url_where_a_local_path_is_meant(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    two(ROWS, ROWS)(tmp_path / "in")
    assert cli.run(words.split()) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_faiss_file_as_an_index(tmp_path, capsys):
    (tmp_path / "x.faiss").write_bytes(b"IwPQ")
    np.save(tmp_path / "a.npy", ROWS)
    words = [
        "dedup",
        tmp_path / "a.npy",
        "--out",
        tmp_path / "OUT",
        "--index",
        tmp_path / "x.faiss",
    ]
    assert cli.run([str(word) for word in words]) == 1
    assert f"snip index FEATURES --base {tmp_path / 'x.faiss'} --out" in capsys.readouterr().err
