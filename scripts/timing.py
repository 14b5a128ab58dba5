"""A whole process: its times, and the most anonymous memory that it and its children held."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

INTERVAL, SELDOM = 0.05, 0.3  # seconds between looks at the memory
ROOT = Path(__file__).parent.parent
PACKAGES = ("numpy", "torch", "faiss-cpu", "pyarrow", "semhash", "usearch")


class Timed(NamedTuple):
    """Times of a process, and its peak of anonymous memory in bytes; 0 without /proc.

    ``cpu_seconds`` are of user and system, of all its processes; other programs on the machine
    change them less than the wall time.
    """

    seconds: float
    peak: int
    cpu_seconds: float


def run_timed(command: list[str], log: Path, *, shared_once: bool = False) -> Timed:
    """Run a command to its end, its output to ``log``.

    The memory is the sum of RssAnon over all processes; with ``shared_once`` pages that several of
    them share count once, which is dearer to ask, so asked less often.

    Raises
    ------
    SystemExit
        If it fails; the end of its output is shown.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    peaks = [0]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as file:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, text=True
        )
        watcher = threading.Thread(target=watch, args=(process, peaks, shared_once))
        watcher.start()
        status = process.wait()
        seconds = time.perf_counter() - start
        watcher.join()
    if status:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)}: exit status {status}\n{tail}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Timed(seconds, peaks[0], cpu)


def watch(process: subprocess.Popen[str], peaks: list[int], shared_once: bool) -> None:
    """Raise ``peaks[0]`` to the most anonymous memory seen until the process ends."""
    held = proportional if shared_once else anonymous
    while process.returncode is None:
        peaks[0] = max(peaks[0], sum(held(pid) for pid in tree(process.pid)))
        time.sleep(SELDOM if shared_once else INTERVAL)


def tree(pid: int) -> list[int]:
    """Return a process and all its descendants; none where /proc is not there."""
    found = [pid]
    for parent in found:  # grows while it is walked
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(word) for word in path.read_text().split()]
            except OSError:  # the thread ended
                continue
    return found


def anonymous(pid: int | str) -> int:
    """Return the anonymous resident bytes of a process (``self``: this one), 0 if it has ended."""
    return kilobytes(f"/proc/{pid}/status", "RssAnon:")


def proportional(pid: int) -> int:
    """Return the same, each page divided by the number of processes that share it."""
    return kilobytes(f"/proc/{pid}/smaps_rollup", "Pss_Anon:")


def kilobytes(path: str, name: str) -> int:
    """Return a number of a file of /proc in bytes, 0 where it is not there."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def warm(paths: list[Path]) -> None:
    """Read files to their ends, so that they lie in the page cache."""
    buffer = bytearray(1 << 22)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def machine() -> dict[str, object]:
    """Return what the times depend on: processor, cores, memory, load, versions."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [x for x in information.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": os.getloadavg()[0],
        "versions": versions,
    }
