"""Encode tasks: a range of rows becomes int8 codes, sorted by the lists that rows live in or visit.

Each task reads its rows once and leaves one folder that is complete or absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from snipdedup.features.cosine import Directions
from snipdedup.features.scan import Scan, Seen, read_range
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.join.forest import Edges, make_edges
from snipdedup.join.hubs import ABSORBED, BESIDE, Hubs, Placed
from snipdedup.join.lists import Lists, Visits, assign
from snipdedup.join.model import Model
from snipdedup.storage import atomic
from snipdedup.storage.external_sort import among


def task_rows(rows: int) -> int:
    """Return the rows of an encode task: many tasks for small sets, few files for large ones."""
    return 1 << 15 if rows < 1 << 25 else 1 << 18


def encode_spans(rows: int) -> list[tuple[int, int]]:
    """Return the rows of each encode task."""
    return plan_blocks(rows, task_rows(rows))


def encode_task(
    features: Features,
    model: Model,
    folder: Path,
    begin: int,
    end: int,
    *,
    chunk_rows: int,
    frozen: int,
) -> None:
    """Encode rows ``begin`` to ``end`` and write them sorted by list, rows at home first.

    Where more than half of the rows are frozen, they stay at home and the others come to them.
    """
    still = frozen if frozen > features.rows // 2 else 0
    codes = np.empty((end - begin, model.projection.width), np.int8)
    slack = np.empty(end - begin, np.float32)
    visits: list[Visits] = []
    absorbed: list[Placed] = []

    def encode(first: int, raw: np.ndarray, rows: Directions) -> None:
        at = slice(first - begin, first - begin + len(raw))
        codes[at], excess = model.projection.encode_directions(rows)
        slack[at] = model.projection.slack(excess)
        placed = model.hubs.place(codes[at], slack[at], raw)
        far = how_far(placed, model.lists, max(0, still - first), still > 0)
        found = assign(codes[at], model.lists, far)
        visits.append(found._replace(row=found.row + np.int32(first - begin)))
        absorbed.append(placed._replace(row=placed.row + first))

    seen = read_range(features, begin, end, chunk_rows=chunk_rows, visit=encode)
    row, list_, home = (np.concatenate(column) for column in zip(*visits, strict=True))
    order = sort_small(2 * list_ + ~home, 2 * model.lists.nlist)
    row, list_, home = row[order], list_[order], home[order]
    edges = np.arange(model.lists.nlist + 1)
    arrays = {
        "codes": np.take(codes, row, axis=0),
        "rows": row + np.int64(begin),
        "slack": slack[row],
        "starts": np.searchsorted(list_, edges),
        "homes": np.bincount(list_[home], minlength=model.lists.nlist),
        "hashes": seen.load_hashes(),
        "bad": seen.bad,
    }
    for name, array in arrays.items():
        atomic.save_npy(folder / f"{name}.npy", array, lasting=False)
    names = ("row", "hub", "similarity")
    atomic.save_npz(
        folder / "absorbed.npz",
        lasting=False,
        **{name: np.concatenate([getattr(p, name) for p in absorbed]) for name in names},
    )
    files = [*(folder / f"{name}.npy" for name in arrays), folder / "absorbed.npz"]
    atomic.write_done_file(folder / "done.json", files, {"checksums": seen.checksums})


def how_far(placed: Placed, lists: Lists, still: int, others_come: bool) -> np.ndarray:
    """Return how far from borders each row of a block visits, (n,) float32.

    Absorbed rows stay at home, and so do the first ``still`` rows; who may pair with a row that
    stays at home must come to it.
    """
    usual = lists.alone if others_come else lists.tau
    far = np.full(len(placed.reach), usual, np.float32)
    far[:still] = 0
    far[placed.reach == BESIDE] = lists.alone
    far[placed.reach == ABSORBED] = 0
    return far


def sort_small(keys: np.ndarray, count: int) -> np.ndarray:
    """Return the stable order of keys below ``count``; numpy sorts 16-bit keys by radix."""
    return np.argsort(keys.astype(np.uint16 if count <= 1 << 16 else np.uint32), kind="stable")


def load_seen(folder: Path) -> Seen:
    """Read back what an encode task saw."""
    done = atomic.load_json(folder / "done.json")
    return Seen(done["checksums"], np.load(folder / "bad.npy"), folder / "hashes.npy")


def absorbed_edges(
    folders: list[Path], hubs: Hubs, seen: Scan, skip: np.ndarray
) -> Iterator[Edges]:
    """Yield the pairs of hubs, and what joins the absorbed rows of each encode task with theirs.

    Rows of masses whose hubs are a pair do not visit one another's lists. A hub that turned out to
    be a copy stands for the row that it copies, as all copies do.
    """
    rows = hubs.row.copy()
    found = np.flatnonzero(among(seen.copies, rows))
    rows[found] = seen.firsts[np.searchsorted(seen.copies, rows[found])]
    yield dataclasses.replace(hubs, row=rows).edges()
    for folder in folders:
        with np.load(folder / "absorbed.npz", allow_pickle=False) as file:
            row, hub, similarity = file["row"], rows[file["hub"]], file["similarity"]
        use = ~skip[row] & (row != hub)
        yield make_edges(row[use], hub[use], similarity[use])
