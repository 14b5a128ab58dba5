"""The baseline: how many of the duplicates equal hashes or URLs alone would have caught."""

from __future__ import annotations

import numpy as np

from snipdedup.grouping.groups import Members
from snipdedup.metadata.keys import classes, fingerprints
from snipdedup.metadata.table import Metadata

BASELINE_COLUMNS = ("hash", "md5", "sha256", "url")


def baselines(metadata: Metadata, members: Members) -> dict[str, int]:
    """Return, for each column of hashes or URLs, how many of the removed rows it would catch.

    Within each group, rows of one value would be cut down to one; of the rows that are removed
    those are counted that would go so too. Rows without a value are never equal.
    """
    found = (metadata.column(None, [name]) for name in BASELINE_COLUMNS)
    return {name: caught(metadata, name, members) for name in found if name is not None}


def caught(metadata: Metadata, column: str, members: Members) -> int:
    """Return how many removed rows go too where one row of each value in a group stays."""
    order = np.argsort(members.row)
    marks = np.empty((2, len(order)), np.uint64)
    known = np.empty(len(order), bool)
    for file, which, batch in metadata.pick([column], members.row[order]):
        marks[:, which], known[which] = fingerprints(file, batch)
    order = order[known]
    value, group = classes(marks[:, known]), members.group[order]
    by_value = np.lexsort((value, group))
    value, group = value[by_value], group[by_value]
    new = (value[1:] != value[:-1]) | (group[1:] != group[:-1])
    label = np.concatenate([np.zeros(min(len(value), 1), np.int64), np.cumsum(new)])
    removed = np.bincount(label, weights=members.is_dup[order][by_value])
    return int(np.minimum(removed, np.bincount(label) - 1).sum())
