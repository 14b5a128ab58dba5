"""Whole runs of `snip embed`: what they write, stopped and shared as well."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import PIL
import pyarrow.parquet as pq
import pytest
from odd_files import encoded, photo, write_odd_files
from PIL import Image
from processes import until

import snipdedup
from snipdedup.config import Embed
from snipdedup.errors import SnipError, UsageError
from snipdedup.pictures import embed
from snipdedup.pictures.models import open_model
from snipdedup.pictures.sources import find_pictures
from snipdedup.runners.slurm import Share, share_of
from snipdedup.storage.out_folder import MANIFEST, read_manifest

PICTURES = 120


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Odd files, and plain pictures in shards of forty; some of them alike."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    write_odd_files(folder / "odd")
    for number in range(PICTURES):
        picture = photo(number % 100, (160, 120))
        (folder / f"{number}.jpg").write_bytes(encoded(picture, "JPEG", quality=70 + number // 100))
    return folder


@pytest.fixture(scope="module")
def alone(photos, snip):
    """What one process writes that nothing disturbs."""
    place = photos.parent
    snip("embed", "photos", "--out", "alone", "--shard_rows", 40, "--threads", 1, cwd=place)
    return place / "alone"


def contents(out):
    """All files of OUT; of the manifest what a second run says again."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    manifest = json.loads(found.pop(MANIFEST))
    del manifest["seconds"]
    for name in ("out", "threads", "runner", "num_tasks", "task_index", "images"):
        del manifest["settings"][name]
    return {**found, MANIFEST: manifest}


def test_rows_are_those_of_a_plain_loop(photos, alone):
    model = open_model("phash", device="cpu", threads=1)
    at = 0
    for number in range(5):
        rows = pq.read_table(alone / f"metadata/metadata_000{number}.parquet").to_pylist()
        features = np.load(alone / f"img_emb/img_emb_000{number}.npy")
        assert features.dtype == np.float16
        assert features.shape == (len(rows), model.dim)
        for row, feature in zip(rows, features, strict=True):
            if "odd" in row["key"]:
                continue
            assert (row["key"], row["path"]) == (str(at), str(photos / f"{at}.jpg"))
            with Image.open(row["path"]) as opened:
                opened.draft("RGB", (model.size, model.size))
                plain = model.encode(model.prepare(opened.convert("RGB"))[None])[0]
            np.testing.assert_array_equal(feature, plain.astype(np.float16))
            at += 1
    assert at == PICTURES


def test_the_manifest(alone):
    manifest = read_manifest(alone, "embed")
    files = [f"img_emb_000{n}.npy" for n in range(5)]
    assert [shard["name"] for shard in manifest["shards"]] == files
    rows = [len(np.load(alone / "img_emb" / name)) for name in files]
    assert [shard["rows"] for shard in manifest["shards"]] == rows
    assert manifest["counts"]["embedded"] == sum(rows)
    failed = pq.read_table(alone / "failed.parquet").num_rows
    assert manifest["counts"] == {
        "pictures": sum(rows) + failed, "embedded": sum(rows), "failed": failed
    }  # fmt: skip
    model = open_model("phash", device="cpu", threads=1)
    found = manifest["model"]
    assert (found["name"], found["dim"], found["threshold"]) == ("phash", 256, model.threshold)


def test_the_manifest_tells_the_versions_of_what_decodes(alone):
    versions = read_manifest(alone, "embed")["versions"]
    assert versions["pillow"] == PIL.__version__
    for name in ("av", "pillow-heif", "onnxruntime"):
        installed = find_spec(name.replace("-", "_")) is not None
        assert (name in versions) == installed


def test_what_follows_is_one_command(alone, snip, tmp_path):
    said = snip("dedup", alone, "--out", tmp_path / "clean", "--threshold", 0.9).stdout
    groups = pq.read_table(tmp_path / "clean/groups.parquet").to_pylist()
    removed = {row["key"] for row in groups if row["is_dup"]}
    assert {str(number) for number in range(100, 120)} <= removed
    assert "written to" in said
    kept = pq.read_table(tmp_path / "clean/metadata/metadata_0000.parquet")
    assert "sha256" in kept.column_names


def test_two_threads_write_the_same_bytes(photos, alone, snip):
    snip("embed", "photos", "--out", "two", "--shard_rows", 40, "--threads", 2, cwd=photos.parent)
    assert contents(photos.parent / "two") == contents(alone)


def test_a_finished_run_is_kept_and_another_one_refused(photos, alone, snip):
    words = ("embed", "photos", "--out", "alone", "--shard_rows")
    said = snip(*words, 40, cwd=photos.parent).stdout
    assert "is finished already with these settings" in said
    said = snip(*words, 50, status=1, cwd=photos.parent).stderr
    assert "holds a finished run with other" in said
    assert "--overwrite" in said


# ---- stopped runs


