"""Time and judge the join beside other tools on the same rows, in one run, in turn.

    python scripts/bench_join.py --features FOLDER --out FILE.json [--peers brute faiss ...]

Ours is ``python -m snipdedup dedup FOLDER --out TMP``; a peer is ``scripts/peers.py NAME``. Each
is a whole process on a warm page cache. Which peers there are and what is counted for them stands
in peers.py, what is true and how it is judged in quality.py. semhash must be installed by hand.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from make_benchmarks import notes, table
from peers import FAISS_NAMES, NAMES, default_settings, unit
from quality import Truth, find_truth, judge
from timing import ROOT, machine, run_timed, warm

from snipdedup.features.shards import Features, open_features

Answer = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def main(argv: Sequence[str] | None = None) -> None:
    """Run all, judge all, write the JSON, print the table."""
    given = parse(argv)
    if given.twice is not None:
        if not given.twice.exists():
            write_twice(open_features(given.features), given.twice, given.twice_noise, given.seed)
        given.features = str(given.twice)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        work = given.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        body = measure(given, open_features(given.features), work)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print("\n".join([*table(body), "", notes(body)]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature shards")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--name", help="heading of the run (the name of --out)")
    parser.add_argument(
        "--peers", nargs="*", default=["brute", "faiss", "semdedup", "semhash"],
        choices=[*NAMES, "faiss"], help="faiss: all four settings of it",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument(
        "--ours_flags", default="", help='more for ours: --ours_flags="--max_memory 2GB"'
    )
    parser.add_argument(
        "--sample_queries", type=int, default=5000, help="rows judged where not all; 0: no truth"
    )
    parser.add_argument(
        "--full_truth_rows", type=int, default=120_000, help="up to here every pair is looked at"
    )
    parser.add_argument("--twice", type=Path, help="write the rows twice over there, and take that")
    parser.add_argument("--twice_noise", type=float, default=0.05, help="length of the noise")
    parser.add_argument("--work", type=Path, help="keep the last outputs there")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def write_twice(features: Features, folder: Path, length: float, seed: int) -> None:
    """Write all rows as unit float16 rows, then all with noise of a given length (of 1).

    Raises
    ------
    OSError
        If the folder cannot be written; it appears whole or not at all.
    """
    rng = np.random.default_rng(seed)
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True)
    number = 0
    for noise in (0.0, length):
        for _, block in features.blocks(65_536):
            added = unit(rng.standard_normal(block.shape, np.float32))
            rows = unit(unit(block) + np.float32(noise) * added)
            np.save(part / f"img_emb_{number:04d}.npy", rows.astype(np.float16))
            number += 1
    part.rename(folder)


def measure(given: argparse.Namespace, features: Features, work: Path) -> dict[str, Any]:
    """Return everything that the JSON holds."""
    host = machine()
    names, skipped = contenders(given.peers)
    results = time_all(names, given, features, work)
    truth = None
    if given.sample_queries:
        say("looking for the truth")
        truth = find_truth(
            features, given.threshold, given.sample_queries, given.full_truth_rows, given.seed
        )
        for name in names:
            if name not in ("floor", "brute"):
                say(f"judging {name}")
                answer = load_answer(name, work)
                results[name]["quality"] = judge(truth, features, answer, given.threshold)
    return {
        "name": given.name or given.out.stem.replace("_", " "),
        "flags": flags(given),
        "measured": datetime.date.today().isoformat(),
        "machine": host,
        "settings": {
            name: getattr(given, name)
            for name in (
                "peers", "repeats", "threshold", "ours_flags", "sample_queries",
                "full_truth_rows", "twice_noise", "seed",
            )
        } | {"twice": given.twice is not None},
        "data": {
            "rows": features.rows, "dim": features.dim, "dtype": str(features.dtype),
            "shards": len(features.shards),
        },
        "truth": describe_truth(truth) if truth else None,
        "skipped": skipped,
        "results": results,
    }  # fmt: skip


def flags(given: argparse.Namespace) -> str:
    """Return the flags that repeat the run, without paths."""
    words = ["--peers", *given.peers] if given.peers else ["--peers"]
    for name in ("repeats", "threshold", "sample_queries", "full_truth_rows", "seed"):
        words += [f"--{name}", str(getattr(given, name))]
    if given.ours_flags:
        words.append(f"--ours_flags={given.ours_flags}")
    if given.twice is not None:
        words += ["--twice", "FOLDER2", "--twice_noise", str(given.twice_noise)]
    return shlex.join(words)


def contenders(peers: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return what runs, in turn, and why something does not."""
    wanted = [name for peer in peers for name in (FAISS_NAMES if peer == "faiss" else (peer,))]
    skipped = {}
    if "semhash" in wanted and importlib.util.find_spec("semhash") is None:
        wanted.remove("semhash")
        skipped["semhash"] = "it is not installed here (pip install semhash)"
        say(f"skipping semhash: {skipped['semhash']}")
    return ["floor", "ours", *dict.fromkeys(wanted)], skipped


