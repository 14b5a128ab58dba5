"""Rows, tables and results in an S3 bucket of this machine: needs s3fs and moto[server]."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from odd_files import write_photos

import snipdedup
from snipdedup import cli
from snipdedup.errors import SnipError
from snipdedup.features.shards import open_features
from snipdedup.storage import atomic, locks, remote, upload
from snipdedup.storage.out_folder import MANIFEST

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")

ROWS = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)
ROWS[2000:] = ROWS[:1000] + 0.01 * ROWS[1000:2000]
BUCKET = "s3://sets"


@pytest.fixture(scope="module")
def address():
    """A server, as the environment of s3fs names it."""
    served = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    served.start()
    yield f"http://127.0.0.1:{served.get_host_and_port()[1]}"
    served.stop()


@pytest.fixture
def bucket(address, tmp_path, monkeypatch):
    """Two shards with metadata on the disk, and the same in a bucket."""
    import s3fs

    monkeypatch.chdir(tmp_path)
    for name, value in (("ENDPOINT_URL", address), ("ACCESS_KEY_ID", "x"),
                        ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(remote, "BACKOFF_S", 0.01)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("set/img_emb", "set/metadata"):
        (tmp_path / name).mkdir(parents=True)
    for number, part in ((2, slice(0, 1700)), (10, slice(1700, 3000))):
        np.save(f"set/img_emb/img_emb_{number}.npy", ROWS[part])
        uids = {"uid": [f"u{uid}" for uid in np.arange(3000)[part]]}
        pq.write_table(pa.table(uids), f"set/metadata/metadata_{number}.parquet")
    system = s3fs.S3FileSystem()
    if not system.exists(BUCKET):
        system.mkdir(BUCKET)
    system.put(f"{tmp_path}/set", f"{BUCKET}/", recursive=True)
    yield system
    system.rm(BUCKET, recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def run(*words):
    with pytest.raises(SystemExit) as left:
        cli.main(list(words))
    return left.value.code or 0


def said(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_same_bits_as_from_a_disk(bucket, tmp_path, capsys):
    assert run("dedup", "set", "--out", "here") == 0
    assert run("dedup", f"{BUCKET}/set", "--out", "there") == 0
    for name in ("is_dup.npy", "groups.parquet", "forest.parquet", "metadata/metadata_2.parquet"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    here, there = (atomic.load_json(tmp_path / out / MANIFEST) for out in ("here", "there"))
    assert here["shards"] == there["shards"]
    capsys.readouterr()
    assert run("dedup", f"{BUCKET}/set", "--out", "there") == 0
    assert "finished already" in capsys.readouterr().out
    assert run("audit", "there") == 0
    assert run("dedup", "there", "--threshold", ".97", "--out", "higher") == 0
    glob, pattern = f"{BUCKET}/set/img_emb/*.npy", f"{BUCKET}/set/img_emb/img_emb_{{part}}.npy"
    assert open_features(glob).rows == 3000
    assert open_features(pattern, parts="2:3").rows == 1700


def test_an_object_that_is_replaced(bucket, tmp_path, capsys, monkeypatch):
    from snipdedup.deduplication import run as dedup_run

    original = dedup_run.write_files

    def change(*given, **named):
        found = original(*given, **named)
        np.save("other.npy", ROWS[1700:] + 1)
        bucket.put("other.npy", f"{BUCKET}/set/img_emb/img_emb_10.npy")
        return found

    monkeypatch.setattr(dedup_run, "write_files", change)
    assert run("dedup", f"{BUCKET}/set", "--out", "out") == 1
    assert "img_emb_10.npy: changed while it was read; run it again" in said(capsys)


def test_what_is_not_there(bucket, capsys, tmp_path):
    for spec in (f"{BUCKET}/nothing", f"{BUCKET}/set/img_emb/x.npy", "s3://no-such-bucket/set"):
        assert run("dedup", spec, "--out", "out") == 1
        assert f"{spec}: no such file" in said(capsys)
    assert not (tmp_path / "out").exists()


def test_without_a_login_and_without_a_server(bucket, capsys, monkeypatch):
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    assert run("dedup", f"{BUCKET}/set", "--out", "out") == 1
    assert "redentials" in said(capsys)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    assert run("dedup", f"{BUCKET}/set", "--out", "out") == 1
    assert "onnect" in said(capsys)
    monkeypatch.undo()


# ---- results


OUT = f"{BUCKET}/out/clean"
DEDUP = ("dedup", "set", "--threads", "1", "--out")


def names(system, url=OUT):
    root = url.removeprefix("s3://")
    system.invalidate_cache()
    return sorted(name.removeprefix(f"{root}/") for name in system.find(root))


def assert_same(system, folder, url=OUT):
    """The store has the bytes of a finished folder; of the manifests, times and OUT differ."""
    here = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
    assert set(names(system, url)) == here
    for name in here - {MANIFEST}:
        assert system.cat_file(f"{url}/{name}") == (Path(folder) / name).read_bytes(), name
    outputs = json.loads(system.cat_file(f"{url}/{MANIFEST}"))["outputs"]
    assert outputs == atomic.load_json(Path(folder) / MANIFEST)["outputs"]


def left():
    """What is below the temporary folder."""
    return [path.name for path in Path("temporary").rglob("*") if path.is_file()]


def test_a_result_in_a_bucket(bucket, capsys):
    assert run(*DEDUP, "here") == 0
    assert run(*DEDUP, f"{OUT}/") == 0
    printed = capsys.readouterr().out
    assert f"written to {OUT}" in printed
    assert "temporary" not in printed
    assert_same(bucket, "here")
    assert left() == []
    assert json.loads(bucket.cat_file(f"{OUT}/{MANIFEST}"))["settings"]["out"] == f"{OUT}/"
    before = bucket.info(f"{OUT}/is_dup.npy")["LastModified"]
    assert run(*DEDUP, OUT) == 0
    assert capsys.readouterr().out.startswith(f"{OUT} is finished already with these settings")
    assert run(*DEDUP, OUT, "--threshold", ".99") == 1
    line = said(capsys)
    assert line.startswith(f"snip: --out {OUT} holds a finished run with other threshold")
    assert (bucket.info(f"{OUT}/is_dup.npy")["LastModified"], left()) == (before, [])
    result = snipdedup.dedup("set", threads=1, out=OUT)
    assert result.removed == np.load("here/is_dup.npy").sum()
    assert run("download", OUT, "fetched") == 0
    assert run("audit", "fetched", "set/img_emb") == 0


def test_another_result_takes_its_place(bucket, capsys):
    assert run(*DEDUP, OUT, "--pairs", "--export", "keys") == 0
    assert "pairs.parquet" in names(bucket)
    more = ("--threshold", ".97", "--overwrite")
    assert run(*DEDUP, "here", *more) == run(*DEDUP, OUT, *more) == 0
    assert_same(bucket, "here")  # what only the earlier one had is removed


def test_from_bucket_to_bucket(bucket):
    words = ("filter", f"{BUCKET}/set/metadata", "--is_dup", "here", "--out")
    assert run(*DEDUP, "here") == run(*words, "kept") == run(*words, f"{BUCKET}/kept") == 0
    assert_same(bucket, "kept", f"{BUCKET}/kept")
    write_photos(Path("photos"))
    words = ("embed", "photos", "--threads", "1", "--out")
    assert run(*words, "embedded") == run(*words, f"{BUCKET}/embedded") == 0
    assert_same(bucket, "embedded", f"{BUCKET}/embedded")
    assert run("dedup", f"{BUCKET}/embedded", "--out", f"{BUCKET}/clean_photos") == 0


@pytest.mark.parametrize("stop", ["groups.parquet", MANIFEST])
def test_a_kill_during_the_upload(bucket, stop, capsys):
    """No manifest stands without its files; the same command then uploads what is missing."""
    hook = f"""