def wait_for_a_shard(run, folder):
    """Wait until one more shard is done, or the run has ended."""
    before = len(list(folder.glob("*.json")))
    until(lambda: run.poll() is not None or len(list(folder.glob("*.json"))) > before)


def kill_again_and_again(photos, tmp_path, kills, seed):
    """Start a run until it ends by itself; kill it at random moments."""
    rng, killed = np.random.default_rng(seed), 0
    words = ["embed", str(photos), "--out", "out", "--shard_rows", "40"]
    while killed < kills:
        threads = ["--threads", str(rng.integers(1, 3))]
        run = subprocess.Popen(
            [sys.executable, "-m", "snipdedup", *words, *threads],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if rng.random() < 0.7:
            time.sleep(rng.uniform(0.3, 2.5))
        else:
            wait_for_a_shard(run, tmp_path / "out/work/done")
        if run.poll() is None:
            killed += 1
        elif (tmp_path / "out" / MANIFEST).exists():
            assert run.returncode == 0
            shutil.rmtree(tmp_path / "out")
            continue
        run.send_signal(signal.SIGKILL)
        run.wait()
    return [*words, "--threads", "2"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_the_result_is_the_same(photos, alone, snip, tmp_path, kills):
    words = kill_again_and_again(photos, tmp_path, kills, seed=kills)
    snip(*words, cwd=tmp_path)
    assert contents(tmp_path / "out") == contents(alone)


# The command, which ends where it comes to its third shard.
STOPPED = """
import os, signal, sys
from snipdedup import cli
from snipdedup.pictures.embed import EmbedTasks

def stop(tasks, number, embed=EmbedTasks.embed):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return embed(tasks, number)

EmbedTasks.embed = stop
cli.main(sys.argv[1:])
"""


def test_done_shards_are_kept(photos, alone, snip, tmp_path):
    words = ["embed", str(photos), "--out", "out", "--shard_rows", "40"]
    command = [sys.executable, "-c", STOPPED, *words]
    stopped = subprocess.run(command, cwd=tmp_path, stderr=subprocess.DEVNULL, check=False)
    assert stopped.returncode == -signal.SIGKILL
    work = tmp_path / "out/work"
    assert sorted(path.name for path in work.glob("done/*.json")) == ["0000.json", "0001.json"]
    kept = (work / "files/img_emb/img_emb_0001.npy").stat().st_ino
    other = snip("embed", photos, "--out", "out", "--shard_rows", 50, status=1, cwd=tmp_path)
    assert "holds a stopped run with other" in other.stderr
    (photos / "new.jpg").write_bytes(encoded(photo(5), "JPEG"))
    try:
        other = snip("embed", photos, "--out", "out", "--shard_rows", 40, status=1, cwd=tmp_path)
        assert "holds a stopped run with other files" in other.stderr
    finally:
        (photos / "new.jpg").unlink()
    made = work / "files/img_emb/img_emb_0000.npy"
    made.write_bytes(made.read_bytes()[:-1])  # as a power cut may leave it
    snip("embed", photos, "--out", "out", "--shard_rows", 40, cwd=tmp_path)
    assert (tmp_path / "out/img_emb/img_emb_0001.npy").stat().st_ino == kept
    assert contents(tmp_path / "out") == contents(alone)


@pytest.mark.parametrize("change", ["new", "changed", "gone"])
def test_another_caption_is_another_input(tmp_path, change):
    folder = tmp_path / "p"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(encoded(photo(), "PNG"))
    (folder / "a.txt").write_text("old")
    before = find_pictures(folder, 1).request()
    assert find_pictures(folder, 1).request() == before
    (folder / "c.txt").write_text("of no picture")
    assert find_pictures(folder, 1).request() == before
    if change == "gone":
        (folder / "a.txt").unlink()
    else:
        (folder / {"new": "b.json", "changed": "a.txt"}[change]).write_text("{}")
    assert find_pictures(folder, 1).request() != before


def test_no_worker_outlives_a_killed_run(photos, tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-m", "snipdedup", "embed", str(photos), "--out", "out", "--threads", "2"],
        cwd=tmp_path, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def workers():
        command = ["ps", "-o", "pid=", "--ppid", str(run.pid)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()

    until(lambda: len(workers()) == 2 or run.poll() is not None)
    left = workers()
    assert len(left) == 2
    run.kill()
    run.wait()
    until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in left), 30)  # noqa: PTH110


# ---- shares


def test_processes_share_the_shards(photos, alone, processes, tmp_path):
    words = ("embed", photos, "--out", "out", "--shard_rows", 40, "--threads", 1)
    runs = [
        processes(*words, "--num_tasks", 3, "--task_index", rank, cwd=tmp_path)
        for rank in (2, 0, 1)
    ]
    assert [run.wait() for run in runs] == [0, 0, 0], [run.said() for run in runs]
    assert contents(tmp_path / "out") == contents(alone)
    assert not (tmp_path / "out/work").exists()


def test_a_slurm_array_is_a_share():
    array = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
    asked = {"images": "x", "out": "y"}
    assert share_of(Embed(**asked), array) == Share(1, 3)
    assert share_of(Embed(**asked, overwrite=True), array) is None
    for wrong in ({"num_tasks": 2, "task_index": 2}, {"num_tasks": 2, "runner": "ray"},
                  {"runner": "ray", "device": "cuda"}):  # fmt: skip
        with pytest.raises(UsageError):
            Embed(**asked, **wrong)


def test_ray_workers_write_the_same_bytes(photos, alone, tmp_path):
    pytest.importorskip("ray")
    words = ["embed", str(photos), "--out", "out", "--shard_rows", "40", "--threads", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "snipdedup", *words, "--runner", "ray"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(alone)


# ---- faults


class Deadly:
    """A model whose `prepare` ends the process of one picture, and that fails at another."""

    name, dim, threshold, batch, size, described = "deadly", 4, 0.5, 8, 64, {}

    def prepare(self, picture):
        if picture.size == (31, 31):
            os.abort()
        return np.float32(np.asarray(picture).mean((0, 1)))

    def encode(self, prepared):
        return np.column_stack([np.where(prepared[:, :1] > 250, np.nan, 1), prepared]) / 512

    def encode_texts(self, texts):
        return np.stack([np.full(4, len(text) + 1, np.float32) for text in texts])


@pytest.fixture
def deadly(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "open_model", lambda *_, **__: Deadly())
    folder = tmp_path / "p"
    folder.mkdir()
    for number in range(20):
        size = (31, 31) if number == 7 else (30, 30)
        colour = (255, 0, 0) if number == 11 else (number, 9, 9)
        Image.new("RGB", size, colour).save(folder / f"{number}.png")
    return folder


def test_what_kills_a_process_and_what_has_no_feature_fails(deadly, tmp_path):
    for number in (3, 12):
        (deadly / f"{number}.txt").write_text("a" * number)
    out = tmp_path / "out"
    result = snipdedup.embed(deadly, out=out, threads=2, shard_rows=15)
    failed = pq.read_table(out / "failed.parquet").to_pylist()
    assert [(row["key"], row["reason"]) for row in failed] == [
        ("7", "ended the decoder: SIGABRT"), ("11", "the model returned no finite feature")
    ]  # fmt: skip
    assert result.failed == {
        "ended the decoder": 1, "the model returned no finite feature": 1
    }  # fmt: skip
    kept = [number for number in range(20) if number not in (7, 11)]
    rows = [pq.read_table(out / f"metadata/metadata_000{n}.parquet").to_pylist() for n in (0, 1)]
    assert [row["key"] for part in rows for row in part] == [str(number) for number in kept]
    features = np.concatenate([np.load(out / f"img_emb/img_emb_000{n}.npy") for n in (0, 1)])
    assert (features[:, 1] * 512).round().tolist() == kept
    texts = np.concatenate([np.load(out / f"text_emb/text_emb_000{n}.npy") for n in (0, 1)])
    assert texts[:, 0].tolist() == [number + 1 if number in (3, 12) else 1 for number in kept]


def test_a_model_that_fails_ends_decoding_and_its_processes(deadly, tmp_path, monkeypatch):
    def fail(self, prepared):
        raise SnipError("no memory on the device")

    monkeypatch.setattr(Deadly, "encode", fail)
    for number in range(20, 300):
        shutil.copy(deadly / "0.png", deadly / f"{number}.png")
    asked = embed.Asked("deadly", None, False, "cpu", 2, 10**6, None)
    tasks = embed.EmbedTasks(find_pictures(deadly, 1000), asked, tmp_path / "work")
    with pytest.raises(SnipError, match="no memory on the device") as raised:
        tasks.embed(0)
    assert raised.traceback  # which keeps generators alive
    command = ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())]
    children = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "snipdedup.pictures.reading" not in children


def test_a_set_of_which_nothing_can_be_read_is_refused(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.jpg").write_bytes(b"nothing")
    with pytest.raises(SnipError, match=r"none of 1 pictures could .*/p/a\.jpg: not a picture$"):
        snipdedup.embed(tmp_path / "p", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tar_that_changes_is_refused(tmp_path, monkeypatch):
    import tarfile

    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(photo(), "PNG"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder / "a.png", "a.png")

    encode = embed.EmbedTasks.encode

    def changing(*given):
        os.utime(tmp_path / "a.tar", (1, 1))
        return encode(*given)

    monkeypatch.setattr(embed.EmbedTasks, "encode", changing)
    with pytest.raises(SnipError, match=r"a\.tar: changed while it was read"):
        snipdedup.embed(tmp_path / "a.tar", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_does_not_lie_among_the_pictures(photos):
    with pytest.raises(SnipError, match="lies in the input folder"):
        snipdedup.embed(photos, out=photos / "out")
