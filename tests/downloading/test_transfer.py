"""One file, whole and proved or not at all: whatever the server does, however often killed."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from servers import Server

from snipdedup import progress
from snipdedup.downloading import transfer
from snipdedup.downloading.transfer import Monitor, SourceFile, fetch_file
from snipdedup.errors import MissingError, SnipError, TemporaryError
from snipdedup.storage import atomic, remote, web

BODY = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
SHA = hashlib.sha256(BODY).hexdigest()
NAME = "m.bin"


@pytest.fixture
def server():
    with Server() as running:
        running.files[NAME] = BODY
        yield running


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Wait for nothing; return what would have been waited."""
    waited = []
    monkeypatch.setattr(Monitor, "pause", lambda self, seconds, why: waited.append(seconds))
    return waited


def file(server, **known):
    return SourceFile(f"{server.url}/{NAME}", **known)


def alone(tmp_path):
    """The names in the folder, hidden ones too."""
    return sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("known", [{}, {"size": len(BODY), "sha256": SHA}])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("etags", [True, False])
@pytest.mark.parametrize(
    "faults", [[], ["cut"], ["cut", "cut", 500, "cut"], [503, (429, {"Retry-After": "3"})]]
)
def test_a_file_arrives_whatever_happens(server, tmp_path, known, ranges, etags, faults):
    server.ranges, server.etags, server.faults[NAME] = ranges, etags, list(faults)
    told = fetch_file(file(server, **known), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert told["size"] == len(BODY)
    assert alone(tmp_path) == [NAME]
    assert len(server.asked) == len(faults) + 1


def test_the_bar_learns_how_large_a_file_is(server, tmp_path):
    """A second try adds nothing to it."""
    server.faults[NAME] = ["cut"]
    with progress.bar(0, "download", "B") as bar:
        fetch_file(file(server), tmp_path / NAME, Monitor(bar))
        fetch_file(file(server, size=len(BODY)), tmp_path / "known", Monitor(bar))
        assert bar.total == len(BODY)


def test_what_came_is_not_asked_for_again(server, tmp_path):
    server.faults[NAME] = ["cut", "cut"]
    fetch_file(file(server), tmp_path / NAME)
    assert server.spans(NAME) == [None, "bytes=150000-", "bytes=225000-"]
    etag = server.asked[1][1]["If-Range"]
    assert etag == f'"{hashlib.md5(BODY).hexdigest()}"'


def test_without_a_version_nothing_is_pieced_together(server, tmp_path):
    server.etags, server.faults[NAME] = False, ["cut"]
    fetch_file(file(server), tmp_path / NAME)
    assert server.spans(NAME) == [None, None]


@pytest.mark.parametrize("deaf", [True, False])
def test_a_file_that_was_replaced_meanwhile_begins_anew(server, tmp_path, deaf):
    server.faults[NAME] = ["cut", "cut"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "ATTEMPTS", 1)
        with pytest.raises(TemporaryError, match="150,000 came"):
            fetch_file(file(server), tmp_path / NAME)
    assert alone(tmp_path) == [f".{NAME}.part", f".{NAME}.part.json"]
    server.files[NAME] = other = BODY[::-1]
    server.faults[NAME] = ["deaf"] if deaf else []
    fetch_file(file(server), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == other
    assert alone(tmp_path) == [NAME]


def test_retry_after_is_honoured(server, tmp_path, waits):
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 40))
    server.faults[NAME] = [
        (429, {"Retry-After": "7"}),
        (503, {"Retry-After": later}),
        (429, {"RateLimit": '"resolvers";r=0;t=19'}),
        500,
    ]
    fetch_file(file(server), tmp_path / NAME)
    assert waits[0] == 7
    assert 35 < waits[1] <= 40
    assert waits[2] == 19
    assert 0 < waits[3] < 60


def test_who_asks_for_too_long_a_wait_is_not_waited_for(server, tmp_path):
    server.faults[NAME] = (429, {"Retry-After": "7200"})
    with pytest.raises(TemporaryError, match=r"429 .*fewer requests.*\(it asks to wait 7,200 s\)"):
        fetch_file(file(server), tmp_path / NAME)
    assert len(server.asked) == 1


