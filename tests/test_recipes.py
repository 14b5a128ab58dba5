"""The recipes of docs/howto/tools.md, each run as it stands there, with the tool that it is for.

Tools that come with the test extra are used here; heavier ones in an environment of their own.
"""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import re
import shlex
import subprocess
import tarfile
import threading
import venv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

from snipdedup import cli
from snipdedup.demo import draw

COUNT = 40  # rows 25 to 39 are copies of rows 0 to 14
SIZES = (12, 3, 25)
UIDS = [np.random.default_rng(n).bytes(16).hex() for n in range(COUNT)]


def recipe(title: str, kind: str) -> str:
    """Return the fenced block of a language under a heading of the recipes."""
    text = (ROOT / "docs" / "howto" / "tools.md").read_text("utf-8")
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(rf"^```{kind}\n(.*?)^```", section, re.M | re.S)
    return block


def run_snip(block: str) -> None:
    for line in block.splitlines():
        first, *words = shlex.split(line)
        assert first == "snip"
        assert cli.run(words) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set with a finished OUT `clean`; pictures of its URLs are served from `www`."""
    place = tmp_path_factory.mktemp("recipes")
    for name in ("img_emb", "metadata", "www", "shards", "pool"):
        (place / name).mkdir()
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((25, 32)).astype(np.float16)
    rows = np.concatenate([rows, rows[: COUNT - 25]])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=place / "www")
    handler.func.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pictures = []
    for _ in range(25):
        with io.BytesIO() as file:
            Image.fromarray(draw(rng)).save(file, "PNG")
            pictures.append(file.getvalue())
    for n in range(COUNT):
        (place / "www" / f"{n}.png").write_bytes(pictures[n % 25])
    table = pa.table(
        {
            "key": [f"{n:05d}" for n in range(COUNT)],
            "uid": UIDS,
            "url": [f"http://127.0.0.1:{server.server_port}/{n}.png" for n in range(COUNT)],
            "caption": [f"caption {n}" for n in range(COUNT)],
        }
    )
    start = 0
    for number, size in enumerate(SIZES):
        part, cut = slice(start, start + size), table.slice(start, size)
        np.save(place / "img_emb" / f"img_emb_{number}.npy", rows[part])
        pq.write_table(cut, place / "metadata" / f"metadata_{number}.parquet")
        name = f"{number:x}" * 32
        np.savez(place / "pool" / f"{name}.npz", l14_img=rows[part], b32_img=rows[part, ::-1])
        pq.write_table(cut, place / "pool" / f"{name}.parquet")
        start += size
    with tarfile.open(place / "shards" / "00000.tar", "w") as tar:
        for n in range(COUNT):
            item = tarfile.TarInfo(f"{n:05d}.png")
            item.size = len(pictures[n % 25])
            tar.addfile(item, io.BytesIO(pictures[n % 25]))
    before = os.getcwd()  # noqa: PTH109
    os.chdir(place)
    words = "dedup img_emb --metadata metadata --merge_captions 5 --out clean"
    assert cli.run(words.split()) == 0
    yield place
    os.chdir(before)
    server.shutdown()


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return a function that installs a tool from the registry; its folder of programs."""

    @functools.cache
    def make(*packages):
        place = tmp_path_factory.mktemp("venv")
        venv.create(place, with_pip=True)
        pip = [place / "bin" / "python", "-m", "pip", "install", "-q", *packages]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot be installed here: {done.stderr.splitlines()[-1]}")
        return place / "bin"

    return make


