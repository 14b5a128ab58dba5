"""Join tasks: the rows of a partition are compared, and what may be a pair is proved.

Each task leaves one file that is complete or absent: the forest of its pairs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from snipdedup.errors import InputError
from snipdedup.features.formats import load_npz
from snipdedup.features.shards import Features
from snipdedup.join.forest import Edges, ForestBuilder
from snipdedup.join.model import Model
from snipdedup.join.partitions import Partition
from snipdedup.join.tiles import COLUMN_TILE, Codes, TilePairs, compare
from snipdedup.join.verify import verify_pairs
from snipdedup.parallel import ordered_map


def load_joined(path: Path) -> tuple[Edges, int] | None:
    """Read back what a join task found; None where there is nothing, or it is damaged."""
    try:
        file = load_npz(path, [*Edges._fields, "proposed"])
        return Edges(*(file[name] for name in Edges._fields)), int(file["proposed"])
    except InputError:
        return None


def join_task(
    features: Features,
    model: Model,
    partition: Partition,
    *,
    threshold: float,
    threads: int,
    device: str,
    frozen: int,
    across: bool = False,
) -> tuple[Edges, int]:
    """Find and verify the pairs of a partition; return their forest and the candidates' number.

    Pairs of two rows from ``frozen`` on have a forest of their own, see `forest.spanning_forest`;
    with ``across`` they are not looked for.
    """
    columns = [
        (number, column)
        for number, homes in enumerate(partition.homes)
        for column in range(0, int(homes), COLUMN_TILE)
    ]

    def propose(place: tuple[int, int]) -> TilePairs:
        begin, end, last = partition.span(*place)
        members = Codes(
            partition.row[begin:end], partition.codes[begin:end], partition.slack[begin:end]
        )
        return compare(
            features,
            members,
            last - begin,
            limit=model.limit,
            threshold=threshold,
            device=device,
            frozen=frozen,
            across=across,
        )

    builder, candidates = ForestBuilder(frozen=frozen), 0
    open_ = [(np.empty(0, np.int64),) * 2]
    for found in ordered_map(propose, columns, threads):
        candidates += found.proposed
        builder.add(found.edges)
        open_.append((found.a, found.b))
    a, b = (np.concatenate(side) for side in zip(*open_, strict=True))
    for edges in verify_pairs(features, a, b, threshold, threads, frozen=frozen):
        builder.add(edges)
    return builder.forest(), candidates
