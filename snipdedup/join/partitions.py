"""Partitions: the rows of a run of lists, brought together from what the encode tasks left."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from snipdedup.join.encoding import sort_small
from snipdedup.join.tiles import COLUMN_TILE


class Partition(NamedTuple):
    """The rows of a run of lists, sorted by list, rows at home before visitors.

    Attributes
    ----------
    row : (v,) int64
        Global rows.
    codes : (v, w) int8
    slack : (v,) float64
        By how much each row's limit falls.
    starts, homes : (lists + 1,), (lists,) int64
        Where each list begins, and how many of its rows live there.
    """

    row: np.ndarray
    codes: np.ndarray
    slack: np.ndarray
    starts: np.ndarray
    homes: np.ndarray

    def span(self, number: int, column: int) -> tuple[int, int, int]:
        """Return where a list's columns from ``column`` on begin, where its rows end, and where
        a tile of columns ends: columns are rows at home.
        """
        begin, end = int(self.starts[number]), int(self.starts[number + 1])
        last = min(begin + column + COLUMN_TILE, begin + int(self.homes[number]))
        return begin + column, end, last


def plan_partitions(visits: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Cut lists into runs (first, end) of at most ``most`` visits, or one list."""
    runs, first, total = [], 0, 0
    for number, count in enumerate(visits):
        if number > first and total + count > most:
            runs.append((first, number))
            first, total = number, 0
        total += int(count)
    return [*runs, (first, len(visits))]


def load_partition(
    folders: list[Path], low: int, high: int, skip: np.ndarray, width: int
) -> Partition:
    """Bring the rows of lists ``low`` to ``high`` together from all encode tasks.

    Files are open while they are read only: of two billion rows there are thousands of tasks.
    """
    parts = [load_part(folder, low, high, skip) for folder in folders]
    row, slack, key, _ = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = sort_small(key, 2 * (high - low))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    codes, done = np.empty((len(row), width), np.int8), 0
    for folder, (_, _, _, use) in zip(folders, parts, strict=True):
        stored = np.load(folder / "codes.npy", mmap_mode="r").view(np.ndarray)
        codes[place[done : done + len(use)]] = np.take(stored, use, axis=0)
        done += len(use)
    key = key[order]
    return Partition(
        row[order],
        codes,
        slack[order].astype(np.float64),
        np.searchsorted(key, 2 * np.arange(high - low + 1)),
        np.bincount(key[key % 2 == 0] // 2, minlength=high - low),
    )


def load_part(
    folder: Path, low: int, high: int, skip: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read what an encode task has for a run of lists.

    Returns
    -------
    row, slack : (v,) int64, float32
        Global rows that take part, and by how much each one's limit falls.
    key : (v,) int32
        Twice the list, counted from the first; one more for a visitor.
    use : (v,) int64
        Which of the task's rows these are.
    """
    starts = np.array(np.load(folder / "starts.npy", mmap_mode="r")[low : high + 1])
    part = slice(int(starts[0]), int(starts[-1]))
    row = np.load(folder / "rows.npy", mmap_mode="r")[part]
    homes = np.load(folder / "homes.npy", mmap_mode="r")[low:high]
    sizes = np.diff(starts)
    key = np.repeat(2 * np.arange(len(sizes), dtype=np.int32), sizes)
    place = np.arange(len(row)) - np.repeat(starts[:-1] - starts[0], sizes)
    key += place >= np.repeat(homes, sizes)
    use = np.flatnonzero(~skip[row])
    slack = np.load(folder / "slack.npy", mmap_mode="r")[part]
    return row[use], slack[use], key[use], use + part.start