def in_environment(programs, code, ends):
    """Run a recipe's Python in another environment; return the JSON that ``ends`` prints."""
    words = [programs / "python", "-c", f"{code}\nimport json\nprint()\nprint(json.dumps({ends}))"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_webdataset(folder):
    run_snip(recipe("webdataset", "sh"))
    names: dict = {}
    exec(recipe("webdataset", "python"), names)
    assert [sample["__key__"] for sample in names["samples"]] == [f"{n:05d}" for n in range(25)]


def test_datacomp(folder):
    run_snip(recipe("DataComp", "sh"))
    names: dict = {}
    exec(recipe("DataComp", "python"), names)
    pairs = [(int(uid[:16], 16), int(uid[16:32], 16)) for uid in UIDS[:25]]
    assert names["uids"].dtype == np.dtype("u8,u8")
    assert names["uids"].tolist() == sorted(pairs)


def test_duckdb(folder):
    names: dict = {}
    exec(recipe("DuckDB", "python"), names)
    found = [(key, url.rpartition("/")[2], similarity) for key, url, similarity in names["why"]]
    assert found == [(f"{n:05d}", f"{n - 25}.png", 1.0) for n in range(25, COUNT)]


@pytest.mark.slow
def test_img2dataset(folder, environment):
    programs = environment("img2dataset", "setuptools<81")
    line = recipe("img2dataset", "sh").strip()
    assert line.startswith("img2dataset ")
    words = [*shlex.split(line)[1:], "--processes_count", "1", "--thread_count", "4"]
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [programs / "img2dataset", *words], capture_output=True, text=True, check=False,
        env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "PATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {}
    for path in sorted((folder / "images").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    said = json.load(tar.extractfile(member))
                    found[said["url"]] = said
    assert sorted(int(url.rpartition("/")[2][:-4]) for url in found) == list(range(25))
    for url, said in found.items():
        n = int(url.rpartition("/")[2][:-4])
        assert said["status"] == "success"
        assert said["caption"] == f"caption {n}"
        assert said["dup_count"] == (n < COUNT - 25)
        merged = said["merged_captions"]
        assert list(merged) == [f"caption {n + 25}"] * (n < COUNT - 25)


@pytest.mark.slow
def test_hf_datasets(folder, environment):
    programs = environment("datasets")
    names = in_environment(
        programs, recipe("HF datasets", "python"), "[list(kept['key']), list(same['key'])]"
    )
    assert names == [[f"{n:05d}" for n in range(25)]] * 2


@pytest.mark.slow
def test_embedding_reader(folder, environment):
    title = "embedding-reader, autofaiss, clip-retrieval"
    run_snip(recipe(title, "sh"))
    programs = environment("embedding-reader")
    ends = "[[batch.tolist(), list(table['key'])] for batch, table in batches]"
    batches = in_environment(programs, recipe(title, "python"), ends)
    rows = [row for batch, _ in batches for row in batch]
    whole = np.concatenate([np.load(f"img_emb/img_emb_{n}.npy") for n in range(3)])
    np.testing.assert_array_equal(np.array(rows, np.float32), whole[:25].astype(np.float32))
    assert [key for _, keys in batches for key in keys] == [f"{n:05d}" for n in range(25)]


@pytest.mark.slow
def test_embedding_reader_after_a_shard_of_which_nothing_stays(folder, environment, tmp_path):
    is_dup = np.zeros(COUNT, bool)
    is_dup[12:15] = True  # all of the second shard
    np.save(tmp_path / "mask.npy", is_dup)
    words = f"filter metadata --is_dup {tmp_path}/mask.npy --embeddings img_emb --out"
    assert cli.run([*words.split(), "kept_both", "--overwrite"]) == 0
    code = recipe("embedding-reader, autofaiss, clip-retrieval", "python")
    ends = "[[batch.tolist(), list(table['key'])] for batch, table in batches]"
    batches = in_environment(environment("embedding-reader"), code, ends)
    assert [key for _, keys in batches for key in keys] == [
        f"{n:05d}" for n in range(COUNT) if not is_dup[n]
    ]
    whole = np.concatenate([np.load(f"img_emb/img_emb_{n}.npy") for n in range(3)])
    rows = np.array([row for batch, _ in batches for row in batch], np.float32)
    np.testing.assert_array_equal(rows, whole[~is_dup].astype(np.float32))


def embedded_table():
    """The metadata and features of the set as one table."""
    rows = [row for n in range(3) for row in np.load(f"img_emb/img_emb_{n}.npy").astype("f4")]
    table = pa.concat_tables(pq.read_table(f"metadata/metadata_{n}.parquet") for n in range(3))
    return table.append_column("embedding", pa.array(rows, pa.list_(pa.float32(), 32)))


@pytest.mark.slow
def test_ray_data(folder):
    pytest.importorskip("pandas")  # which ray.data imports
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")

    names: dict = {}
    exec(recipe("Ray Data", "python"), names)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        pq.write_table(embedded_table(), "embedded.parquet")
        whole = ray.data.read_parquet("embedded.parquet")
        place = str(folder / "ray")
        kept = names["drop_duplicates"](whole, "embedding", place, threshold=0.97).take_all()
    finally:
        ray.shutdown()
    assert sorted(row["key"] for row in kept) == [f"{n:05d}" for n in range(25)]
    assert {row["key"]: row["dup_count"] for row in kept}["00003"] == 1


def test_lance(folder):
    lance = pytest.importorskip("lance")
    lance.write_dataset(embedded_table(), "set.lance")
    exec(recipe("Lance", "python"), {})
    kept = lance.dataset("kept.lance").to_table()
    assert kept["key"].to_pylist() == [f"{n:05d}" for n in range(25)]
