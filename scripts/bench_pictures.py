"""Copies of pictures found by hashes and a learned model, beside imagededup and ImageHash.

    python scripts/bench_pictures.py --work FOLDER [--photos FOLDER] [--pictures 2000] \
        [--peers PYTHON] [--learned MODEL [--learned_every 8]] [--untimed] [--json FILE]

Two pictures are copies if they are edits of one; see scripts/picture_set.py. A method's bits, or
features, are compared pair by pair, and judged at each distance alike: *precision* is the share of
copies among all pairs of files within it, *recall* the share of edits within it of their original.
PYTHON has the packages of scripts/picture_peers.py. What is in FOLDER already is not made again.
"some" are each eighth picture with its edits, as a learned model takes long on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from picture_set import EDITS, make

import snipdedup
from snipdedup.pictures.decode import decode
from snipdedup.pictures.models import open_model

HASHES = ("phash", "pdq")
PEERS = {  # name, and the distance that its documents or defaults give
    "imagededup-PHash": 10, "imagededup-DHash": 10, "imagehash-8": 10, "imagehash-16": 31,
}  # fmt: skip
PRECISIONS = (0.95, 0.99, 0.995, 0.998)
STEPS = 2000  # cosines of a learned model are counted in so many steps
BLOCK = 1024  # rows compared at a time
TIMED, REPEATS = 300, 3
MATCHED = 100_000  # rows of the matching
FOUND = [edit for edit in EDITS if edit not in ("original", "rotate90", "mirror")]


class Rows(NamedTuple):
    """What a method makes of the files: unit rows, and steps of 1 − cosine to count in."""

    names: list[str]
    rows: np.ndarray
    steps: int
    usual: int  # the step that its own threshold is


class Curve(NamedTuple):
    """For each step: precision, pairs that are no copies, and recall by edit."""

    precision: np.ndarray
    wrong: np.ndarray
    recall: dict[str, np.ndarray]


def ours(model: str, pictures: Path, work: Path) -> Rows:
    """Return what ``snip embed`` writes."""
    out = work / f"ours-{pictures.name}-{Path(model).stem.replace(':', '_')}"
    snipdedup.embed(str(pictures), out=str(out), model=model)
    manifest = json.loads((out / "snip.json").read_text(encoding="utf-8"))
    parts = sorted((out / "img_emb").iterdir())
    rows = np.concatenate([np.load(part).astype(np.float32) for part in parts])
    keys = pq.read_table(out / "metadata").column("key").to_pylist()
    steps = manifest["model"].get("bits", STEPS)
    usual = round((1 - manifest["model"]["threshold"]) / 2 * steps)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Rows([Path(key).name for key in keys], rows, steps, usual)


def part_of(pictures: Path, out: Path, every: int) -> Path:
    """Return a folder of links to the files of each ``every``th picture."""
    out.mkdir(exist_ok=True)
    numbers = sorted({path.name.partition("_")[0] for path in pictures.iterdir()})[::every]
    for path in pictures.iterdir():
        if path.name.partition("_")[0] in numbers and not (out / path.name).exists():
            (out / path.name).hardlink_to(path)
    return out


def theirs(name: str, pictures: Path, work: Path, python: str) -> Rows:
    """Return the bits that another tool makes."""
    found = work / f"{name}.npz"
    if not found.exists():
        run_peer(python, name, pictures, found)
    body = np.load(found)
    bits = body["bits"]
    rows = np.where(bits, 1, -1).astype(np.float32) / np.float32(np.sqrt(bits.shape[1]))
    names = [Path(name).stem for name in body["names"].tolist()]
    return Rows(names, rows, bits.shape[1], PEERS[name])


def run_peer(python: str, *words: Any) -> None:
    """Run scripts/picture_peers.py."""
    script = str(Path(__file__).with_name("picture_peers.py"))
    subprocess.run([python, script, *map(str, words)], check=True)


def judge(given: Rows) -> Curve:
    """Compare all pairs."""
    source = np.array([int(name.partition("_")[0]) for name in given.names])
    edit = np.array([name.partition("_")[2] for name in given.names])
    right, wrong = np.zeros(given.steps + 1, np.int64), np.zeros(given.steps + 1, np.int64)
    place = np.arange(len(source))
    for low in range(0, len(source), BLOCK):
        at = slice(low, low + BLOCK)
        step = distances(given.rows[at] @ given.rows[low:].T, given.steps)
        later = place[low:] > place[at, None]
        same = source[low:] == source[at, None]
        right += np.bincount(step[later & same], minlength=given.steps + 1)
        wrong += np.bincount(step[later & ~same], minlength=given.steps + 1)
    original = {source[i]: i for i in np.flatnonzero(edit == "original")}
    recall = {}
    for name in list(EDITS)[1:]:
        edited = np.flatnonzero(edit == name)
        first = np.array([original[each] for each in source[edited]])
        cosines = np.einsum("ij,ij->i", given.rows[edited], given.rows[first])
        counts = np.bincount(distances(cosines, given.steps), minlength=given.steps + 1)
        recall[name] = counts.cumsum() / len(edited)
    right, wrong = right.cumsum(), wrong.cumsum()
    return Curve(right / np.maximum(right + wrong, 1), wrong, recall)


def distances(cosines: np.ndarray, steps: int) -> np.ndarray:
    """Return the step of each cosine, from 0 for 1 to ``steps`` for −1; of hashes the distance."""
    return np.clip(np.rint((1 - cosines) / 2 * steps), 0, steps).astype(np.int64)


def at_step(curve: Curve, step: int) -> dict[str, Any]:
    """Return the figures at a distance."""
    recall = {edit: round(float(values[step]), 4) for edit, values in curve.recall.items()}
    mean = float(np.mean([recall[edit] for edit in FOUND]))
    return {
        "distance": step, "precision": round(float(curve.precision[step]), 5),
        "wrong_pairs": int(curve.wrong[step]), "recall": recall, "mean": round(mean, 4),
    }  # fmt: skip


def at_precision(curve: Curve, precision: float) -> dict[str, Any] | None:
    """Return the figures at the largest distance up to which precision is at least so high."""
    low = np.flatnonzero(curve.precision < precision)
    step = (int(low[0]) if len(low) else len(curve.precision)) - 1
    return at_step(curve, step) if step >= 0 else None


def time_ours(name: str, paths: list[Path]) -> float:
    """Return milliseconds a picture of reading, decoding and hashing, in one process."""
    model, best = open_model(name), np.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        for path in paths:
            model.prepare(decode(path.read_bytes(), model.size).picture)
        best = min(best, time.perf_counter() - start)
    return 1e3 * float(best) / len(paths)


def time_theirs(name: str, folder: Path, python: str, work: Path) -> float:
    """Return the same of another tool."""
    best = np.inf
    for _ in range(REPEATS):
        run_peer(python, name, folder, work / "timed.npz")
        best = min(best, float(np.load(work / "timed.npz")["seconds"]))
    return 1e3 * float(best) / len(list(folder.iterdir()))


def time_matching(work: Path, python: str | None) -> dict[str, float]:
    """Return the seconds to find what is near among random hashes, a tenth of them copies."""
    rng = np.random.default_rng(0)
    rows = rng.choice(np.array([-1, 1], np.float16) / 16, (MATCHED, 256))
    near = rng.choice(MATCHED, MATCHED // 10, replace=False)
    rows[near] = rows[(near + 1) % MATCHED]
    rows[near, :8] *= -1
    np.save(work / "random.npy", rows)
    start = time.perf_counter()
    words = ["dedup", work / "random.npy", "--out", work / "matched", "--threshold", 0.75]
    command = [sys.executable, "-m", "snipdedup", *map(str, words), "--overwrite"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = {"snip dedup": time.perf_counter() - start}
    if python is not None:
        run_peer(python, "match-PHash", MATCHED, work / "timed.npz")
        seconds["imagededup-PHash"] = float(np.load(work / "timed.npz")["seconds"])
    return {name: round(each, 2) for name, each in seconds.items()}


def times(files: list[Path], work: Path, python: str | None) -> dict[str, Any]:
    """Return the milliseconds of a picture, and the seconds of matching 100,000 rows."""
    sample = work / "sample"
    sample.mkdir(exist_ok=True)
    for path in files[:: max(1, len(files) // TIMED)]:
        (sample / path.name).write_bytes(path.read_bytes())
    hashing = {name: time_ours(name, sorted(sample.iterdir())) for name in HASHES}
    if python is not None:
        hashing |= {name: time_theirs(name, sample, python, work) for name in PEERS}
    return {"ms_a_picture": hashing, "matching_100k_seconds": time_matching(work, python)}


def table(body: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = []
    for title in body["methods"] and body["methods"][next(iter(body["methods"]))]["at"]:
        lines += [f"\n{title}\n", f"| method | distance | precision | {' | '.join(EDITS_SHOWN)} |"]
        lines += ["|---" * (3 + len(EDITS_SHOWN)) + "|"]
        for name, method in body["methods"].items():
            found = method["at"][title]
            if found is None:
                lines.append(f"| {name} | none |" + " |" * (1 + len(EDITS_SHOWN)))
                continue
            cells = [f"{found['recall'][edit]:.3f}" for edit in EDITS_SHOWN]
            place = f"{found['distance']} of {method['steps']}"
            lines.append(f"| {name} | {place} | {found['precision']:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


EDITS_SHOWN = list(EDITS)[1:]


def main() -> None:
    """Make what is missing, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--peers")
    parser.add_argument("--learned", help="a model of snip embed, such as torchscript:FILE")
    parser.add_argument("--learned_every", type=int, default=8, help="it gets each so manyth")
    parser.add_argument("--untimed", action="store_true", help="judge only; measure no time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work, pictures = options.work, options.work / "pictures"
    if not pictures.exists():
        print(make(pictures, options.pictures, options.photos), file=sys.stderr)
    methods = {name: ours(name, pictures, work) for name in HASHES}
    if options.learned:
        some = part_of(pictures, work / "some", options.learned_every)
        learned = ours(options.learned, some, work)
        methods[f"{Path(options.learned).stem}, some"] = learned
        methods["phash, some"] = ours("phash", some, work)
    if options.peers:
        methods |= {name: theirs(name, pictures, work, options.peers) for name in PEERS}
    files = sorted(pictures.iterdir())
    body: dict[str, Any] = {"kind": "pictures", "files": len(files), "methods": {}}
    for name, rows in methods.items():
        curve = judge(rows)
        at: dict[str, Any] = {"own threshold": at_step(curve, rows.usual)}
        at |= {f"precision {least}": at_precision(curve, least) for least in PRECISIONS}
        body["methods"][name] = {"steps": rows.steps, "at": at}
    if not options.untimed:
        body |= times(files, work, options.peers)
    if options.json:
        options.json.write_text(json.dumps(body, indent=1), encoding="utf-8")
    print(table(body))
    for name in () if options.untimed else ("ms_a_picture", "matching_100k_seconds"):
        print(f"{name}: {body[name]}")


if __name__ == "__main__":
    main()
