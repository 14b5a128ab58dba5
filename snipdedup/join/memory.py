"""The least memory that a join needs, in bytes; libraries are not counted."""

from __future__ import annotations

import numpy as np

from snipdedup.features.scan import BLOCK, SORT_ROWS
from snipdedup.features.shards import Features
from snipdedup.join.encoding import task_rows
from snipdedup.join.model import SINGLE_LIST_ROWS, calibration_rows, list_count, training_rows
from snipdedup.join.projection import WIDTHS
from snipdedup.join.tiles import COLUMN_TILE, ROW_TILE
from snipdedup.join.verify import GATHER_PAIRS
from snipdedup.storage.external_sort import row_kind

CODE_BYTES = WIDTHS[0] + WIDTHS[-1]  # of a row, at the most
PARTITION_BYTES = 1 << 24  # the least that a thread loads of the codes
VISIT_BYTES = 64  # held for each row of a list while a partition is brought together, codes apart
TILE_BYTES = 16  # of each product of a tile: int32, float32 and masks
HELD_BYTES = 130_000_000  # that libraries allocate once they are used, and do not give back
TRAINING_CODES = 4  # times the codes of the rows that train centroids: gathered, distinct, sorted
SORT_BYTES = 60  # of each row whose hashes are sorted
GROUP_BYTES, GROUPS_BYTES = 200, 450_000_000  # deciding and writing: for a row, and at the most
USUAL_VISITS = 4  # lists that a row of a large set lives in or visits
DISTANCE_BYTES = 9  # of each row of a block and list: a distance, what is compared, a mask
VALUE_BYTES = 11  # of each value of a block: its square, as an integer of two lengths, a digit


def needed_memory(features: Features, threads: int, reference_rows: int = 0) -> int:
    """Return the least memory that a run with these rows needs.

    One stage comes after the other. Fitting holds a sample; encoding, for each thread, a task's
    codes and a block's distances to centroids; joining, for each thread, what `join_bytes` counts.
    Listing copies takes a byte a row, forest and groups four (eight above 2^32 rows, twice that
    for two forests), and a block of edges or groups.
    """
    rows, raw = features.rows, features.dim * features.dtype.itemsize
    lists = 1 if rows <= SINGLE_LIST_ROWS else list_count(rows)
    sample, trained = calibration_rows(rows), training_rows(rows, lists)
    fit = sample * 2 * raw + (sample * 12 + trained * TRAINING_CODES) * CODE_BYTES
    task = min(rows, task_rows(rows)) * (2 * CODE_BYTES + USUAL_VISITS * (CODE_BYTES + 40))
    encode = task + BLOCK * (lists * DISTANCE_BYTES + features.dim * VALUE_BYTES)
    forest = rows * np.dtype(row_kind(rows)).itemsize * (2 if reference_rows else 1)
    stages = (
        fit,
        threads * max(encode, join_bytes(features)),
        rows + min(rows, SORT_ROWS) * SORT_BYTES,
        forest + min(GROUP_BYTES * rows, GROUPS_BYTES),
    )
    return HELD_BYTES + max(stages)


def join_bytes(features: Features) -> int:
    """Return what a thread holds that joins: rows of a block of pairs, two tiles, a partition."""
    raw = features.dim * (features.dtype.itemsize + 4)
    tile = ROW_TILE * COLUMN_TILE * TILE_BYTES + 2 * (ROW_TILE + COLUMN_TILE) * raw
    return 2 * GATHER_PAIRS * raw + tile + PARTITION_BYTES


def most_visits(features: Features, width: int, threads: int, memory: int) -> int:
    """Return how many visits a partition may have, so that all threads keep a memory bound."""
    spare = (memory - HELD_BYTES) // threads - join_bytes(features) + PARTITION_BYTES
    return max(PARTITION_BYTES, spare) // (VISIT_BYTES + 2 * width)
