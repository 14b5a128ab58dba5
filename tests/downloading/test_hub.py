"""The hub's own client against a stand-in for its API: listings, commits, tokens, refusals."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import Hub, Server, kill_once_more_came

from snipdedup import cli
from snipdedup.config import Download
from snipdedup.downloading import hub
from snipdedup.downloading import run as download
from snipdedup.errors import MissingError, SnipError, UsageError
from snipdedup.storage import atomic, remote, web
from snipdedup.storage.out_folder import read_manifest

SIZES = [30, 7, 50, 21, 40]
STARTS = np.cumsum([0, *SIZES])
TOKEN = "hf_hushhushhush"
PARTS = [f"part-{number:05d}-5114fd87.snappy.parquet" for number in range(len(SIZES))]
SOURCE = "hf://datasets/someone/pictures"


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"url": [f"u{row}" for row in rows]}), sink)
    return sink.getvalue().to_pybytes()


def set_files(folder="", begin=0):
    """A set of five uneven parquet files, in a folder of a repository."""
    prefix = folder + "/" if folder else ""
    return {
        prefix + name: parquet(range(begin + first, begin + first + rows))
        for name, first, rows in zip(PARTS, STARTS, SIZES, strict=False)
    }


@pytest.fixture
def running(monkeypatch, tmp_path):
    """The hub, and beside it the server that its files are on."""
    monkeypatch.setattr(remote, "BACKOFF_S", 0.0)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Server() as files, Hub(files) as api:
        monkeypatch.setenv("HF_ENDPOINT", api.url)
        api.tree = {"README.md": b"# pictures", **set_files()}
        api.small = {"README.md"}
        yield api


def fetch(source, out, **more):
    return str(download.run(Download(source=str(source), out=str(out), **more)))


def urls(out):
    return [u for p in sorted(out.glob("*.parquet")) for u in pq.read_table(p)["url"].to_pylist()]


@pytest.mark.parametrize(
    ("address", "kind", "repo", "path", "revision"),
    [
        ("hf://datasets/o/n", "dataset", "o/n", "", None),
        ("hf://datasets/o/n/", "dataset", "o/n", "", None),
        ("hf://datasets/o/n.v2/a/b@main", "dataset", "o/n.v2", "a/b", "main"),
        ("hf://datasets/o/n@v1/a/b", "dataset", "o/n", "a/b", "v1"),
        ("hf://datasets/o/n@refs/convert/parquet/a", "dataset", "o/n", "a", "refs/convert/parquet"),
        ("hf://datasets/o/n/a@refs/pr/3", "dataset", "o/n", "a", "refs/pr/3"),
        ("hf://models/o/n/encoder", "model", "o/n", "encoder", None),
        ("hf://o/n", "model", "o/n", "", None),
    ],
)
def test_addresses(address, kind, repo, path, revision):
    place = hub.parse_address(address)
    assert (place.kind, place.repo, place.path, place.revision) == (kind, repo, path, revision)


@pytest.mark.parametrize("address", ["hf://datasets/o", "hf://o", "hf://datasets/o/n@a/b@c"])
def test_what_is_no_address(address):
    with pytest.raises(UsageError, match="expected hf://datasets/OWNER/NAME"):
        hub.parse_address(address)


@pytest.mark.parametrize("folder", ["", "metadata", "deep/er"])
def test_a_set_is_listed_pinned_and_proved(running, tmp_path, folder):
    running.tree = {"README.md": b"# pictures", **set_files(folder)}
    source = f"{SOURCE}/{folder}" if folder == "deep/er" else SOURCE
    said = fetch(source, tmp_path / "out")
    assert "148 of 148 rows kept in 5 files" in said
    for path, body in set_files(folder).items():
        assert (tmp_path / "out" / path.rpartition("/")[2]).read_bytes() == body
    manifest = read_manifest(tmp_path / "out", "download")
    assert manifest["revision"] == "a" * 40
    assert [file["number"] for file in manifest["files"]] == [None] * 5
    assert f"/resolve/{'a' * 40}/" in manifest["files"][0]["source"]
    asked = len(running.asked)
    assert "finished already" in fetch(source, tmp_path / "out")
    assert len(running.asked) == asked  # nobody was asked again


def test_a_range_lands_at_its_rows(running, tmp_path):
    mask = np.random.default_rng(0).random(STARTS[-1]) < 0.4
    np.save(tmp_path / "mask.npy", mask)
    fetch(SOURCE, tmp_path / "all", is_dup=str(tmp_path / "mask.npy"))
    assert urls(tmp_path / "all") == [f"u{row}" for row in np.flatnonzero(~mask)]
    fetch(SOURCE, tmp_path / "out", start=3, end=5, is_dup=str(tmp_path / "mask.npy"))
    stay = np.flatnonzero(~mask)
    assert urls(tmp_path / "out") == [f"u{row}" for row in stay[stay >= STARTS[3]]]
    for number in (3, 4):
        name = PARTS[number]
        part, whole = (pq.read_table(tmp_path / folder / name) for folder in ("out", "all"))
        assert part.equals(whole)
    spans = {name.rpartition("/")[2]: h.get("Range") for name, h in running.store.asked}
    assert set(spans) == set(PARTS)


def test_masks_and_templates_of_a_hub(running, tmp_path):
    mask = np.random.default_rng(1).random(STARTS[-1]) < 0.4
    np.save(tmp_path / "is_dup.npy", mask)
    running.tree["clean/is_dup.npy"] = (tmp_path / "is_dup.npy").read_bytes()
    template = f"{SOURCE}/part-{{part:05d}}-5114fd87.snappy.parquet"
    specs = [f"{SOURCE}/clean/is_dup.npy", f"{SOURCE}/clean", f"{SOURCE}/clean@main"]
    specs += [f"{SOURCE}@main/clean/is_dup.npy"]
    for number, spec in enumerate(specs):
        out = tmp_path / f"out{number}"
        fetch(template, out, start=1, end=3, is_dup=spec)
        stay = np.flatnonzero(~mask[: STARTS[3]])
        assert urls(out) == [f"u{row}" for row in stay[stay >= STARTS[1]]]
    running.tree["metadata/a"] = b""
    with pytest.raises(MissingError, match=r"pictures@a+/metadata has no is_dup\.npy"):
        fetch(template, tmp_path / "two", end=1, is_dup=f"{SOURCE}/metadata")
    del running.tree["metadata/a"]
    with pytest.raises(MissingError, match="has no part-00006-5114fd87"):
        fetch(template, tmp_path / "two", start=6, end=8)
    np.save(tmp_path / "is_dup.npy", np.append(mask, False))
    with pytest.raises(SnipError, match=r"148 rows in 5 files, the mask .* has 149"):
        fetch(SOURCE, tmp_path / "two", is_dup=str(tmp_path / "is_dup.npy"))
    assert not (tmp_path / "two").exists()


def test_a_stopped_run_keeps_its_commit(running, tmp_path):
    running.store.faults[f"{'a' * 40}/{PARTS[3]}"] = 500
    with pytest.raises(SnipError, match="500"):
        fetch(SOURCE, tmp_path / "out", jobs=1)
    running.store.faults.clear()
    running.push("b" * 40, set_files(begin=1000))
    fetch(SOURCE, tmp_path / "out")
    assert urls(tmp_path / "out") == [f"u{row}" for row in range(STARTS[-1])]
    assert read_manifest(tmp_path / "out", "download")["revision"] == "a" * 40
    fetch(SOURCE, tmp_path / "out", overwrite=True)
    assert urls(tmp_path / "out") == [f"u{row}" for row in range(1000, 1000 + STARTS[-1])]
    fetch(f"{SOURCE}@{'a' * 40}", tmp_path / "old", end=1)
    assert urls(tmp_path / "old") == [f"u{row}" for row in range(SIZES[0])]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("gated", "it is gated: open http.*/datasets/someone/pictures in a browser.*hf auth login"),
        ("disabled", "disabled by its owner or the host"),
        ("missing", "the hub has no such dataset; check the name"),
        ("moved", "has moved to someone/else: give hf://datasets/someone/else"),
    ],
)
def test_each_state_of_a_repository_has_its_error(running, tmp_path, state, message):
    running.state = state
    with pytest.raises(SnipError, match=message) as caught:
        fetch(SOURCE, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_set_whose_files_alone_are_gated(running, tmp_path):
    running.state = "gated files"
    with pytest.raises(SnipError, match=r"gated: open http\S*/datasets/someone/pictures in a br"):
        fetch(SOURCE, tmp_path / "out")
    running.state = None  # the form is filled in
    fetch(SOURCE, tmp_path / "out")
    assert urls(tmp_path / "out") == [f"u{row}" for row in range(STARTS[-1])]


def test_other_faults_of_the_api(running, tmp_path):
    api = "api/datasets/someone/pictures"
    with pytest.raises(MissingError, match="has no revision 'v9'"):
        fetch(f"{SOURCE}@v9", tmp_path / "out")
    with pytest.raises(MissingError, match="has no 'nowhere'"):
        fetch(f"{SOURCE}/nowhere", tmp_path / "out")
    running.faults[api] = [500, (429, {"Retry-After": "0"})]
    fetch(SOURCE, tmp_path / "out", end=1)
    running.faults[api] = (429, {"Retry-After": "7200"})
    with pytest.raises(SnipError, match=r"the hub says 429.*\(it asks to wait 7,200 s\)"):
        fetch(SOURCE, tmp_path / "two")
    running.faults[api] = 418
    with pytest.raises(SnipError, match="the hub says 418"):
        fetch(SOURCE, tmp_path / "three")


def test_a_cause_that_the_client_hides_is_found(running):
    from huggingface_hub import errors

    running.state = "disabled"
    place = hub.parse_address(SOURCE)

    def ask(client):
        try:
            client.repo_info("someone/pictures", repo_type="dataset")
        except errors.DisabledRepoError as error:
            raise errors.LocalEntryNotFoundError("not in the cache") from error

    with pytest.raises(SnipError, match="disabled by its owner"):
        hub.ask_hub(place, ask)


@pytest.mark.parametrize("damaged", [True, False])
def test_files_that_git_holds_are_proved_too(running, tmp_path, damaged):
    running.small = set(running.tree)
    name = f"{'a' * 40}/{PARTS[0]}"
    running.store.faults[name] = "damage" if damaged else None
    if damaged:
        with pytest.raises(SnipError, match="wrong checksum: expected git_sha1"):
            fetch(SOURCE, tmp_path / "out", end=1)
    else:
        fetch(SOURCE, tmp_path / "out", end=1)


def test_a_wrong_file_of_a_hub_is_refused(running, tmp_path):
    running.store.faults[f"{'a' * 40}/{PARTS[2]}"] = "damage"
    wanted = hashlib.sha256(set_files()[PARTS[2]]).hexdigest()
    with pytest.raises(SnipError, match=f"wrong checksum: expected sha256 {wanted}"):
        fetch(SOURCE, tmp_path / "out", jobs=1)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_three_kills_of_the_process(running, tmp_path):
    rng = np.random.default_rng(0)
    tree = {}
    for name, count in zip(PARTS, (900, 300, 1500, 640, 1200), strict=True):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"noise": pa.array(rng.random((count, 40)).tolist())}), sink)
        tree[name] = sink.getvalue().to_pybytes()
    running.tree, out = tree, tmp_path / "out"
    words = [sys.executable, "-m", "snipdedup", "download", SOURCE, str(out), "--jobs", "2"]
    words += ["--start", "3", "--end", "5"]
    running.store.pause = 0.02
    for _ in range(3):
        kill_once_more_came(words, out, 60_000)
        assert not (out / "snip.json").exists()
        assert list(out.glob("*.parquet")) == []
    running.store.pause = 0
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert TOKEN not in done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir()) == [*PARTS[3:], "snip.json"]
    for name in PARTS[3:]:
        assert (out / name).read_bytes() == tree[name]


def test_the_token_goes_to_the_hub_alone_and_stays_unsaid(running, tmp_path, snip):
    running.state, running.token = "gated", TOKEN
    done = snip("download", SOURCE, tmp_path / "out", "--end", 2)
    ours = [headers for name, headers in running.asked if "someone/pictures" in name]
    assert {headers.get("Authorization") for headers in ours} == {f"Bearer {TOKEN}"}
    assert any("/resolve/" in name for name in running.names())
    assert running.store.asked
    assert not any("Authorization" in headers for _, headers in running.store.asked)
    said = done.stdout + done.stderr
    for path in (tmp_path / "out").rglob("*"):
        said += path.read_bytes().decode("latin1") if path.is_file() else ""
    assert TOKEN not in said
    assert "hush" not in said  # nor what the hub signed its redirects with
    assert TOKEN not in repr(hub.list_repository(hub.pin(SOURCE))[0])


def test_a_token_stays_behind_where_a_redirect_leaves(running):
    token = web.Token(web.origin_of(running.url), TOKEN)
    running.store.files["a.bin"] = b"there"
    with Server() as elsewhere:
        elsewhere.faults["a.bin"] = (302, {"Location": f"{running.store.url}/a.bin"})
        stream = remote.open_stream(f"{elsewhere.url}/a.bin", token=token)
        assert b"".join(stream.chunks) == b"there"
        assert "Authorization" not in elsewhere.asked[0][1]
    assert "Authorization" not in running.store.asked[0][1]


def test_without_a_login_no_token_is_sent(running, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    fetch(SOURCE, tmp_path / "out", end=1)
    assert not any("Authorization" in headers for _, headers in running.asked)
    running.state = "missing"
    with pytest.raises(MissingError, match="or it is private: log in with: hf auth login"):
        fetch(SOURCE, tmp_path / "two")


def test_several_folders_must_be_told_apart(running, tmp_path):
    running.tree = {**set_files("en"), **set_files("multi"), "README.md": b"two sets"}
    with pytest.raises(SnipError, match="several folders with such: en, multi; name the folder"):
        fetch(SOURCE, tmp_path / "out")
    fetch(f"{SOURCE}/multi", tmp_path / "out", end=1)
    running.tree = {"README.md": b"nothing"}
    with pytest.raises(SnipError, match="found none"):
        fetch(SOURCE, tmp_path / "two")


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SnipError, match=r"pip install 'snipdedup-toolkit\[hub\]'"):
        hub.pin(SOURCE)


def test_datacomp_from_the_hub_to_its_own_list_of_uids(running, tmp_path):
    rng = np.random.default_rng(3)
    running.tree, uids, rows = {"README.md": b"# small pool"}, {}, {}
    pictures = rng.standard_normal((60, 24))
    for size in (90, 40, 110):
        name = rng.bytes(16).hex()
        uids[name] = [rng.bytes(16).hex() for _ in range(size)]
        rows[name] = pictures[rng.integers(0, 60, size)] + 0.01 * rng.standard_normal((size, 24))
        texts = [f"a picture {row}" for row in range(size)]
        table = pa.table({"uid": uids[name], "url": uids[name], "text": texts})
        atomic.save_parquet(tmp_path / "a.parquet", table)
        arrays = {"b32_img": rng.standard_normal((size, 8)), "l14_img": rows[name]}
        atomic.save_npz(tmp_path / "a.npz", **{k: v.astype(np.float16) for k, v in arrays.items()})
        running.tree[f"{name}.parquet"] = (tmp_path / "a.parquet").read_bytes()
        running.tree[f"{name}.npz"] = (tmp_path / "a.npz").read_bytes()
    pool, clean = tmp_path / "pool", tmp_path / "clean"
    assert cli.run(["download", SOURCE, str(pool), "--embeddings"]) == 0
    words = ["dedup", str(pool), "--array", "l14_img", "--out", str(clean)]
    assert cli.run([*words, "--export", "datacomp"]) == 0
    (found,) = list(clean.rglob("datacomp.npy"))
    exported = np.load(found)
    # what DataComp's own scripts do with a uid: two numbers of 16 hex digits, sorted
    order = sorted(uids)
    unit = np.concatenate([rows[name].astype(np.float16).astype(np.float64) for name in order])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    pair = (unit @ unit.T).astype(np.float32) >= np.float32(0.95)
    stays = []
    for row in range(len(pair)):
        if not pair[row, stays].any():
            stays.append(row)
    assert len(stays) == 60
    names = [uid for name in order for uid in uids[name]]
    wanted = [(int(names[row][:16], 16), int(names[row][16:], 16)) for row in stays]
    wanted = np.array(wanted, np.dtype("u8,u8"))
    wanted.sort()
    assert exported.dtype == np.dtype("u8,u8")
    np.testing.assert_array_equal(exported, wanted)


def test_features_of_a_hub(running, tmp_path):
    rng = np.random.default_rng(0)
    metadata = {f"metadata/{name}": body for name, body in set_files().items()}
    running.tree = dict(metadata)
    for number, size in enumerate(SIZES):
        np.save(tmp_path / "a.npy", rng.standard_normal((size, 4)).astype(np.float16))
        running.tree[f"img_emb/img_emb_{number:04d}.npy"] = (tmp_path / "a.npy").read_bytes()
    elsewhere = f"{SOURCE}/img_emb/img_emb_{{part:04d}}.npy"
    for number, more in enumerate(({"embeddings": True}, {"embeddings_source": elsewhere})):
        out = tmp_path / f"out{number}"
        said = fetch(SOURCE, out, start=1, end=3, **more)
        assert "57 of 57 rows kept in 2 files (0 removed, 0.0%), with features of 2 files" in said
        for index in (1, 2):
            body = running.tree[f"img_emb/img_emb_{index:04d}.npy"]
            assert (out / "img_emb" / f"img_emb_{index:04d}.npy").read_bytes() == body
            name = f"metadata/{PARTS[index]}"
            assert (out / name).read_bytes() == metadata[name]
