"""Method adc beside faiss's own search of the same index: flags, CPU seconds and wall seconds.

    python scripts/bench_adc.py --features FOLDER --encoder DIR [--code_bytes 4 8 16] [--json FILE]

For each code size an index is built, and written as one faiss file. ``snip`` is the whole search of
``snip dedup --method adc`` up to candidate pairs: rows are read and encoded, searched for, the
margin is calibrated on sampled rows, and all pairs are scored. ``faiss`` is ``search`` of the
written index, with the same lists visited and the same k, on descriptors that are ready; the least
of --repeats. Both run in this process, with as many threads. ``search alone`` is snip without the
encoder, and without the brute force that tells which of the sampled rows are duplicated.

Precision and recall are of the flags, against a brute force of cosines for --sample rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import faiss
import numpy as np
from timing import machine

from snipdedup import config, native
from snipdedup.adc import pairs
from snipdedup.adc.threshold import true_duplicates
from snipdedup.features.shards import Features, open_features
from snipdedup.index.build import build
from snipdedup.index.folder import Index, export_faiss
from snipdedup.parallel import library_threads

RULES = ("two_sided", "difference")
THRESHOLD, PRECISION, CALIBRATION_ROWS = 0.95, 0.91, 4096


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    given = parse(argv)
    features = open_features(given.features)
    rng = np.random.default_rng(given.seed)
    sample = np.sort(rng.choice(features.rows, min(given.sample, features.rows), replace=False))
    truth = true_duplicates(features, sample, THRESHOLD, given.threads)
    results = []
    with library_threads(given.threads):
        for m in given.code_bytes:
            with tempfile.TemporaryDirectory() as folder:
                options = {"encoder": given.encoder, "m": m, "nlist": given.nlist}
                out = Path(given.indexes or folder) / f"index_{m}"
                settled = config.BuildIndex(features=None, out=str(out), seed=given.seed, **options)
                results += measure(build(features, out, settled), features, sample, truth, given)
    print(table(results, features, truth, given))
    if given.json:
        body = {
            "machine": machine(),
            "kernels": native.used(),
            "settings": {**vars(given), "json": None},
            "rows": features.rows,
            "judged": len(truth),
            "duplicates": int(truth.sum()),
            "results": results,
        }
        Path(given.json).write_text(json.dumps(body, indent=2, default=str) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature shards")
    parser.add_argument("--encoder", help="folder of an encoder; without it rows as they are")
    parser.add_argument("--indexes", help="folder to keep the indexes in, and to find them again")
    parser.add_argument("--code_bytes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--nlist", type=int, default=1024)
    parser.add_argument("--nprobe", type=int, default=4)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--sample", type=int, default=8192, help="rows judged by brute force")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="of faiss's search")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="also write the results here")
    return parser.parse_args(argv)


class TimedEncoder:
    """An encoder, or what takes its place, that adds up the CPU seconds that it takes."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.dim_in, self.dim = encoder, encoder.dim_in, encoder.dim
        self.seconds: list[float] = []

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Return what is quantised."""
        start = time.thread_time()
        found = self.encoder.encode(rows)
        self.seconds.append(time.thread_time() - start)
        return np.asarray(found)


brute_force: list[float] = []  # CPU seconds of each call


def timed_truth(*arguments: Any) -> np.ndarray:
    """Return what `true_duplicates` does."""
    found, cpu, _ = timed(partial(true_duplicates, *arguments))
    brute_force.append(cpu)
    return np.asarray(found)


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what ``work`` returns, its CPU seconds in all threads, and its wall seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.process_time() - cpu, time.perf_counter() - start


def measure(
    index: Index,
    features: Features,
    sample: np.ndarray,
    truth: np.ndarray,
    given: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Return a result a rule for one index; faiss is measured before and after each."""
    vectors = every_vector(index, features)
    encoder, results = index.encoder, []
    with tempfile.TemporaryDirectory() as folder:
        export_faiss(index, Path(folder) / "plain.faiss")
        plain: Any = faiss.read_index(str(Path(folder) / "plain.faiss"))
        plain.nprobe = given.nprobe
        for rule in given.rules:
            work = Path(folder) / rule
            work.mkdir()
            timed_encoder: Any = TimedEncoder(encoder)
            index.encoder = timed_encoder
            with mock.patch.object(pairs, "true_duplicates", timed_truth):
                flags, cpu, wall = timed(partial(flag_rows, index, features, rule, work, given))
            peers = [timed(partial(plain.search, vectors, given.k)) for _ in range(given.repeats)]
            right, flagged = int((flags[sample] & truth).sum()), int(flags[sample].sum())
            encoder_cpu, truth_cpu = sum(timed_encoder.seconds), brute_force[-1]
            results.append(
                {
                    "code_bytes": index.code_size,
                    "rule": rule,
                    "precision": right / max(flagged, 1),
                    "recall": right / max(int(truth.sum()), 1),
                    "flags": int(flags.sum()),
                    "cpu": cpu,
                    "wall": wall,
                    "encoder_cpu": encoder_cpu,
                    "truth_cpu": truth_cpu,
                    "alone_cpu": cpu - encoder_cpu - truth_cpu,
                    "faiss_cpu": min(peer[1] for peer in peers),
                    "faiss_wall": min(peer[2] for peer in peers),
                }
            )
            print(json.dumps(results[-1]), flush=True)
        index.encoder = encoder
    return results


def every_vector(index: Index, features: Features) -> np.ndarray:
    """Return all rows as they were quantised, (n, dim) float32."""
    blocks = [index.encoder.encode(rows) for _, rows in features.blocks(4096)]
    return np.concatenate(blocks)


def flag_rows(
    index: Index, features: Features, rule: str, work: Path, given: argparse.Namespace
) -> np.ndarray:
    """Return the flags of all rows by the search of method adc."""
    flags = np.zeros(features.rows, bool)
    _, blocks = pairs.candidate_pairs(
        index, features, rule=rule, margin=None, precision=PRECISION, threshold=THRESHOLD,
        calibration_rows=CALIBRATION_ROWS, seed=0, k=given.k, nprobe=given.nprobe, encoder=None,
        work=work, threads=given.threads,
    )  # fmt: skip
    for block in blocks:
        flags[block.flagged] = True
    return flags


def table(
    results: list[dict[str, Any]], features: Features, truth: np.ndarray, given: argparse.Namespace
) -> str:
    """Return the results as Markdown."""
    lines = [
        f"{features.rows:,} rows, {len(truth):,} judged, {int(truth.sum()):,} of them duplicated "
        f"at cosine {THRESHOLD}; {given.nlist:,} lists, nprobe {given.nprobe}, k {given.k}, "
        f"{given.threads} thread(s); CPU seconds, and in brackets times faiss",
        "",
        "| bytes | rule | precision | recall | faiss | search alone | encoder | truth | snip | "
        "wall of faiss | wall of snip |",
        "|--:|---|" + "--:|" * 9,
    ]
    for r in results:
        alone, whole = r["alone_cpu"] / r["faiss_cpu"], r["cpu"] / r["faiss_cpu"]
        lines.append(
            f"| {r['code_bytes']} | {r['rule']} | {r['precision']:.3f} | {r['recall']:.3f} | "
            f"{r['faiss_cpu']:.2f} | {r['alone_cpu']:.2f} ({alone:.1f}) | {r['encoder_cpu']:.2f} | "
            f"{r['truth_cpu']:.2f} | {r['cpu']:.2f} ({whole:.1f}) | {r['faiss_wall']:.2f} | "
            f"{r['wall']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