import os, sys
from snipdedup import cli
from snipdedup.storage import upload
put = upload.put
def stopped(path, url):
    if url.endswith({stop!r}):
        os._exit(9)
    put(path, url)
upload.AT_ONCE, upload.put = 1, stopped
cli.main(sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", hook, *DEDUP, OUT], check=False)
    assert done.returncode == 9
    found = names(bucket)
    assert "forest.parquet" in found
    assert MANIFEST not in found
    assert ("groups.parquet" in found) == (stop == MANIFEST)
    before = bucket.info(f"{OUT}/forest.parquet")["LastModified"]
    assert run(*DEDUP, OUT, "--threshold", ".99") == 1
    assert "holds a finished run with other threshold" in said(capsys)
    assert run(*DEDUP, OUT) == 0
    assert bucket.info(f"{OUT}/forest.parquet")["LastModified"] == before
    assert run(*DEDUP, "here") == 0
    assert_same(bucket, "here")
    assert left() == []


def test_an_upload_that_fails_and_goes_on(bucket, monkeypatch, capsys):
    assert run(*DEDUP, OUT) == 0
    put = upload.put

    def broken(path, url):
        if url.endswith("is_dup.npy"):
            raise SnipError(f"{url}: cannot be written: quota")
        put(path, url)

    monkeypatch.setattr(upload, "put", broken)
    more = ("--threshold", ".97", "--overwrite")
    assert run(*DEDUP, OUT, *more) == 1
    assert f"{OUT}/is_dup.npy: cannot be written: quota" in said(capsys)
    assert MANIFEST not in names(bucket)  # nor that of the earlier result
    monkeypatch.setattr(upload, "put", put)
    bucket.pipe_file(f"{OUT}/forest.parquet", b"someone else's")  # since the journal was written
    assert run(*DEDUP, OUT, *more) == run(*DEDUP, "here", *more) == 0
    assert_same(bucket, "here")


def test_places_that_are_refused(bucket, capsys, tmp_path, monkeypatch):
    for out, reason in (
        ("s3://no-such-bucket/out", "s3://no-such-bucket/out: no such bucket or folder; make it"),
        (f"{BUCKET}/set/img_emb", f"{BUCKET}/set/img_emb has files (img_emb_10.npy, ...) and no "),
        ("nothing://x/y", "nothing://x/y: expected a local path or a URL"),
    ):
        assert run(*DEDUP, out) == run(*DEDUP, out, "--overwrite") == 1
        assert said(capsys).startswith(f"snip: {reason}")
    assert not list(Path("temporary").iterdir())
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "1")
    for more in ((), ("--num_tasks", "2", "--task_index", "0"), ("--runner", "ray")):
        assert run(*DEDUP, OUT, *more) == 2
        assert "processes that share --out need a folder that all of them see" in said(capsys)
    assert names(bucket) == []


def test_a_manifest_that_names_files_elsewhere(bucket, capsys):
    for name in ("../set/img_emb/img_emb_2.npy", "/sets/x", "a\\..\\b"):
        manifest = {"kind": "dedup", "outputs": {name: {}}}
        bucket.pipe_file(f"{OUT}/{MANIFEST}", json.dumps(manifest).encode())
        assert run(*DEDUP, OUT, "--overwrite") == 1
        assert "which is not in the folder" in said(capsys)
    assert bucket.exists(f"{BUCKET}/set/img_emb/img_emb_2.npy")


def test_one_run_at_a_time_and_own_folders_only(bucket, capsys, monkeypatch):
    with upload.place_of(OUT) as folder:
        word = "from snipdedup import cli; import sys; cli.main(sys.argv[1:])"
        words = [sys.executable, "-c", word, *DEDUP, OUT]
        done = subprocess.run(words, check=False, capture_output=True, text=True)
        assert f"{OUT} is being written by another run (process" in done.stderr
    assert not locks.holds(folder.parent / upload.LOCK)
    if hasattr(upload.os, "getuid"):
        folder.parent.symlink_to(Path("set").absolute())
        assert run(*DEDUP, OUT) == 1
        assert "is another user's: set TMPDIR" in said(capsys)