def test_only_faults_without_progress_count(server, tmp_path):
    server.faults[NAME] = ["cut"] * (remote.ATTEMPTS + 4)
    fetch_file(file(server), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == BODY
    server.faults[NAME] = [500] * remote.ATTEMPTS
    with pytest.raises(TemporaryError, match="500"):
        fetch_file(file(server), tmp_path / "two")
    assert alone(tmp_path) == [NAME]


def test_a_wrong_checksum_ends_the_run(server, tmp_path):
    server.faults[NAME] = "damage"
    with pytest.raises(SnipError, match=f"wrong checksum: expected sha256 {SHA}"):
        fetch_file(file(server, sha256=SHA), tmp_path / NAME)
    assert len(server.asked) == 1
    assert alone(tmp_path) == []


def test_pieces_with_a_wrong_checksum_are_fetched_once_more(server, tmp_path):
    server.faults[NAME] = ["cut"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "ATTEMPTS", 1)
        with pytest.raises(TemporaryError):
            fetch_file(file(server, sha256=SHA), tmp_path / NAME)
    part = tmp_path / f".{NAME}.part"
    part.write_bytes(b"\0" * 100_000)  # a machine that lost its power, say
    fetch_file(file(server, sha256=SHA), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert server.spans(NAME)[1:] == ["bytes=100000-", None]


def test_git_blobs_are_proved_too(server, tmp_path):
    blob = subprocess.run(
        ["git", "hash-object", "--stdin"], input=BODY, capture_output=True, check=True
    ).stdout.decode()
    fetch_file(file(server, git_sha1=blob.strip()), tmp_path / NAME)
    with pytest.raises(SnipError, match="wrong checksum: expected git_sha1"):
        fetch_file(file(server, git_sha1="0" * 40), tmp_path / "two")


@pytest.mark.parametrize("fault", [None, "short", "no_length"])
def test_another_length_than_was_listed(server, tmp_path, fault):
    server.faults[NAME] = fault
    size = len(BODY) + (0 if fault else 1)
    with pytest.raises(SnipError, match=r"expected 300,00. bytes, (the source has )?\d+,000"):
        fetch_file(file(server, size=size), tmp_path / NAME)
    assert NAME not in alone(tmp_path)


def test_a_whole_part_is_only_renamed(server, tmp_path):
    fetch_file(file(server), tmp_path / NAME)
    (tmp_path / NAME).rename(tmp_path / f".{NAME}.part")
    note = {"source": file(server).shown, "sha256": None, "git_sha1": None}
    atomic.save_json(tmp_path / f".{NAME}.part.json", {**note, "etag": '"e"', "total": len(BODY)})
    server.asked.clear()
    fetch_file(file(server), tmp_path / NAME)
    assert server.asked == []
    assert alone(tmp_path) == [NAME]


@pytest.mark.parametrize("known", [{}, {"size": 0, "sha256": hashlib.sha256().hexdigest()}])
def test_an_empty_file(server, tmp_path, known):
    server.files[NAME] = b""
    assert fetch_file(file(server, **known), tmp_path / NAME)["size"] == 0
    assert (tmp_path / NAME).read_bytes() == b""


def test_names_that_must_be_quoted(server, tmp_path):
    server.files["a b/\u00e9.bin"] = BODY
    for url in ("a b/\u00e9.bin", "a%20b/%C3%A9.bin"):
        fetch_file(SourceFile(f"{server.url}/{url}"), tmp_path / NAME)
        assert (tmp_path / NAME).read_bytes() == BODY


def test_a_part_of_another_source_is_not_gone_on_with(server, tmp_path):
    server.files["other"] = BODY[::-1]
    (tmp_path / f".{NAME}.part").write_bytes(BODY[:100])
    atomic.save_json(tmp_path / f".{NAME}.part.json", {"source": "elsewhere", "etag": '"e"'})
    fetch_file(SourceFile(f"{server.url}/other"), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == BODY[::-1]
    (tmp_path / f".{NAME}.part.json").write_text("not JSON")
    (tmp_path / f".{NAME}.part").write_bytes(BODY[:100])
    fetch_file(file(server), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == BODY


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (401, SnipError, "401 .*gated or private"),
        (403, SnipError, "403 .*gated or private"),
        ((403, {"X-Error-Code": "GatedRepo"}), SnipError, "it is gated: open http.*hf auth login"),
        ((403, {"X-Error-Message": "this is disabled."}), SnipError, "disabled by its owner"),
        (404, MissingError, "404 .*check the URL"),
        (410, MissingError, "410 .*check the URL"),
        (451, SnipError, "451 .*your country"),
        (418, SnipError, "418"),
        (204, SnipError, "expected status 200, found 204"),
        ("loop", SnipError, "302 .*it has moved"),
        ("nowhere", SnipError, "301 .*it has moved"),
        ("to_a_file", SnipError, "it has moved"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(server, tmp_path, fault, kind, message):
    server.faults[NAME] = fault
    with pytest.raises(kind, match=message) as caught:
        fetch_file(file(server), tmp_path / NAME)
    assert not isinstance(caught.value, TemporaryError)
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 1 or fault == "loop"
    assert alone(tmp_path) == []


def test_a_disk_that_is_full(server, tmp_path, monkeypatch):
    def fsync(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "os", SimpleNamespace(fsync=fsync))
        with pytest.raises(SnipError, match=r"cannot write .*m\.bin: No space left on device"):
            fetch_file(file(server), tmp_path / NAME)
    assert alone(tmp_path) == [f".{NAME}.part", f".{NAME}.part.json"]
    fetch_file(file(server), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == BODY


def test_a_host_that_does_not_exist_is_not_waited_for(tmp_path, waits):
    with pytest.raises(SnipError, match=r"cannot be reached.*check the URL"):
        fetch_file(SourceFile("http://no-such-host.invalid/m.bin"), tmp_path / NAME)
    assert waits == []


def test_local_files_and_other_stores(tmp_path):
    import fsspec

    (tmp_path / "from").mkdir()
    (tmp_path / "from" / NAME).write_bytes(BODY)
    fetch_file(SourceFile(str(tmp_path / "from" / NAME), size=len(BODY)), tmp_path / "one" / NAME)
    assert (tmp_path / "one" / NAME).read_bytes() == BODY
    with fsspec.open("memory://store/m.bin", "wb") as target:
        target.write(BODY)
    fetch_file(SourceFile("memory://store/m.bin"), tmp_path / "two" / NAME)
    assert (tmp_path / "two" / NAME).read_bytes() == BODY
    with pytest.raises(MissingError, match="no such file"):
        fetch_file(SourceFile("memory://store/none.bin"), tmp_path / "three")
    with pytest.raises(SnipError, match="expected a local path or a URL"):
        fetch_file(SourceFile("what://store/m.bin"), tmp_path / "three")


CHILD = """
import sys
from pathlib import Path
from snipdedup.downloading.transfer import SourceFile, fetch_file
fetch_file(SourceFile(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_kill_at_any_time_costs_no_more_than_what_was_under_way(server, tmp_path):
    server.pause = 0.02  # some 20 pieces: 0.4 s
    words = [sys.executable, "-c", CHILD, f"{server.url}/{NAME}", str(tmp_path / NAME)]
    part = tmp_path / f".{NAME}.part"
    held = 0
    for _ in range(3):
        with subprocess.Popen(words) as running:
            wait_for_more(part, held)
            os.kill(running.pid, signal.SIGKILL)
        assert not (tmp_path / NAME).exists()
        held = part.stat().st_size
    server.pause = 0
    subprocess.run(words, check=True)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert alone(tmp_path) == [NAME]
    begins = [int((span or "bytes=0-")[6:-1]) for span in server.spans(NAME)]
    assert begins == sorted(begins)
    assert begins[0] == 0 < begins[1] < begins[2] < begins[3] == held


def wait_for_more(part, held):
    limit = time.monotonic() + 30
    while not (part.is_file() and part.stat().st_size > held):
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_names_and_what_they_hide():
    assert web.redacted("https://me:hush@host/a?b=hush#c") == "https://host/a"
    assert web.redacted("ftp://me:hush@host/a") == "ftp://host/a"
    assert web.redacted("/a/b?c") == "/a/b?c"
    assert web.name_of("https://host/a/b%20c.parquet?x=/d") == "b c.parquet"
    assert web.name_of("s3://bucket/a/b%20c.parquet") == "b%20c.parquet"
    for wrong in ("https://host/", "https://host/a/..%2fb", "https://host/.hidden"):
        with pytest.raises(SnipError, match="expected a file name at its end"):
            web.name_of(wrong)
