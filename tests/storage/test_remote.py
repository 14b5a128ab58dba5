"""Rows and tables elsewhere: the same bits as from a disk, by ranges, through faults."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import Server

from snipdedup import cli
from snipdedup.errors import InputError, SnipError, TemporaryError, UsageError
from snipdedup.features import shards
from snipdedup.features.hashing import shard_checksum
from snipdedup.features.shards import open_features
from snipdedup.metadata.tables import open_metadata
from snipdedup.storage import remote
from snipdedup.storage.out_folder import MANIFEST
from snipdedup.storage.remote import RemotePath

fsspec = pytest.importorskip("fsspec")

ROWS = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)
ROWS[2000:] = ROWS[:1000] + 0.01 * ROWS[1000:2000]
UIDS = np.arange(len(ROWS))


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF_S", 0.0)


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Features, metadata and a mask on the disk."""
    monkeypatch.chdir(tmp_path)
    for name in ("set/img_emb", "set/metadata", "kinds"):
        (tmp_path / name).mkdir(parents=True)
    for number, part in ((2, slice(0, 1700)), (10, slice(1700, 3000))):
        np.save(f"set/img_emb/img_emb_{number}.npy", ROWS[part])
        table = {"uid": [f"u{uid}" for uid in UIDS[part]], "width": UIDS[part] % 7}
        pq.write_table(pa.table(table), f"set/metadata/metadata_{number}.parquet",
                       row_group_size=400)  # fmt: skip
    np.savez("kinds/a.npz", img=ROWS[:500])
    pq.write_table(pa.table({"v": list(ROWS[500:1000])}), "kinds/b.parquet", row_group_size=99)
    np.save("kinds/c.npy", ROWS[1000:1200].astype(np.float16))
    (tmp_path / "kinds" / "d.csv").write_text("uid\n" + "".join(f"{n}\n" for n in range(500)))
    return tmp_path


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def memory(local):
    """The same files in fsspec's memory; the URL of their folder."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    for name, data in files_of(local).items():
        system.pipe_file(f"/bucket/{name}", data)
    yield "memory://bucket"
    system.store.clear()


@pytest.fixture
def server(local):
    """The same files on a web server."""
    with Server() as served:
        served.files = files_of(local)
        yield served


def run(*words):
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in words])
    return left.value.code or 0


def said(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def places(memory, server):
    """Return where the files of a name lie, a pattern of features and its parts."""
    return {"memory": memory, "web": server.url}


@pytest.mark.parametrize("where", ["memory", "web"])
@pytest.mark.parametrize("name", ["a.npz", "b.parquet", "c.npy"])
def test_rows_of_every_format(memory, server, monkeypatch, where, name):
    """Small ranges, so that blocks and gathers take many."""
    part = 20_000
    monkeypatch.setattr(remote, "RANGE_BYTES", part)
    monkeypatch.setattr(remote, "GAP_BYTES", 2000)
    here = open_features(f"kinds/{name}")
    there = open_features(f"{places(memory, server)[where]}/kinds/{name}")
    assert (there.rows, there.dim, there.dtype) == (here.rows, here.dim, here.dtype)
    assert np.array_equal(there.read(0, there.rows), here.read(0, here.rows))
    assert np.array_equal(there.read(17, 18), here.read(17, 18))
    rng = np.random.default_rng(1)
    for size in (1, 5, 40):
        rows = rng.integers(0, here.rows, size)
        assert np.array_equal(there.gather(rows), here.gather(rows))
    assert shard_checksum(there.shards[0]) == shard_checksum(here.shards[0])


def test_ranges_join_neighbours_and_no_more():
    def cuts(rows, row_bytes):
        return list(remote.plan_ranges(np.array(rows, np.int64), row_bytes))

    rows, gap, most = [0, 1, 5, 6, 100, 101, 103, 500], remote.GAP_BYTES, remote.RANGE_BYTES
    assert cuts(rows, gap // 4) == cuts(rows, gap // 3) == [(0, 4), (4, 7), (7, 8)]
    assert cuts(rows, gap // 2) == [(0, 2), (2, 4), (4, 7), (7, 8)]
    assert cuts(range(10), most // 4) == [(0, 4), (4, 8), (8, 10)]
    assert cuts(range(3), 2 * most) == [(0, 1), (1, 2), (2, 3)]
    assert cuts([], 64) == []


def test_what_a_url_means(memory, monkeypatch):
    names = ["img_emb_2.npy", "img_emb_10.npy"]
    for spec in ("set/img_emb", "set/img_emb/", "set", "set/img_emb/*.npy"):
        assert [path.name for path in open_features(f"{memory}/{spec}").paths()] == names
    pattern = f"{memory}/set/img_emb/img_emb_{{part}}.npy"
    assert [p.name for p in open_features(pattern, parts="2:3").paths()] == names[:1]
    assert [p.name for p in open_metadata(f"{memory}/set/metadata").paths()] == [
        "metadata_2.parquet", "metadata_10.parquet",
    ]  # fmt: skip
    assert open_metadata(f"{memory}/kinds/d.csv").rows == 500
    assert str(shards.implied_metadata(f"{memory}/set")) == f"{memory}/set/metadata"
    assert shards.implied_metadata(f"{memory}/set/img_emb") is None


def test_a_path_elsewhere_is_a_path(memory):
    path = RemotePath(f"{memory}/set/img_emb/img_emb_2.npy")
    assert (path.name, path.stem, path.suffix) == ("img_emb_2.npy", "img_emb_2", ".npy")
    assert str(path) == f"{memory}/set/img_emb/img_emb_2.npy"
    assert str(path.parent) == f"{memory}/set/img_emb"
    assert path == pickle.loads(pickle.dumps(path))
    assert path.resolve() == path.absolute() == path.expanduser() == path
    assert path != RemotePath(f"{memory}/set/img_emb/img_emb_10.npy")
    secret = RemotePath("https://me:word@host/a.npy?sig=abc")
    assert (str(secret), secret.name) == ("https://host/a.npy", "a.npy")
    assert "word" not in repr(secret)
    assert "abc" not in repr(secret)
    assert pickle.loads(pickle.dumps(secret)).url == secret.url


COMMANDS = {
    "dedup": "dedup {set} --threads 2 --pairs --keep max:width --out {out}",
    "dedup, exact": "dedup {set}/img_emb --metadata {set}/metadata --method exact --out {out}",
    "reference": "dedup {kinds}/c.npy --reference {set}/img_emb/img_emb_2.npy --out {out}",
    "train": "train {set} --dim 4 --hidden 8 --steps 8 --batch 64 --threads 1 --out {out}",
    "index": "index {set} --m 4 --nlist 8 --out {out}",
    "filter": "filter {set}/metadata --is_dup clean --embeddings {set}/img_emb --out {out}",
}


def results(folder):
    files = files_of(folder)
    return {name: data for name, data in files.items() if not name.endswith((".json", ".md"))}


SLOW = [pytest.mark.slow]  # of a training, on a busy machine


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW if name == "train" else []) for name in COMMANDS]
)
def test_commands_write_the_same_bits(memory, local, name):
    words = COMMANDS[name].split()
    if name == "filter":
        assert run("dedup", "set", "--out", "clean") == 0
    for root, out in ((".", "here"), (memory, "there")):
        known = {"set": f"{root}/set", "kinds": f"{root}/kinds", "out": out}
        assert run(*(word.format(**known) for word in words)) == 0
        made = (local / out / MANIFEST).stat().st_mtime_ns
        assert run(*(word.format(**known) for word in words)) == 0  # finished already
        assert (local / out / MANIFEST).stat().st_mtime_ns == made
    here, there = results(local / "here"), results(local / "there")
    if name == "reference":  # the tables name it as it was given
        here, there = ({"is_dup.npy": found["is_dup.npy"]} for found in (here, there))
    assert here == there
    manifests = [json.loads((local / out / MANIFEST).read_text()) for out in ("here", "there")]
    assert manifests[0].get("shards") == manifests[1].get("shards")  # name, size, rows, CRC32


def test_a_finished_run_over_urls_is_looked_at(memory, local, capsys):
    assert run("dedup", f"{memory}/set", "--out", "out") == 0
    assert run("index", f"{memory}/set", "--m", "4", "--nlist", "8", "--out", "idx") == 0
    for words in (
        "audit out", f"audit out {memory}/set", "dedup out --threshold .97 --out higher",
        "search 5 --index idx", "report out", "filter {0}/set/metadata --is_dup out --out kept",
    ):  # fmt: skip
        capsys.readouterr()
        assert run(*words.format(memory).split()) == 0
    assert "reach" in (run("audit", "out"), capsys.readouterr().out)[1]
    manifest = json.loads((local / "out" / MANIFEST).read_text())
    assert manifest["settings"]["features"] == f"{memory}/set"
    # descriptors elsewhere are known as such
    assert run("train", "set", "--dim", "4", "--steps", "8", "--threads", "1", "--out", "enc") == 0
    assert run("compress", f"{memory}/set", "--encoder", "enc", "--out", "short") == 0
    for name, data in files_of(local / "short").items():
        fsspec.filesystem("memory").pipe_file(f"/bucket/short/{name}", data)
    for source, out in (("short", "a"), (f"{memory}/short", "b")):
        assert run("index", source, "--m", "2", "--nlist", "8", "--out", out) == 0
    assert results(local / "a") == results(local / "b")


def test_over_http(server, local, capsys):
    spec = f"{server.url}/set/img_emb/img_emb_{{part}}.npy"
    server.files["set/img_emb/img_emb_3.npy"] = server.files.pop("set/img_emb/img_emb_10.npy")
    assert run("dedup", "set/img_emb", "--out", "here") == 0
    assert run("dedup", spec, "--parts", "2:4", "--out", "there") == 0
    assert (local / "here/is_dup.npy").read_bytes() == (local / "there/is_dup.npy").read_bytes()
    assert run("dedup", spec, "--parts", "2:4", "--out", "there") == 0
    assert "finished already" in capsys.readouterr().out
    assert run("audit", "there", spec, "--parts", "2:4") == 0
    assert all(span for name in set(server.names()) for span in server.spans(name))  # ranges only
    url = f"{server.url}/set/img_emb/img_emb_2.npy?signature=secret"
    meta = f"{server.url}/set/metadata/metadata_2.parquet?signature=secret"
    assert run("dedup", url, "--metadata", meta, "--out", "signed") == 0
    assert b"secret" not in (local / "signed" / MANIFEST).read_bytes()
    assert run("index", url, "--m", "4", "--nlist", "8", "--out", "idx") == 0
    assert b"secret" not in (local / "idx" / MANIFEST).read_bytes()


# ---- faults


def failing(monkeypatch, times, error):
    """Let every fetch of rows fail so many times."""
    whole, left = remote.request_range, {}

    def ask(url, begin, *rest):
        left[url, begin] = left.get((url, begin), times) - 1
        if left[url, begin] >= 0:
            raise error
        return whole(url, begin, *rest)

    monkeypatch.setattr(remote, "request_range", ask)


def test_a_connection_that_is_lost_for_a_while(memory, local, monkeypatch):
    assert run("dedup", "set", "--out", "here") == 0
    failing(monkeypatch, 3, TemporaryError("lost"))
    assert run("dedup", f"{memory}/set", "--out", "there") == 0
    assert results(local / "here") == results(local / "there")


def test_a_connection_that_is_lost_for_good(memory, local, monkeypatch, capsys):
    system = fsspec.filesystem("memory")
    whole = type(system).cat_file

    def cat_file(self, path, start=None, end=None, **more):
        if end and end > 90_000:
            raise ConnectionResetError("reset by peer")
        return whole(self, path, start=start, end=end, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "cat_file", cat_file)
        assert run("dedup", f"{memory}/set", "--out", "out") == 1
    last = said(capsys)
    assert "img_emb_2.npy: cannot be read: reset by peer" in last
    assert "(tried 6 times)" in last
    assert not (local / "out" / MANIFEST).exists()
    assert run("dedup", f"{memory}/set", "--out", "out") == 0
    assert run("dedup", "set", "--out", "here") == 0
    assert results(local / "here") == results(local / "out")


def test_errors_with_a_name_of_the_stores_own(memory, monkeypatch):
    class ClientPayloadError(Exception):
        pass

    failing_once = [ClientPayloadError("not all data came"), None]
    system = fsspec.filesystem("memory")
    whole = type(system).cat_file

    def cat_file(self, *given, **named):
        error = failing_once.pop(0) if failing_once else None
        if error is not None:
            raise error
        return whole(self, *given, **named)

    monkeypatch.setattr(type(system), "cat_file", cat_file)
    features = open_features(f"{memory}/kinds/c.npy")
    assert np.array_equal(features.read(0, 200), ROWS[1000:1200].astype(np.float16))


@pytest.mark.parametrize("fault", [503, (429, {"Retry-After": "0"}), "cut", "moved"])
def test_faults_of_a_web_server(server, fault):
    features = open_features(f"{server.url}/kinds/c.npy")
    server.faults["kinds/c.npy"] = [fault, fault, None]
    assert np.array_equal(features.read(0, 200), ROWS[1000:1200].astype(np.float16))


@pytest.mark.parametrize(
    ("status", "text"),
    [(403, "403"), (404, "no such file"), (401, "401"), (503, "(tried 6 times)")],
)
def test_a_web_server_that_refuses(server, capsys, local, status, text):
    server.faults["set/img_emb/img_emb_2.npy"] = status
    assert run("dedup", f"{server.url}/set/img_emb/img_emb_2.npy", "--out", "out") == 1
    last = said(capsys)
    assert text in last
    assert "img_emb_2.npy" in last
    assert not (local / "out").exists()


def test_a_web_server_without_ranges(server, capsys, local):
    server.ranges = False
    assert run("dedup", f"{server.url}/set/img_emb/img_emb_2.npy", "--out", "out") == 1
    assert "cannot be read in parts: the server sends whole files only: fetch it first" in said(
        capsys
    )
    assert not (local / "out").exists()
    asked = len(server.asked)
    assert asked == 1  # not the whole of it, time and again


def test_a_web_server_is_not_listed(server, capsys):
    for spec in ("set/img_emb", "set/img_emb/*.npy"):
        assert run("dedup", f"{server.url}/{spec}", "--out", "out") == 2
        assert "a web server does not list its files" in said(capsys)


def test_what_is_not_there(memory, capsys, local):
    for spec, text in (
        ("nothing", "no such file"), ("set/img_emb/x.npy", "no such file"),
        ("set/img_emb/x*.npy", "no shard found: nothing matches"),
        ("set/metadata", "expected one list column of floats"),
    ):  # fmt: skip
        assert run("dedup", f"{memory}/{spec}", "--out", "out") == 1
        last = said(capsys)
        assert text in last
        assert "memory://" in last
    assert run("dedup", f"{memory}/set", "--metadata", f"{memory}/nothing", "--out", "out") == 1
    assert "no such file" in said(capsys)
    pattern = f"{memory}/set/img_emb/img_emb_{{part}}.npy"
    assert run("dedup", pattern, "--parts", "2:5", "--out", "out") == 1
    assert "img_emb_3.npy (2 of 3 are missing)" in said(capsys)
    assert run("dedup", pattern, "--out", "out") == 2
    assert run("dedup", f"{memory}/set", "--parts", "2:5", "--out", "out") == 2
    assert not (local / "out").exists()


def test_what_may_not_be_read(memory, monkeypatch, capsys):
    def refuse(self, path, **more):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", refuse)
    assert run("dedup", f"{memory}/set", "--out", "out") == 1
    assert "not permitted: log in with the store's own tool" in said(capsys)


def test_a_compressed_archive_is_refused(memory):
    with fsspec.open(f"{memory}/kinds/z.npz", "wb") as file:
        np.savez_compressed(file, x=ROWS)
    with pytest.raises(InputError, match=r"z\.npz: compressed, so .* fetch it first, or save it"):
        open_features(f"{memory}/kinds/z.npz")


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY\1\0", b"not one", b"PK\3\4" + bytes(50)])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".parquet", ".csv"])
def test_damaged_files(memory, data, suffix):
    fsspec.filesystem("memory").pipe_file(f"/bucket/x{suffix}", data)
    with pytest.raises(SnipError, match=f"x{suffix}: "):
        open_features(f"{memory}/x{suffix}")
    if suffix in (".parquet", ".csv") and data != b"not one":
        with pytest.raises(SnipError, match=f"x{suffix}: "):
            open_metadata(f"{memory}/x{suffix}")


def test_an_object_that_changes(memory, local, monkeypatch, capsys):
    assert run("dedup", f"{memory}/set", "--out", "out") == 0
    fsspec.filesystem("memory").pipe_file(
        "/bucket/set/metadata/metadata_2.parquet",
        (local / "set/metadata/metadata_2.parquet").read_bytes(),
    )
    assert run("dedup", f"{memory}/set", "--out", "out") == 1
    assert "holds a finished run with other metadata" in said(capsys)
    from snipdedup.deduplication import run as dedup_run

    original = dedup_run.write_files

    def change(*given, **named):
        found = original(*given, **named)
        data = (local / "set/img_emb/img_emb_10.npy").read_bytes()
        fsspec.filesystem("memory").pipe_file("/bucket/set/img_emb/img_emb_10.npy", data)
        return found

    monkeypatch.setattr(dedup_run, "write_files", change)
    assert run("dedup", f"{memory}/set", "--out", "new") == 1
    assert "img_emb_10.npy: changed while it was read; run it again" in said(capsys)
    assert not (local / "new").exists()


def test_another_version_on_a_web_server(server):
    features = open_features(f"{server.url}/kinds/c.npy")
    data = bytearray(server.files["kinds/c.npy"])
    data[-1] ^= 1
    server.files["kinds/c.npy"] = bytes(data)
    with pytest.raises(InputError, match=r"c\.npy: changed while it was read"):
        features.read(0, 200)


def test_without_the_store_s_own_package(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    assert run("dedup", "gs://bucket/set", "--out", "out") == 1
    assert said(capsys).startswith("snip: gs:// needs one more package: ")
    with pytest.raises(SnipError, match="expected a local path or a URL"):
        open_features("nowhere://x/a.npy")


def test_nothing_is_written_over_an_input(memory):
    with pytest.raises(UsageError):
        open_features(f"{memory}/set/img_emb/img_emb_{{part}}.npy")


def test_an_out_in_a_store(memory, capsys, tmp_path):
    system = fsspec.filesystem("memory")
    for name in ("snip.json", "is_dup.npy"):
        system.pipe_file(f"/bucket/clean/{name}", b"{}")
    for words in (
        ["dedup", f"{memory}/clean"],
        ["dedup", "kinds/a.npz", "--reference", f"{memory}/clean"],
    ):
        assert run(*words, "--out", "out") == 2
        assert f"what snip dedup wrote; fetch it first: snip download {memory}/clean" in said(
            capsys
        )
    assert not (tmp_path / "out").exists()
