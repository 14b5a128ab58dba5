"""Time adding shards to a cleaned set beside a run over everything.

    python scripts/bench_reference.py --features FOLDER --new 1 --out FILE.json

The last ``--new`` shards of FOLDER are new, the others are cleaned before (not timed): once with
``--keep_work`` and once without. Each run is a whole process on a warm page cache; all are timed in
turn, the median counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from timing import machine, run_timed, warm

from snipdedup.features.shards import Features, open_features


def main() -> None:
    """Run all, write the JSON, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature shards")
    parser.add_argument("--new", type=int, default=1, help="shards that are new")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        body = measure(given, open_features(given.features), Path(folder))
    given.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    for name in ("model kept", "nothing kept"):
        print(f"{name}: {body['seconds'][name] / body['seconds']['everything']:.2f} of everything")


def measure(given: argparse.Namespace, features: Features, work: Path) -> dict[str, Any]:
    """Clean the old shards, then time what can be done with the new ones."""
    paths = features.paths()
    for name, part in (("old", paths[: -given.new]), ("new", paths[-given.new :])):
        (work / name).mkdir()
        for path in part:
            (work / name / path.name).symlink_to(path.resolve())
    dedup(given, work, work / "old", work / "kept", "--keep_work")
    dedup(given, work, work / "old", work / "bare")
    runs = {
        "everything": (given.features,),
        "model kept": (work / "new", "--reference", work / "kept"),
        "nothing kept": (work / "new", "--reference", work / "bare"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(given.repeats):
        for name, (source, *flags) in runs.items():
            warm(paths)
            seconds[name].append(dedup(given, work, source, work / name, *flags))
            print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    removed = {name: int(np.load(work / name / "is_dup.npy").sum()) for name in (*runs, "bare")}
    return {
        "machine": machine(),
        "settings": {name: getattr(given, name) for name in ("new", "repeats", "threshold")},
        "data": {"rows": features.rows, "dim": features.dim, "dtype": str(features.dtype)},
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "all_seconds": seconds,
        "removed": removed,
    }


def dedup(
    given: argparse.Namespace, work: Path, source: object, out: Path, *flags: object
) -> float:
    """Run ``snip dedup`` once, anew; return its seconds."""
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "snipdedup", "dedup", source, "--out", out, *flags]
    words += ["--threshold", given.threshold]
    return run_timed([str(word) for word in words], work / "log.txt").seconds


if __name__ == "__main__":
    main()
