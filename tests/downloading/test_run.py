"""Download against a local server with faults: the right bytes, the right rows, or a clear no."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import Server, kill_once_more_came

from snipdedup.config import Download
from snipdedup.downloading import fetch_and_filter, transfer
from snipdedup.downloading import run as download
from snipdedup.downloading.fetch_and_filter import count_rows
from snipdedup.downloading.transfer import SourceFile
from snipdedup.errors import SnipError, UsageError
from snipdedup.storage import remote
from snipdedup.storage.out_folder import read_manifest, write_manifest

SIZES = [30, 7, 50, 21, 40]
STARTS = [0, 30, 37, 87, 108]


def table(begin, rows):
    return pa.table({"url": [f"u{i}" for i in range(begin, begin + rows)]})


@pytest.fixture
def server(tmp_path):
    with Server() as running:
        for number, (begin, rows) in enumerate(zip(STARTS, SIZES, strict=True)):
            path = tmp_path / "served" / f"m_{number:04d}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(table(begin, rows), path, row_group_size=9)
            running.files[path.name] = path.read_bytes()
        yield running


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF_S", 0.0)


@pytest.fixture
def is_dup(tmp_path):
    array = np.random.default_rng(0).random(sum(SIZES)) < 0.4
    np.save(tmp_path / "mask.npy", array)
    return array


def fetch(source, out, **more):
    return str(download.run(Download(source=str(source), out=str(out), **more)))


def urls(out):
    return [u for p in sorted(out.glob("*.parquet")) for u in pq.read_table(p)["url"].to_pylist()]


def staying(is_dup, start, end):
    stop = STARTS[end - 1] + SIZES[end - 1]
    return [f"u{i}" for i in range(STARTS[start], stop) if not is_dup[i]]


def template(server):
    return server.url + "/m_{part:04d}.parquet"


def test_files_arrive_byte_for_byte(server, tmp_path):
    came = download.run(
        Download(source=template(server), out=str(tmp_path / "out"), start=1, end=4)
    )
    assert (came.kind, came.files, came.rows, came.kept) == ("download", 3, 78, 78)
    assert "78 of 78 rows" in str(came)
    for number in (1, 2, 3):
        name = f"m_{number:04d}.parquet"
        assert (tmp_path / "out" / name).read_bytes() == server.files[name]
    assert sorted(p.name for p in (tmp_path / "out").iterdir())[-1] == "snip.json"
    assert len(list((tmp_path / "out").iterdir())) == 4
    file = read_manifest(tmp_path / "out", "download")["files"][0]
    assert (file["size"], file["rows"]) == (len(server.files["m_0001.parquet"]), 7)
    assert re.fullmatch('"[0-9a-f]{32}"', file["etag"])
    asked = len(server.asked)
    assert "finished already" in fetch(template(server), tmp_path / "out", start=1, end=4)
    assert len(server.asked) == asked


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(("start", "end"), [(2, 4), (0, 1), (4, 5), (0, 5)])
def test_the_mask_lands_by_the_unfiltered_row(server, tmp_path, is_dup, ranges, start, end):
    server.ranges = ranges
    mask = str(tmp_path / "mask.npy")
    fetch(template(server), tmp_path / "out", start=start, end=end, is_dup=mask)
    assert urls(tmp_path / "out") == staying(is_dup, start, end)
    whole = {name for name, headers in server.asked if "Range" not in headers}
    if ranges:
        assert whole == {f"m_{number:04d}.parquet" for number in range(start, end)}


@pytest.mark.parametrize("beside", ["totals", "url totals"])
def test_with_totals_no_earlier_file_is_asked_for(server, tmp_path, is_dup, beside):
    np.save(tmp_path / "totals.npy", np.cumsum(SIZES))
    server.files["totals.npy"] = (tmp_path / "totals.npy").read_bytes()
    server.files["mask.npy"] = (tmp_path / "mask.npy").read_bytes()
    where = str(tmp_path) if beside == "totals" else server.url
    more = {"is_dup": f"{where}/mask.npy", "cumulative_sizes": f"{where}/totals.npy"}
    fetch(template(server), tmp_path / "out", start=2, end=4, **more)
    assert urls(tmp_path / "out") == staying(is_dup, 2, 4)
    assert not any(name in ("m_0000.parquet", "m_0001.parquet") for name in server.names())
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_totals_of_other_files_are_refused(server, tmp_path, is_dup):
    np.save(tmp_path / "totals.npy", np.cumsum([30, 7, 21, 50, 40]))
    more = {"is_dup": str(tmp_path / "mask.npy"), "cumulative_sizes": str(tmp_path / "totals.npy")}
    with pytest.raises(SnipError, match=r"m_0002\.parquet has 50 rows, file 2 .* has 21"):
        fetch(template(server), tmp_path / "out", start=2, end=4, **more)
    assert urls(tmp_path / "out") == []
    with pytest.raises(SnipError, match="files 3 to 5 are wanted, the mask's set has 0 to 4"):
        fetch(template(server), tmp_path / "two", start=3, end=6, **more)


def test_an_earlier_file_that_cannot_be_counted_ends_the_run(server, tmp_path, is_dup):
    del server.files["m_0001.parquet"]
    with pytest.raises(
        SnipError, match=r"needs the rows of m_0001.parquet: no such file.*--cumulative_sizes"
    ):
        fetch(template(server), tmp_path / "out", start=2, end=4, is_dup=str(tmp_path / "mask.npy"))
    assert not (tmp_path / "out").exists()


def test_a_mask_that_is_too_short_is_refused(server, tmp_path):
    np.save(tmp_path / "mask.npy", np.zeros(100, bool))
    with pytest.raises(SnipError, match="is rows 87 to 108 of its set, the mask has 100"):
        fetch(template(server), tmp_path / "out", start=3, end=4, is_dup=str(tmp_path / "mask.npy"))


def test_a_manifest_beside_a_mask_on_the_web_places_it(server, tmp_path, is_dup):
    published = tmp_path / "published"
    published.mkdir()
    np.save(published / "is_dup.npy", is_dup)
    shards = [{"name": f"e{i}", "rows": rows} for i, rows in enumerate(SIZES)]
    write_manifest(published, "dedup", {"shards": shards}, [published / "is_dup.npy"])
    for path in published.iterdir():
        server.files[f"v1/{path.name}"] = path.read_bytes()
    more = {"start": 2, "end": 3, "is_dup": f"{server.url}/v1/is_dup.npy"}
    fetch(template(server), tmp_path / "out", **more)
    assert urls(tmp_path / "out") == staying(is_dup, 2, 3)
    assert "m_0000.parquet" not in server.names()
    server.files["v1/snip.json"] = b"<html>no such page</html>"
    fetch(template(server), tmp_path / "two", **more)
    assert urls(tmp_path / "two") == urls(tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (401, "401 .*gated or private"),
        (403, "403 .*gated or private"),
        (404, "404 .*check the URL"),
        ((429, {"Retry-After": "7200"}), r"429 .*fewer requests.*\(it asks to wait 7,200 s\)"),
        (500, "500 .*run again later"),
        (503, "503 .*run again later"),
        ("no_length", "truncated or not a parquet file"),
        ("short", "truncated or not a parquet file"),
    ],
)
def test_faults_are_told_apart_and_leave_nothing_half_written(
    server, tmp_path, is_dup, fault, message
):
    server.faults["m_0001.parquet"] = fault
    with pytest.raises(SnipError, match=message) as caught:
        fetch(template(server), tmp_path / "out", start=0, end=3)
    assert "m_0001.parquet" in str(caught.value)
    assert list((tmp_path / "out").glob("*.parquet")) == []
    assert not (tmp_path / "out" / "snip.json").exists()
    assert not list(tmp_path.rglob(".m_0001*"))
    server.faults.clear()
    server.asked.clear()
    fetch(template(server), tmp_path / "out", start=0, end=3)
    assert "m_0000.parquet" not in server.names()  # whole: not fetched again
    for number in range(3):
        name = f"m_{number:04d}.parquet"
        assert (tmp_path / "out" / name).read_bytes() == server.files[name]


def test_a_stopped_filtered_run_goes_on_at_the_right_row(server, tmp_path, is_dup):
    server.faults["m_0003.parquet"] = 500
    more = {"start": 1, "end": 5, "is_dup": str(tmp_path / "mask.npy")}
    with pytest.raises(SnipError, match="500"):
        fetch(template(server), tmp_path / "out", **more)
    server.faults.clear()
    fetch(template(server), tmp_path / "out", **more)
    assert urls(tmp_path / "out") == staying(is_dup, 1, 5)


def test_a_page_instead_of_parquet_is_refused(server, tmp_path):
    server.files["m_0000.parquet"] = b"<html>please log in</html>"
    with pytest.raises(SnipError, match="expected metadata, found another file"):
        fetch(template(server), tmp_path / "out", end=1)


def test_no_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SnipError, match=r"cannot be reached: .*refused"):
        fetch(f"http://127.0.0.1:{port}/m_{{part:04d}}.parquet", tmp_path / "out", end=1)


def test_redirects_are_followed(server, tmp_path, is_dup):
    server.faults.update({f"m_{number:04d}.parquet": "moved" for number in range(5)})
    more = {"start": 1, "end": 2, "is_dup": str(tmp_path / "mask.npy")}
    fetch(template(server), tmp_path / "out", **more)
    assert urls(tmp_path / "out") == staying(is_dup, 1, 2)


@pytest.mark.parametrize("ranges", [True, False])
def test_rows_are_counted_by_the_footer(server, tmp_path, ranges):
    server.ranges = ranges
    body = server.files["m_0003.parquet"]
    three = SourceFile(f"{server.url}/m_0003.parquet")
    sized = SourceFile(three.url, size=len(body))
    assert count_rows([three, sized], tmp_path, 1) == [21, 21]
    for wrong in (b"PAR1 but not at the end", b"PAR1" + b"\xff" * 7 + b"\x00PAR1", b""):
        server.files["m_0003.parquet"] = wrong
        with pytest.raises(SnipError, match="needs the rows of m_0003"):
            count_rows([three], tmp_path, 1)


def test_one_url(server, tmp_path, is_dup):
    one = server.url + "/m_0002.parquet"
    fetch(one, tmp_path / "out")
    assert urls(tmp_path / "out") == [f"u{i}" for i in range(37, 87)]
    with pytest.raises(SnipError, match=r"has 50 rows in 1 files, the mask .* has 148"):
        fetch(one, tmp_path / "two", is_dup=str(tmp_path / "mask.npy"))
    with pytest.raises(SnipError, match="begins is not known"):
        fetch(one, tmp_path / "three", start=2, is_dup=str(tmp_path / "mask.npy"))
    np.save(tmp_path / "totals.npy", np.cumsum([0, *SIZES]))
    more = {"is_dup": str(tmp_path / "mask.npy"), "cumulative_sizes": str(tmp_path / "totals.npy")}
    fetch(one, tmp_path / "four", start=2, **more)
    assert urls(tmp_path / "four") == staying(is_dup, 2, 3)


def test_a_leading_0_of_totals_that_can_mean_two_places_is_refused(server, tmp_path, is_dup):
    np.save(tmp_path / "mask.npy", np.resize(is_dup, 150))
    np.save(tmp_path / "totals.npy", np.array([0, 50, 100, 150]))  # m_0002 has 50 rows
    more = {"is_dup": str(tmp_path / "mask.npy"), "cumulative_sizes": str(tmp_path / "totals.npy")}
    with pytest.raises(SnipError, match="is that where file 0 begins, or is file 0 empty"):
        fetch(server.url + "/m_0002.parquet", tmp_path / "out", start=2, **more)
    assert urls(tmp_path / "out") == []
    np.save(tmp_path / "totals.npy", np.array([0, 60, 110, 150]))  # file 2 of 0, 60, 50, 40
    fetch(server.url + "/m_0002.parquet", tmp_path / "two", start=2, **more)
    removed = np.load(tmp_path / "mask.npy")[60:110]
    assert urls(tmp_path / "two") == [f"u{37 + n}" for n in range(50) if not removed[n]]


def test_what_a_url_hides_is_not_shown(server, tmp_path):
    address = server.url.removeprefix("http://")
    secret = f"http://{address}/m_{{part:04d}}.parquet?token=hush"
    fetch(secret, tmp_path / "out", end=1)
    assert "hush" not in (tmp_path / "out" / "snip.json").read_text()
    with pytest.raises(SnipError) as caught:
        fetch(secret, tmp_path / "two", start=9, end=10)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("form", ["", "/*.parquet", "/m_{part:04d}.parquet"])
def test_local_sources(server, tmp_path, is_dup, form):
    source = f"{tmp_path}/served{form}"
    more = {"start": 2, "end": 4}
    fetch(source, tmp_path / "out", **more)
    for number in (2, 3):
        name = f"m_{number:04d}.parquet"
        assert (tmp_path / "out" / name).read_bytes() == server.files[name]
    fetch(source, tmp_path / "kept", **more, is_dup=str(tmp_path / "mask.npy"))
    assert urls(tmp_path / "kept") == staying(is_dup, 2, 4)
    if "{" not in form:
        fetch(source, tmp_path / "all", is_dup=str(tmp_path / "mask.npy"))
        assert urls(tmp_path / "all") == staying(is_dup, 0, 5)
        fetch(source, tmp_path / "rest", start=3, is_dup=str(tmp_path / "mask.npy"))
        assert urls(tmp_path / "rest") == staying(is_dup, 3, 5)
    assert sorted(p.name for p in (tmp_path / "served").iterdir()) == sorted(server.files)


def test_a_local_range_without_its_earlier_files_is_refused(server, tmp_path, is_dup):
    (tmp_path / "served" / "m_0000.parquet").unlink()
    for form in ("/m_000[23].parquet", "/m_{part:04d}.parquet"):
        with pytest.raises(SnipError, match=r"--cumulative_sizes"):
            fetch(
                f"{tmp_path}/served{form}", tmp_path / "out", start=2, end=4,
                is_dup=str(tmp_path / "mask.npy"),
            )  # fmt: skip
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["http://h/m_{part:04d}.parquet", "OUT"], 2, "needs file numbers: --start 0 --end 10"),
        (["http://h/m_{page:04d}.parquet", "OUT", "--end", "2"], 2, "is one file"),
        (["http://h/m_{part:04d}_{x}.parquet", "OUT", "--end", "2"], 2, "expected a pattern"),
        (["http://h/m.parquet", "OUT", "--cumulative_sizes", "c.npy"], 2, "give --is_dup too"),
        (["http://h/m.parquet", "OUT", "--start", "3", "--end", "2"], 2, "the end exclusive"),
        (["what://bucket/m.parquet", "OUT"], 1, "expected a local path or a URL of http(s), hf"),
        (["hf://datasets/one", "OUT"], 2, "expected hf://datasets/OWNER/NAME"),
        (
            ["http://h/m.parquet", "OUT", "--dl_dedup_set", "True"],
            2,
            "--dl_dedup_set is upstream's flag",
        ),
        (["http://h/m.parquet", "OUT", "--jobs", "0"], 2, "--jobs must lie between"),
        (["http://h/m_{part}.zip", "OUT", "--end", "2"], 1, "name that ends in .parquet or .csv"),
        (["http://h/{part}/", "OUT", "--end", "2"], 1, "expected a file name at its end"),
        (["http://h/{part}/m.parquet", "OUT", "--end", "2"], 1, "would have one name"),
        (["no_such_folder", "OUT"], 1, "no such file or folder"),
    ],
)
def test_wrong_calls_touch_nothing(tmp_path, words, status, message):
    values = dict(zip(("source", "out"), words, strict=False))
    values["out"] = str(tmp_path / "out")
    flags = dict(zip((w.lstrip("-") for w in words[2::2]), words[3::2], strict=True))
    flags = {name: int(v) if v.isdecimal() else v for name, v in flags.items()}
    with pytest.raises(SnipError, match=re.escape(message)) as caught:
        download.run(Download(**values, **flags))
    assert isinstance(caught.value, UsageError) == (status == 2)
    assert not (tmp_path / "out").exists()


def test_three_kills_cost_nothing_but_time(server, tmp_path):
    rng = np.random.default_rng(1)
    rows = [900, 300, 1500, 640, 1200]
    for number, count in enumerate(rows):
        columns = {"url": [f"u{sum(rows[:number]) + i}" for i in range(count)]}
        columns["noise"] = rng.random((count, 40)).tolist()  # some hundred kilobytes a file
        path = tmp_path / "made.parquet"
        pq.write_table(pa.table(columns), path)
        server.files[f"m_{number:04d}.parquet"] = path.read_bytes()
    mask = rng.random(sum(rows)) < 0.3
    np.save(tmp_path / "mask.npy", mask)
    out = tmp_path / "out"
    words = [sys.executable, "-m", "snipdedup", "download", template(server), str(out)]
    words += ["--start", "3", "--end", "5", "--jobs", "1"]
    words += ["--is_dup", str(tmp_path / "mask.npy")]
    server.pause = 0.02
    for _ in range(3):
        kill_once_more_came(words, out, 50_000)
        assert list(out.glob("*.parquet")) == []
        assert not (out / "snip.json").exists()
    server.pause = 0
    subprocess.run(words, check=True, capture_output=True)
    names = ["m_0003.parquet", "m_0004.parquet"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "snip.json"]
    stay = np.flatnonzero(~mask)
    assert urls(out) == [f"u{row}" for row in stay[stay >= sum(rows[:3])]]
    asked = {name: [s for s in server.spans(name) if s != "bytes=0-0"] for name in names}
    begins = {name: [int((s or "bytes=0-")[6:-1]) for s in asked[name]] for name in names}
    for name in names:  # no byte that had come before was asked for again
        assert begins[name] == sorted(set(begins[name]))
    assert sum(map(len, begins.values())) > 3


def test_upstreams_command_line_says_what_became_of_its_set(tmp_path, snip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("download", "OUT", "--start", 0, "--end", 10, "--dl_dedup_set", True)
    said = snip(*words, status=1).stderr
    for part in ("disabled", "datacomp_small", "datacomp_1b", "is_dup_mlp_1024_128_gelu_snn",
                 "snip filter METADATA --is_dup", "not fit Re-LAION by position"):  # fmt: skip
        assert part in said
    assert said.count("\n") == 1
    assert not (tmp_path / "OUT").exists()
    assert "disabled" in snip("download", "laion2B-en", "OUT", status=1).stderr
    assert "needs SOURCE and OUT" in snip("download", "OUT", "--end", 10, status=2).stderr


def test_never_into_the_source(server, tmp_path):
    with pytest.raises(SnipError, match="lies in the input folder"):
        fetch(tmp_path / "served", tmp_path / "served" / "kept")


@pytest.mark.parametrize("shape", [(148,), (148, 1), (1, 148)])
def test_a_mask_as_upstream_saved_it(server, tmp_path, is_dup, shape):
    np.save(tmp_path / "upstream.npy", is_dup.reshape(shape))
    server.files["upstream.npy"] = (tmp_path / "upstream.npy").read_bytes()
    for number, mask in enumerate((tmp_path / "upstream.npy", f"{server.url}/upstream.npy")):
        fetch(template(server), tmp_path / f"out{number}", start=3, end=5, is_dup=str(mask))
        assert urls(tmp_path / f"out{number}") == staying(is_dup, 3, 5)


def test_a_filtered_range_is_part_of_the_filtered_whole(server, tmp_path, is_dup):
    mask = str(tmp_path / "mask.npy")
    fetch(template(server), tmp_path / "all", end=5, is_dup=mask)
    fetch(template(server), tmp_path / "out", start=3, end=5, is_dup=mask)
    for number in (3, 4):
        name = f"m_{number:04d}.parquet"
        part, whole = (pq.read_table(tmp_path / folder / name) for folder in ("out", "all"))
        assert part.equals(whole)
        assert 0 < part.num_rows < SIZES[number]


def test_files_come_side_by_side(server, tmp_path):
    server.pause = 0.1
    seen = []
    real = transfer.PartFile.fetch

    def watched(*words):
        seen.append(1)
        try:
            return real(*words)
        finally:
            seen.append(-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer.PartFile, "fetch", watched)
        fetch(template(server), tmp_path / "out", end=5, jobs=3)
    assert max(np.cumsum(seen)) == 3
    assert urls(tmp_path / "out") == [f"u{row}" for row in range(148)]


def test_a_signed_url_that_was_renewed_goes_on(server, tmp_path):
    server.faults["m_0001.parquet"] = 403
    with pytest.raises(SnipError, match="403"):
        fetch(template(server) + "?signature=old", tmp_path / "out", end=2, jobs=1)
    server.faults.clear()
    server.asked.clear()
    fetch(template(server) + "?signature=new", tmp_path / "out", end=2)
    assert server.names() == ["m_0001.parquet"]


@pytest.mark.parametrize("filtered", [False, True])
def test_what_came_before_a_stop_is_not_asked_for_again(server, tmp_path, is_dup, filtered):
    """Stopped after each step that a file goes through, whole ones are never fetched twice."""
    mask = {"is_dup": str(tmp_path / "mask.npy")} if filtered else {}
    steps = ["check_item", "count_arrived"]
    steps += ["filter_item", "write_kept"] if filtered else []
    for name in steps:
        out = tmp_path / name
        fetch_until(name, template(server), out, start=1, end=4, **mask)
        server.asked.clear()
        fetch(template(server), out, start=1, end=4, **mask)
        assert server.names() == []
        wanted = staying(is_dup, 1, 4) if filtered else [f"u{row}" for row in range(30, 108)]
        assert urls(out) == wanted
        assert len(list(out.iterdir())) == 4


def fetch_until(name, source, out, **more):
    """Run a download that ends, as a kill would, when all files are here and ``name`` begins."""
    real = getattr(fetch_and_filter, name)

    def stop(*words):
        limit = time.monotonic() + 30
        while len(list((out / "work").glob("*/m_*.parquet"))) < 3:
            assert time.monotonic() < limit
            time.sleep(0.01)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch_and_filter, name, stop)
        with pytest.raises(SystemExit):
            fetch(source, out, **more)
    assert getattr(fetch_and_filter, name) is real
    assert not (out / "snip.json").exists()


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("harm", [lambda data: data[:-9], lambda data: data[:9] + b"x" + data[10:]])
def test_a_file_that_was_damaged_after_it_came_is_fetched_again(
    server, tmp_path, is_dup, filtered, harm
):
    """The manifest is that of a run which nothing stopped, etags too."""
    mask = {"is_dup": str(tmp_path / "mask.npy")} if filtered else {}
    out, whole = tmp_path / "out", tmp_path / "whole"
    fetch(template(server), whole, start=1, end=4, **mask)
    fetch_until("check_item", template(server), out, start=1, end=4, **mask)
    (damaged,) = (out / "work").glob("*/m_0002.parquet")
    damaged.write_bytes(harm(damaged.read_bytes()))
    server.asked.clear()
    fetch(template(server), out, start=1, end=4, **mask)
    assert server.names() == ["m_0002.parquet"]
    assert urls(out) == (staying(is_dup, 1, 4) if filtered else [f"u{r}" for r in range(30, 108)])
    files = [read_manifest(folder, "download")["files"] for folder in (out, whole)]
    assert files[0] == files[1]
    assert all(file["etag"] for file in files[0])
