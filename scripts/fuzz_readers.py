"""Damaged and hostile files through every reader: each is read, or refused in one line.

    python scripts/fuzz_readers.py [--minutes 10] [--seed 0] [--readers npy,index] [--json FILE]

A case is a small sound file or folder in which one file is changed: bits flipped, bytes cut, put
in or overwritten, and, so that checksums do not hide the readers behind them, a header, one value
of a manifest, one array or one column replaced by a hostile one, with the manifest's SHA-256 set
right again. Cases run in child processes that may not take more than MEMORY beyond what they
started with, nor SECONDS of processor time a case. --only READER:CASE runs one again.

Outcomes: ``read``; ``refused`` (a SnipError, or an error of the system: ``snip`` prints both as one
line); anything else ``broke``: another exception, memory, time, or a signal. Exit status 1 then.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from snipdedup.config import Diff, Top
from snipdedup.deduplication.run import dedup
from snipdedup.encoder.network import Encoder, Network
from snipdedup.errors import SnipError
from snipdedup.features.shards import open_features
from snipdedup.index.folder import QUANTISER, Index
from snipdedup.index.quantizer import read_quantiser
from snipdedup.index.search import MappedLists
from snipdedup.inspection import diff, top
from snipdedup.inspection.search import read_vectors
from snipdedup.metadata.masks import open_mask
from snipdedup.metadata.tables import open_metadata
from snipdedup.storage import atomic
from snipdedup.storage.out_folder import MANIFEST

MEMORY = 1 << 29  # bytes
SECONDS = 20  # of processor time: a busy machine is no fault of a file
PATIENCE = 20  # times that, by the clock
BATCH = 100  # cases a child process
ROWS, DIM = 96, 16
WRONG: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, 1e308, 0.5, "", "x", "../../x", "/etc/passwd",
    "0" * 5000, [], [1], [[]], {}, {"x": 1}, [None], "ffffffff",
]  # fmt: skip


class Reader(NamedTuple):
    """What is read: which files of the corpus are changed, and how the folder is read then."""

    files: str
    read: Callable[[Path], object]


def read_features(folder: Path, *names: str) -> None:
    """Read rows as dedup does: in order with checksums, and some again."""
    for name in names:
        features = open_features(str(folder / name))
        features.checksums(0, features.read(0, min(features.rows, 1 << 16)))
        features.gather(np.array([0, features.rows // 2, features.rows - 1]))


def read_table(folder: Path, name: str) -> None:
    """Read metadata."""
    metadata = open_metadata(str(folder / name))
    for file in metadata.files:
        for _ in file.batches():
            pass


def read_index(folder: Path) -> None:
    """Read an index as dedup and search do."""
    index = Index(folder / "index")
    lists = index.lists()
    few = np.arange(min(len(lists.ids), 32))
    index.quantiser.decode(lists.list_at(few), lists.codes[few])
    index.bad_rows()
    mapped = MappedLists(index)
    mapped.visit(np.arange(min(index.nlist, 4)))
    if index.rows:
        mapped.vector_of(0)
    _ = index.encoder


def read_out(folder: Path) -> None:
    """Decide a finished run anew, look into it, compare it, take its mask."""
    out, refused = str(folder / "out"), None
    for use in (
        lambda: open_mask(out),
        lambda: top.run(Top(out=out)),
        lambda: diff.run(Diff(out1=out, out2=str(folder / "out2"))),
        lambda: dedup(out, threshold=0.97, out=str(folder / "new")),
    ):
        try:
            use()
        except (SnipError, OSError) as error:
            refused = error
    if refused is not None:
        raise refused


READERS = {
    "npy": Reader("a.npy", lambda folder: read_features(folder, "a.npy")),
    "npz": Reader("[sz].npz", lambda folder: read_features(folder, "s.npz", "z.npz")),
    "parquet": Reader("a.parquet", lambda folder: read_features(folder, "a.parquet")),
    "mask": Reader("m.npy", lambda folder: open_mask(str(folder / "m.npy"))),
    "vectors": Reader("[asz].np?", lambda folder: [
        read_vectors(path, None) for path in sorted(folder.glob("[asz].np?"))]),
    "metadata": Reader("meta.parquet", lambda folder: read_table(folder, "meta.parquet")),
    "csv": Reader("meta.csv", lambda folder: read_table(folder, "meta.csv")),
    "faiss": Reader("q.faiss", lambda folder: read_quantiser(folder / "q.faiss")),
    "encoder": Reader("encoder/*", lambda folder: Encoder.load(folder / "encoder", "cpu").encode(
        np.ones((2, DIM), np.float32))),
    "index": Reader("index/*", read_index),
    "out": Reader("out/*", read_out),
}  # fmt: skip


def make_corpus(folder: Path) -> None:
    """Write sound files of every kind."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((ROWS, DIM)).astype(np.float32)
    rows[ROWS // 2 :] = rows[: ROWS // 2] + 0.02 * rows[ROWS // 2 :]
    rows[5] = rows[4]
    np.save(folder / "a.npy", rows)
    np.savez(folder / "s.npz", x=rows)
    np.savez_compressed(folder / "z.npz", x=rows)
    np.save(folder / "m.npy", rng.random(ROWS) < 0.5)
    pq.write_table(pa.table({"x": list(rows)}), folder / "a.parquet", row_group_size=32)
    table = pa.table({
        "url": [f"http://x/{n}" for n in range(ROWS)],
        "caption": [f"a picture, {n}" for n in range(ROWS)],
        "width": np.arange(ROWS), "similarity": rng.random(ROWS),
    })  # fmt: skip
    pq.write_table(table, folder / "meta.parquet", row_group_size=32)
    import pyarrow.csv

    pyarrow.csv.write_csv(table, folder / "meta.csv")
    Encoder(Network(DIM, 8, 4)).save(folder / "encoder", {"settings": {}, "request": {}})
    snip("index", folder / "a.npy", "--out", folder / "index", "--nlist", 4, "--m", 4)
    shutil.copy(folder / "index" / QUANTISER, folder / "q.faiss")
    for name, threshold in (("out", 0.95), ("out2", 0.96)):
        flags = ["--threshold", threshold, "--metadata", folder / "meta.parquet"]
        snip("dedup", folder / "a.npy", "--out", folder / name, *flags)


def snip(*words: object) -> None:
    """Run the command line."""
    subprocess.run(
        [sys.executable, "-m", "snipdedup", *map(str, words)], check=True, capture_output=True
    )


# ---- changing a file


def change(path: Path, rng: np.random.Generator) -> None:
    """Change one file: by what it is, or by its bytes."""
    by_kind = {
        ".npy": change_npy, ".npz": change_npz, ".parquet": change_parquet, ".json": change_json,
        ".pt": change_weights,
    }.get(path.suffix)  # fmt: skip
    if by_kind is not None and rng.random() < 0.7:
        by_kind(path, rng)
    else:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
    manifest = path.parent / MANIFEST
    if manifest.is_file() and path != manifest and rng.random() < 0.8:
        vouch(manifest, path)


def vouch(manifest: Path, path: Path) -> None:
    """Set the manifest's checksum of a file right."""
    body = json.loads(manifest.read_text())
    entry = {"size": path.stat().st_size, "sha256": atomic.sha256(path)}
    body["outputs"][path.name] = entry
    manifest.write_text(json.dumps(body))


def change_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, cut, put in, overwrite."""
    found = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 1, 2, 8]))):
        size = len(found)
        at = int(rng.integers(0, max(size, 1)))
        if rng.random() < 0.5:  # headers and footers are where readers look
            at = int(rng.choice([at % max(min(size, 160), 1), max(size - 1 - at % 400, 0)]))
        kind = int(rng.integers(0, 6))
        few = int(rng.integers(1, 9))
        if kind == 0 and size:
            found[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            found[at:at] = rng.bytes(few)
        elif kind == 3:
            del found[at : at + few]
        elif kind == 4:
            found[at : at + 4] = int(rng.choice([0, 2**31 - 1, 2**32 - 1, 2**31, 255])).to_bytes(
                4, "little"
            )
        else:
            found[at : at + 8] = int(rng.choice([2**62, 2**63 - 1, 2**40, 1])).to_bytes(8, "little")
    return bytes(found)


def hostile_npy(rng: np.random.Generator, data: bytes = b"\0" * 64) -> bytes:
    """Return a .npy with a header that lies."""
    descr = rng.choice(np.array(
        ["'<f4'", "'<f2'", "'>f8'", "'|O'", "'|V0'", "'|S0'", "'<U99999999'", "[('a','<f4')]",
         "[('a','|O')]", "('<f4',(2,))", "'|b1'", "'<i8'", "'<f16'", "'<c8'", "None", "'<M8[s]'",
         "'|V2147483647'"], object))  # fmt: skip
    dim = ["0", "1", "-1", "96", "16", "2**9", str(2**31), str(2**62), str(2**80), "1.5", "None",
           "True", "-96"]  # fmt: skip
    shape = "(" + "".join(f"{rng.choice(dim)}," for _ in range(int(rng.integers(0, 4)))) + ")"
    order = rng.choice(["False", "True", "2"])
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    version = int(rng.choice([1, 1, 1, 2, 3, 9]))
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    if rng.random() < 0.1:
        size = b"\xff" * len(size)
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


def change_npy(path: Path, rng: np.random.Generator) -> None:
    """Give an array another header, or other values."""
    if rng.random() < 0.5:
        path.write_bytes(hostile_npy(rng, path.read_bytes()[128:]))
    else:
        np.save(path, hostile_array(np.load(path), rng), allow_pickle=True)


def hostile_array(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an array of another type, shape or with other values."""
    kind = int(rng.integers(0, 8))
    if kind == 0:
        return array.astype(rng.choice(["f2", "f8", "i8", "i4", "u1", "u8", "c16", "S4"]))
    if kind == 1:
        return array[: int(rng.integers(0, len(array) + 1))] if array.ndim else array[None]
    if kind == 2:
        return np.concatenate([array, array]) if array.ndim else np.array([array, array])
    if kind == 3:
        return array.reshape(-1) if array.ndim > 1 else array.reshape(1, -1)
    if kind == 4:
        return array.astype(object)
    if kind == 5:
        return np.asfortranarray(array)
    found = np.array(array)
    if not found.size:
        return found.astype("f4")
    place = int(rng.integers(0, found.size))
    with np.errstate(all="ignore"):
        value = rng.choice(np.array([-1, 0, 1, 2**31, 2**62, np.nan, np.inf, 1e30, -1e30]))
        found.reshape(-1)[place] = np.array(value).astype(found.dtype)
    return found


def change_npz(path: Path, rng: np.random.Generator) -> None:
    """Change one member of an archive, or the archive."""
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    name = str(rng.choice(list(held)))
    kind = int(rng.integers(0, 8))
    if kind == 0:
        held["../../" + name] = held.pop(name)
    elif kind == 1:
        del held[name]
    elif kind == 2:
        held |= {f"x{number}.npy": held[name] for number in range(2000)}
    elif kind == 3:
        held[name] = hostile_npy(rng, held[name][128:])
    elif kind == 4:  # a bomb: a header that is true, and rows of zeros that pack well
        shape = (1 << 26, DIM)
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
        header += b" " * (-(len(header) + 11) % 64) + b"\n"
        head = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
        held[name] = head + b"\0" * (1 << 20)  # of the 4 GiB it says; see `bomb` of the tests
    elif kind == 5:
        held[name] = change_bytes(held[name], rng)
    else:
        buffer = io.BytesIO()
        np.save(buffer, hostile_array(np.load(io.BytesIO(held[name])), rng), allow_pickle=True)
        held[name] = buffer.getvalue()
    packing = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", int(packing)) as archive:
        warnings.simplefilter("ignore")
        for member, data in held.items():
            archive.writestr(member, data)
    if rng.random() < 0.2:  # say another size, or that it is encrypted
        whole = bytearray(path.read_bytes())
        at = whole.rfind(b"PK\1\2")
        spot, value = [(24, 2**32 - 2), (20, 2**31), (8, 1), (24, 2**30), (10, 99)][
            int(rng.integers(0, 5))
        ]
        width = 4 if spot >= 20 else 2
        whole[at + spot : at + spot + width] = value.to_bytes(width, "little")
        path.write_bytes(bytes(whole))


def change_parquet(path: Path, rng: np.random.Generator) -> None:
    """Change one column of a table."""
    table = pq.read_table(path)
    at = int(rng.integers(0, table.num_columns))
    name, column = table.column_names[at], table.column(at)
    kind = int(rng.integers(0, 7))
    if kind == 0:
        table = table.remove_column(at)
    elif kind == 1:
        table = table.slice(0, int(rng.integers(0, table.num_rows + 1)))
    elif kind == 2:
        table = pa.concat_tables([table, table])
    elif kind == 3:
        nulls = pa.array(rng.random(table.num_rows) < 0.2)
        import pyarrow.compute as pc

        table = table.set_column(at, name, pc.if_else(nulls, None, column))
    elif kind == 4:
        table = table.set_column(at, name, pa.array([f"{x}" for x in column.to_pylist()]))
    elif kind == 5 and pa.types.is_primitive(column.type) and len(column):
        values = column.to_numpy(zero_copy_only=False)
        table = table.set_column(at, name, pa.array(hostile_array(values, rng).ravel()[:0]
            if table.num_rows == 0 else np.resize(
                _plain(hostile_array(values, rng)), table.num_rows)))  # fmt: skip
    else:
        table = table.append_column(name, column)
    pq.write_table(table, path)


def _plain(array: np.ndarray) -> np.ndarray:
    return array.astype("f8") if array.dtype.kind in "OSc" or not array.size else array.ravel()


def change_json(path: Path, rng: np.random.Generator) -> None:
    """Replace, drop or add one value anywhere in a JSON file."""
    body = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            places.append((value, key))
            if isinstance(inner, dict | list):
                walk(inner)

    walk(body)
    holder, key = places[int(rng.integers(0, len(places)))]
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = WRONG[int(rng.integers(0, len(WRONG)))]
    if rng.random() < 0.03:
        body = [body]
    if rng.random() < 0.02:
        path.write_text("[" * 100_000)
        return
    path.write_text(json.dumps(body))


class Evil:
    """Leaves a mark if it is ever unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("EXECUTED",)


def change_weights(path: Path, rng: np.random.Generator) -> None:
    """Put other tensors, a pickle, or a lying archive in the place of weights."""
    import pickle

    import torch

    state = torch.load(path, weights_only=True)
    name = str(rng.choice(list(state)))
    kind = int(rng.integers(0, 7))
    if kind == 0:
        path.write_bytes(pickle.dumps(Evil()))
        return
    if kind == 1:
        state[name] = Evil()
    elif kind == 2:
        del state[name]
    elif kind == 3:
        state[name] = state[name].repeat(2, *[1] * (state[name].ndim - 1))
    elif kind == 4:
        state[name] = [1, 2]
    elif kind == 5:
        state = list(state.values())
    else:
        change_npz_bytes(path, rng)
        return
    torch.save(state, path)


def change_npz_bytes(path: Path, rng: np.random.Generator) -> None:
    """Change the bytes of one member of an archive, checksums set right."""
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    name = str(rng.choice(list(held)))
    held[name] = change_bytes(held[name], rng)
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in held.items():
            archive.writestr(member, data)


# ---- running cases


def run_case(name: str, seed: int, corpus: Path) -> str:
    """Run one case in this process; return its outcome."""
    reader, rng = READERS[name], np.random.default_rng([seed, sorted(READERS).index(name)])
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = Path(place) / "x"
        shutil.copytree(corpus, folder)
        os.chdir(place)
        paths = sorted(path for path in folder.glob(reader.files) if path.is_file())
        change(paths[int(rng.integers(0, len(paths)))], rng)
        limit(SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(folder)
            said = "read"
        except (SnipError, OSError) as error:
            long = len(str(error).splitlines()) > 6
            said = "broke: a refusal of many lines" if long else "refused"
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)
            ours = [f for f in last if "/snipdedup/" in f.filename][-1:]
            where = f"{Path(ours[0].filename).name}:{ours[0].lineno}" if ours else "?"
            said = f"broke: {type(error).__name__} at {where}: {str(error)[:100]!r}"
        finally:
            limit(0)
            os.chdir("/")
        if (Path(place) / "EXECUTED").exists():
            said = "broke: CODE WAS RUN"
        return said


def limit(seconds: int) -> None:
    """End the process after so much processor time, or far more by the clock; 0: do not."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(seconds * PATIENCE)


def run_batch(name: str, first: int, count: int, corpus: Path) -> list[tuple[int, str]]:
    """Run cases in a child; a case that ends it is noted, and the next child goes on after it."""
    outcomes: list[tuple[int, str]] = []
    while len(outcomes) < count:
        begin = first + len(outcomes)
        take, give = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(take)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                bound = data_size() + MEMORY
                resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.signal(signal.SIGPROF, signal.SIG_DFL)
                for seed in range(begin, first + count):
                    os.write(give, (json.dumps(run_case(name, seed, corpus)) + "\n").encode())
                status = 0
            finally:
                os._exit(status)
        os.close(give)
        with os.fdopen(take) as lines:
            said = [json.loads(line) for line in lines]
        _, status = os.waitpid(child, 0)
        outcomes += [(begin + number, text) for number, text in enumerate(said)]
        if len(outcomes) < count:
            number = os.waitstatus_to_exitcode(status)
            end = (
                "time"
                if -number in (signal.SIGALRM, signal.SIGPROF)
                else f"the process ended with {number}"
            )
            outcomes.append((first + len(outcomes), f"broke: {end}"))
    return outcomes


def data_size() -> int:
    """Return the private writable memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData"):
            return int(line.split()[1]) * 1024
    return 0


def fuzz(
    names: Sequence[str], seed: int, minutes: float, batch: int = BATCH, most: int | None = None
) -> dict[str, list[tuple[int, str]]]:
    """Run batches of each reader in turn until time is up, or ``most`` cases each are done."""
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as place:
        make_corpus(Path(place))
        end, first = time.monotonic() + 60 * minutes, seed * 10**9
        while time.monotonic() < end and (most is None or first - seed * 10**9 < most):
            for name in names:
                found[name] += run_batch(name, first, batch, Path(place))
            first += batch
    return found


def table(found: dict[str, list[tuple[int, str]]]) -> str:
    """Return counts by reader and outcome."""
    lines = [f"{'reader':<10} {'cases':>8} {'read':>8} {'refused':>8} {'broke':>8}"]
    for name, outcomes in found.items():
        counts = Counter(said.split(":")[0] for _, said in outcomes)
        said = "".join(f" {counts[kind]:>8,}" for kind in ("read", "refused", "broke"))
        lines.append(f"{name:<10} {len(outcomes):>8,}{said}")
    return "\n".join(lines)


def broken(found: dict[str, list[tuple[int, str]]]) -> list[str]:
    """Return each way to break once, with how often and a case."""
    seen: dict[str, list[int]] = {}
    for name, outcomes in found.items():
        for seed, said in outcomes:
            if said.startswith("broke"):
                seen.setdefault(f"{name} {said}", []).append(seed)
    return [f"{len(seeds):6,} x {said} (case {seeds[0]})" for said, seeds in sorted(seen.items())]


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz and print; exit status 1 if anything broke."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--only", help="READER:CASE")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    if given.only:
        name, case = given.only.split(":")
        with tempfile.TemporaryDirectory() as place:
            make_corpus(Path(place))
            print(run_batch(name, int(case), 1, Path(place))[0][1])
        return 0
    found = fuzz(given.readers.split(","), given.seed, given.minutes)
    print(table(found))
    lines = broken(found)
    print("\n".join(lines))
    if given.json:
        atomic.save_json(given.json, {name: dict(Counter(s for _, s in said))
                                     for name, said in found.items()})  # fmt: skip
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
