"""Compare the plan of a run with the run: time, anonymous memory, disk.

python scripts/check_plan.py --features FOLDER [FOLDER ...] --repeats 3 --out FILE.json

Each repeat asks `snip plan` first, which measures the rates of the machine as it is just now, and
then runs `snip dedup`. Compared are the medians. ``compute`` is the time of the processor, in all
threads together: it tells more than ``seconds`` where other work keeps the machine busy. Memory
that forked workers share counts once: so much the machine needs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import timing

NAMES = ("seconds", "compute", "memory", "disk")
INTERVAL = 0.2  # seconds between looks at the disk


def main() -> None:
    """Parse the arguments, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, nargs="+", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where OUT lies; a temporary folder if none")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine, runs = timing.machine(), []
    for features in options.features:
        timing.warm(sorted(features.glob("*.npy")))
        found = [compare(features, options.work) for _ in range(options.repeats)]
        runs.append(summary(features, found))
        print(json.dumps(runs[-1]["ratio"]), flush=True)
    body = {"kind": "plan", "measured": time.strftime("%Y-%m-%d"), "machine": machine, "runs": runs}
    if options.out:
        options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def compare(features: Path, work: Path | None) -> dict[str, dict[str, object]]:
    """Plan and run once; return what each says, or is."""
    snip = [sys.executable, "-m", "snipdedup"]
    with tempfile.TemporaryDirectory(prefix="plan-", dir=work) as name:
        folder = Path(name)
        log, out = folder / "log", folder / "out"
        asked = timing.run_timed([*snip, "plan", str(features), "--json"], log)
        text = log.read_text()
        planned = json.loads(text[text.index("{") : text.rindex("}") + 1])
        for kind in ("seconds", "compute"):
            planned[f"{kind}_of_stages"] = planned[kind]
            planned[kind] = sum(planned[kind].values())
        disk, done = [0], threading.Event()
        watcher = threading.Thread(target=watch, args=(out, disk, done))
        watcher.start()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [*snip, "dedup", str(features), "--out", str(out)]
        run = timing.run_timed(command, log, shared_once=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        done.set()
        watcher.join()
        manifest = json.loads((out / "snip.json").read_text(encoding="utf-8"))
    return {
        "planned": {**planned, "asking": asked.seconds},
        "measured": {
            "seconds": run.seconds,
            "compute": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "load": os.getloadavg()[0], "memory": run.peak, "disk": disk[0],
            "seconds_of_stages": manifest["seconds"], "method": manifest["method"],
            "counts": manifest["counts"],
        },
    }  # fmt: skip


def watch(folder: Path, largest: list[int], done: threading.Event) -> None:
    """Raise ``largest[0]`` to the most bytes seen in a folder."""
    while not done.wait(INTERVAL):
        largest[0] = max(largest[0], size_of(folder))


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder; those that vanish meanwhile count nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).stat().st_size
            except OSError:
                continue
    return total


def summary(features: Path, found: list[dict[str, dict[str, object]]]) -> dict[str, object]:
    """Return medians and their ratios, planned over measured."""
    middle = {
        side: {
            name: statistics.median(float(str(one[side][name])) for one in found) for name in NAMES
        }
        for side in ("planned", "measured")
    }
    ratio = {name: round(middle["planned"][name] / middle["measured"][name], 3) for name in NAMES}
    rows = found[0]["measured"]["counts"]
    return {"name": features.parent.name, "counts": rows, **middle, "ratio": ratio, "all": found}


if __name__ == "__main__":
    main()
