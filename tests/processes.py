"""`snip` in processes of their own that start at once: forked from one that has all imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from snipdedup.storage.out_folder import MANIFEST

NURSERY = """
import atexit, importlib, json, os, sys, traceback
import faiss, torch, pyarrow.parquet
from snipdedup import cli
from snipdedup import runners
for command in cli.COMMANDS.values():
    importlib.import_module(command.module)
for line in sys.stdin:
    said = json.loads(line)
    if "wait" in said:
        print(os.waitstatus_to_exitcode(os.waitpid(said["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in ((1, said["out"]), (2, said["err"])):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            os.environ.clear()
            os.environ.update(said["env"])
            runners.FORK_ROWS = int(os.environ.get("FORK_ROWS", runners.FORK_ROWS))
            os.chdir(said["cwd"])
            cli.main(said["words"])
        except SystemExit as left:
            status = left.code or 0
        except BaseException:
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status)
    print(child, flush=True)
"""


class Run:
    """A process that was started."""

    def __init__(self, ask: Callable[[dict], int], pid: int, out: Path, err: Path) -> None:
        self.ask, self.pid, self.out, self.err = ask, pid, out, err
        self.status: int | None = None

    def wait(self) -> int:
        """Return the exit status, -9 if it was killed."""
        if self.status is None:
            self.status = self.ask({"wait": self.pid})
        return self.status

    def kill(self) -> int:
        """End it at once; return the exit status: it may have been done before."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def runs(self) -> bool:
        """Tell whether it is not yet at its end."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def said(self) -> str:
        return self.err.read_text()


@contextmanager
def nursery() -> Iterator[Callable[..., Run]]:
    """Yield ``start(*words, cwd, logs, **env)``; what still runs at the end is killed."""
    parent = subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    runs: list[Run] = []

    def ask(said: dict) -> int:
        parent.stdin.write(json.dumps(said) + "\n")
        parent.stdin.flush()
        return int(parent.stdout.readline())

    def start(*words: object, cwd: Path, logs: Path | None = None, **env: str) -> Run:
        out = err = cwd / f"log-{len(runs)}"
        if logs is not None:  # apart from each other
            out, err = logs / f"{len(runs)}.out", logs / f"{len(runs)}.err"
        said = {
            "words": [str(word) for word in words],
            "cwd": str(cwd),
            "env": {**os.environ, **env},
        }
        runs.append(Run(ask, ask({**said, "out": str(out), "err": str(err)}), out, err))
        return runs[-1]

    try:
        yield start
    finally:
        for run in runs:
            if run.status is None:
                run.kill()
        parent.stdin.close()
        parent.wait()
        parent.stdout.close()


def results(folder: Path) -> dict[str, bytes | dict]:
    """Return all that a finished OUT holds; of its manifest what a second run says again."""
    found: dict[str, bytes | dict] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found[str(path.relative_to(folder))] = path.read_bytes()
    manifest = json.loads(found.pop(MANIFEST))
    del manifest["seconds"]
    for name in ("out", "runner", "num_tasks", "task_index", "threads", "max_memory"):
        del manifest["settings"][name]
    for name in ("kernel", "candidates"):  # the fastest at the moment; one may propose more pairs
        del manifest["method"][name]
    return {**found, MANIFEST: manifest}


def many_lists(folder: Path, rows: int = 70_000) -> Path:
    """Write features with so many rows that they get lists, and a tenth of them are copies."""
    rng = np.random.default_rng(5)
    features = rng.standard_normal((rows, 24)).astype(np.float32)
    copies = rng.integers(0, rows // 2, rows // 10)
    noise = 0.05 * rng.standard_normal((len(copies), 24)).astype(np.float32)
    features[-len(copies) :] = features[copies] + noise
    folder.mkdir()
    for number, part in enumerate(np.array_split(features, 3)):
        np.save(folder / f"part_{number}.npy", part)
    return folder


def until(condition: Callable[[], object], seconds: float = 240) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
