"""Progress: never silent, never still, gone when told to be quiet."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup import cli, progress
from snipdedup.parallel import cores

SCRIPTS = Path(__file__).parent.parent / "scripts"
FRAME = re.compile(r"([\w .]+): +(0|100)%\|")


class Watched(NamedTuple):
    """What a command showed on a terminal: its text, and the longest times without a change."""

    status: int
    text: str
    silence: tuple[float, str]  # seconds without any byte, and what stood there
    standing: dict[str, float]  # seconds that a bar stood at 0 or 100 %


def watch(words, cwd) -> Watched:
    """Run a command on a terminal of 100 columns and note when it writes."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execv(sys.executable, [sys.executable, *map(str, words)])
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    last = time.monotonic()
    text, silence, since = "", (0.0, ""), {}
    standing: dict[str, float] = {}
    while True:
        if select.select([fd], [], [], 0.05)[0]:
            try:
                data = os.read(fd, 1 << 16).decode(errors="replace")
            except OSError:  # the command has ended
                data = ""
            now = time.monotonic()
            silence = max(silence, (now - last, text[-80:]))
            last = now
            if not data:
                break
            text += data
            shown = {" ".join(found) for found in FRAME.findall(data)}
            for name in shown:
                began = since.setdefault(name, now)
                standing[name] = max(standing.get(name, 0), now - began)
            if "%|" in data:
                since = {name: began for name, began in since.items() if name in shown}
    return Watched(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text, silence, standing)


CODE = "import sys, time; from snipdedup import progress\n"


def test_a_bar_and_a_phase_move_while_one_long_step_runs(tmp_path):
    code = CODE + (
        "with progress.phase('thinking'):\n"
        "    time.sleep(1.2)\n"
        "    with progress.bar(10, 'counting', 'rows') as bar:\n"
        "        bar.update(3); time.sleep(1.8); bar.update(7)\n"
        "    time.sleep(0.8)\n"
        "print('done')"
    )
    seen = watch(["-c", code], tmp_path)
    lines = seen.text.replace("\x1b[K", "").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert seen.status == 0
    assert seen.silence[0] < 1.5
    assert len([line for line in lines if line.startswith("thinking:")]) >= 3
    assert len([line for line in lines if line.startswith("counting:  30%|")]) >= 3
    assert seen.text.endswith("\r\x1b[Kdone\r\n")  # the line of the phase was erased
    last = [line for line in lines if line.startswith("counting")][-1]
    assert "10.0/10.0" in last


def test_two_bars_that_end_out_of_order_leave_nothing_behind():
    one = progress.track(range(3), "one", "rows", 3)
    two = progress.track(range(3), "two", "rows", 3)
    assert (next(one), next(two), list(one), list(two)) == (0, 0, [1, 2], [1, 2])
    assert progress._shown == []
    assert progress._beating == []
    with pytest.raises(ZeroDivisionError), progress.phase("x"):
        raise ZeroDivisionError
    assert progress._shown == []
    deadline = time.monotonic() + 10
    while any("beat" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_lines_where_no_terminal_is(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_LINES_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "BEAT_S", 0.01)
    with progress.phase("fit"):
        time.sleep(0.1)
        with progress.bar(4, "steps", "rows") as bar:
            bar.update(2)
    text = capsys.readouterr().err
    assert "fit: 0 s\n" in text
    assert "steps: 0 of 4 rows, 0 rows/s, not yet timed\n" in text
    assert "steps: 2 of 4 rows" in text
    monkeypatch.setattr(progress, "loudness", progress.QUIET)
    with progress.phase("fit"), progress.bar(4, "steps", "rows") as bar:
        bar.update(4)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_command_is_quiet_or_says_more(tmp_path, capsys):
    np.save(tmp_path / "e.npy", np.eye(8, dtype=np.float32)[[0, 1, 2, 2]])
    words = ["dedup", str(tmp_path / "e.npy"), "--method", "exact", "--out"]
    assert cli.run([*words, str(tmp_path / "quiet"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.run([*words, str(tmp_path / "loud"), "--verbose"]) == 0
    assert re.search(r"^group: \d+\.\d\d s$", capsys.readouterr().err, re.MULTILINE)
    assert cli.run([*words, str(tmp_path / "usual")]) == 0
    assert capsys.readouterr().err == ""


def test_progress_that_nobody_reads_does_not_end_the_run():
    code = CODE + (
        "progress.PLAIN_LINES_EVERY_S = 0\n"
        "done = list(progress.track(range(5), 'steps', 'rows', 5)); progress.say('x')\n"
        "sys.exit(7 if len(done) == 5 else 1)"
    )
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run([sys.executable, "-c", code], stderr=pipe, check=False)
    assert done.returncode == 7


@pytest.mark.slow
@pytest.mark.parametrize("rows", [60_000, 400_000])
def test_no_long_command_falls_silent(tmp_path, rows):
    """Each command on a terminal: something moves every two seconds, and no bar stands still."""
    for seed, name in enumerate(("set", "other")):
        made = [sys.executable, SCRIPTS / "synthetic.py", name, "--rows", str(rows), "--dim", "128",
                "--spectrum", "hierarchical", "--seed", str(seed)]  # fmt: skip
        subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
    key = pa.array(np.arange(rows).astype(str))
    pq.write_table(pa.table({"key": key}), tmp_path / "table.parquet")
    faults = []
    for line in (
        "dedup set/img_emb --metadata table.parquet --out clean --keep_work",
        "dedup set/img_emb --text_features set/img_emb --out with_texts",
        "dedup clean --threshold 0.97 --out stricter",
        "audit clean",
        "report clean",
        "filter table.parquet --is_dup clean --out kept",
        "train set/img_emb --out encoder --steps 60",
        "compress set/img_emb --encoder encoder --out descriptors",
        "index set/img_emb --encoder encoder --out index",
        "dedup set/img_emb --index index --out by_codes",
        "dedup set/img_emb --method semdedup --out sem",
        "dedup set/img_emb --reference other/img_emb --references_only --out new",
        "eval set/img_emb --encoder encoder --queries 500 --code_bytes 4 --out eval",
        "plan set/img_emb",
    ):
        seen = watch(["-m", "snipdedup", *line.split()], tmp_path)
        busy = max(1, os.getloadavg()[0] / cores())  # then all takes longer, and so may this
        assert seen.status == 0, (line, seen.text[-500:])
        if seen.silence[0] > 2 * busy:
            faults.append(f"{line}: silent for {seen.silence[0]:.1f} s after {seen.silence[1]!r}")
        for bar, seconds in seen.standing.items():
            if seconds > 2 * busy:
                faults.append(f"{line}: {bar} % for {seconds:.1f} s")
    assert not faults, "\n".join(faults)
