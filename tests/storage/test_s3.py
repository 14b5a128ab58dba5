"""Rows and tables in an S3 bucket, by a server of this machine: needs s3fs and moto[server]."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup import cli
from snipdedup.features.shards import open_features
from snipdedup.storage import atomic, remote
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
