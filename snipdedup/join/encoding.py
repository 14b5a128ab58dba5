"""Encode tasks: a range of rows becomes int8 codes, and the lists that the rows live in or visit.

Each task reads its rows once and leaves one folder that is complete or absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from snipdedup.features.scan import Scan, Seen, read_range
from snipdedup.features.shards import Features
from snipdedup.join.forest import Edges, make_edges
from snipdedup.join.hubs import ABSORBED, BESIDE, Hubs, Placed
from snipdedup.join.lists import CoarseLists, Visits, assign_lists
from snipdedup.join.model import Model
from snipdedup.join.tiles import code_record
from snipdedup.storage import atomic
from snipdedup.storage.external_sort import among


def task_rows(rows: int) -> int:
    """Return the rows of an encode task: many tasks for small sets, few files for large ones."""
    return min(1 << 18, max(1 << 15, 1 << (rows >> 7).bit_length()))


def encode_task(
    features: Features,
    model: Model,
    folder: Path,
    begin: int,
    end: int,
    *,
    chunk_rows: int,
    reference_rows: int = 0,
) -> None:
    """Encode rows ``begin`` to ``end``; write their codes, and which rows each list has.

    Codes are in row order, the rows of a list ascending, those at home first.

    If most rows are references, these stay in their lists and only the others visit.
    """
    staying = reference_rows if reference_rows > features.rows // 2 else 0
    count = end - begin
    codes = np.zeros(count, code_record(model.widths))
    visits: list[Visits] = []
    absorbed: list[Placed] = []

    def encode(first: int, raw: np.ndarray, whole: np.ndarray) -> None:
        at = slice(first - begin, first - begin + len(raw))
        narrow, falls = model.narrow.encode_block(raw, whole)
        codes["narrow"][at], codes["falls"][at] = narrow, falls
        sharpest = narrow, falls
        if model.wide is not None:
            sharpest = model.wide.encode_block(raw, whole)
            codes["wide"][at], codes["wide_falls"][at] = sharpest
        placed = model.hubs.place(*sharpest, raw)
        radius = visit_radius(placed, model.lists, staying - first, one_sided=staying > 0)
        found = assign_lists(narrow, model.lists, radius)
        visits.append(found._replace(row=found.row + np.int32(first - begin)))
        absorbed.append(placed._replace(row=placed.row + first))

    seen = read_range(features, begin, end, chunk_rows=chunk_rows, visit=encode)
    row, list_, home = (np.concatenate(column) for column in zip(*visits, strict=True))
    order = sort_small(2 * list_ + ~home, 2 * model.lists.nlist)
    row, list_, home = row[order], list_[order], home[order]
    arrays = {
        "codes": codes,
        "rows": row + np.int64(begin),
        "starts": np.searchsorted(list_, np.arange(model.lists.nlist + 1)),
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


def visit_radius(
    placed: Placed, lists: CoarseLists, staying: int, *, one_sided: bool
) -> np.ndarray:
    """Return the visit radius of each row of a block, (n,) float32.

    Absorbed rows stay in their lists, and so do the first ``staying`` rows of the block. A row that
    may pair with one that stays must visit that one's list.
    """
    radius = np.full(len(placed.zone), lists.one_sided_tau if one_sided else lists.tau, np.float32)
    radius[: max(0, staying)] = 0
    radius[placed.zone == BESIDE] = lists.one_sided_tau
    radius[placed.zone == ABSORBED] = 0
    return radius


def sort_small(keys: np.ndarray, count: int) -> np.ndarray:
    """Return the stable order of keys below ``count``; numpy sorts 16-bit keys by radix."""
    return np.argsort(keys.astype(np.uint16 if count <= 1 << 16 else np.uint32), kind="stable")


def load_seen(folder: Path) -> Seen:
    """Read what an encode task saw of its rows."""
    done = atomic.load_json(folder / "done.json")
    return Seen(done["checksums"], np.load(folder / "bad.npy"), folder / "hashes.npy")


def absorbed_edges(
    folders: list[Path], hubs: Hubs, scan: Scan, skip: np.ndarray
) -> Iterator[Edges]:
    """Yield the pairs of hubs, and the edges of the absorbed rows of each encode task to theirs.

    Rows whose hubs are a pair do not visit one another's lists. A hub that is a copy stands for the
    row that it copies, as all copies do.
    """
    rows, pairs = hubs.row.copy(), hubs.pairs()
    copies = np.flatnonzero(among(scan.copies, rows))
    rows[copies] = scan.firsts[np.searchsorted(scan.copies, rows[copies])]
    yield make_edges(rows[pairs.a], rows[pairs.b], pairs.similarity)
    for folder in folders:
        with np.load(folder / "absorbed.npz", allow_pickle=False) as file:
            row, hub, similarity = file["row"], rows[file["hub"]], file["similarity"]
        use = ~skip[row] & (row != hub)
        yield make_edges(row[use], hub[use], similarity[use])