def time_all(
    names: list[str], given: argparse.Namespace, features: Features, work: Path
) -> dict[str, Any]:
    """Run all in turn, ``repeats`` times; return settings, times and stages of each."""
    results: dict[str, Any] = {}
    for repeat in range(given.repeats):
        for name in names:
            warm(features.paths())
            run = run_ours if name == "ours" else run_peer
            result = run(name, given, features, work)
            say(f"{repeat + 1} of {given.repeats}: {name} {result['seconds']:.2f} s")
            kept = results.setdefault(name, {**result, "all_seconds": [], "peaks": []})
            kept["all_seconds"].append(result["seconds"])
            kept["peaks"].append(result.get("peak_anonymous_bytes"))
            if result["seconds"] == middle(name, kept["all_seconds"]):
                kept["stages"], kept["cpu_seconds"] = result["stages"], result["cpu_seconds"]
    for name, result in results.items():
        peaks = result.pop("peaks")
        result["seconds"] = middle(name, result["all_seconds"])
        if name == "ours":
            result["peak_anonymous_bytes"] = max(peaks)
    return results


def middle(name: str, seconds: list[float]) -> float:
    """Return the time that stands for all repeats: the median; the floor's is its best."""
    return min(seconds) if name == "floor" else statistics.median_low(seconds)


def run_ours(
    name: str, given: argparse.Namespace, features: Features, work: Path
) -> dict[str, Any]:
    """Run ``snip dedup`` once; settings and stages come from the manifest."""
    del features
    out = work / name
    shutil.rmtree(out, ignore_errors=True)
    words = ["dedup", str(given.features), "--out", str(out), "--threshold", str(given.threshold)]
    words += shlex.split(given.ours_flags)
    timed = run_timed([sys.executable, "-m", "snipdedup", *words], work / f"{name}.log")
    manifest = json.loads((out / "snip.json").read_text(encoding="utf-8"))
    paths = ("features", "out", "metadata", "index", "encoder")
    return {
        "settings": {k: v for k, v in manifest["settings"].items() if k not in paths},
        "seconds": timed.seconds,
        "cpu_seconds": timed.cpu_seconds,
        "stages": manifest["seconds"],
        "peak_anonymous_bytes": timed.peak,
        "counts": manifest["counts"],
        "method": manifest["method"],
    }


def run_peer(
    name: str, given: argparse.Namespace, features: Features, work: Path
) -> dict[str, Any]:
    """Run a peer, or the floor, once."""
    settings = default_settings(name, features.rows, given.threshold, given.seed)
    out = work / f"{name}.npz"
    timed = run_timed(
        [
            sys.executable, str(ROOT / "scripts" / "peers.py"), name, "--features",
            str(given.features), "--settings", json.dumps(settings), "--out", str(out),
        ],
        work / f"{name}.log",
    )  # fmt: skip
    said = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    if name == "floor":
        return {"settings": settings, "seconds": min(said["stages"].values()), **said}
    return {
        "settings": settings,
        "seconds": timed.seconds + said["correction"],
        "cpu_seconds": timed.cpu_seconds,
        "process_seconds": timed.seconds,
        "extrapolated": name == "brute",
        **said,
    }


def load_answer(name: str, work: Path) -> Answer:
    """Read what a contender found: pairs and removed rows."""
    if name == "ours":
        import pyarrow.parquet as pq

        forest = pq.read_table(work / name / "forest.parquet")
        a, b = (forest[column].to_numpy() for column in ("a", "b"))
        return a, b, np.load(work / name / "is_dup.npy")
    with np.load(work / f"{name}.npz") as found:
        return found["a"], found["b"], found.get("removed")


def describe_truth(truth: Truth) -> dict[str, Any]:
    """Return the counts of brute force."""
    counts = {
        "full": truth.full,
        "judged": len(truth.judged),
        "distinct": int((truth.first == np.arange(truth.rows)).sum()),
        "pairs": len(truth.a),
        "judged_with_match": int(truth.matched()[truth.judged].sum()),
    }
    if truth.full:
        counts["beyond_one"] = int((truth.components() != np.arange(truth.rows)).sum())
        counts["removed_by_star"] = int(truth.star().sum())
    return counts


def say(text: str) -> None:
    """Show how far it is."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
