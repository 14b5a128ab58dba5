"""The baseline: how many of the duplicates equal hashes or URLs alone would have caught."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.groups.blocks import cut_groups, slices
from snipdedup.groups.members import Members
from snipdedup.metadata.files import Table
from snipdedup.metadata.gathered import gather_columns
from snipdedup.metadata.keys import classes, fingerprints
from snipdedup.metadata.precheck import Use
from snipdedup.metadata.tables import Metadata

BASELINE_COLUMNS = ("hash", "md5", "sha256", "url")


def baselines(metadata: Metadata, members: Members, folder: Path) -> dict[str, int]:
    """Return, for each column of hashes or URLs, how many of the removed rows it would catch.

    Within each group, rows of one value would be cut down to one; of the rows that are removed
    those are counted that would go so too. Rows without a value are never equal. What does not fit
    into memory waits in ``folder``.
    """
    return {name: caught(metadata, name, members, folder) for name in columns_of(metadata)}


def columns_of(metadata: Metadata) -> list[str]:
    """Return the columns of hashes and URLs."""
    found = (metadata.column(None, [name]) for name in BASELINE_COLUMNS)
    return [name for name in found if name is not None]


def uses(metadata: Metadata) -> list[Use]:
    """Return what these columns are read for."""
    remedy = "a column of this name is compared between copies: rename it, or leave it out of META"
    return [Use([name], marked, remedy) for name in columns_of(metadata)]


def caught(metadata: Metadata, column: str, members: Members, folder: Path) -> int:
    """Return how many removed rows go too where one row of each value in a group stays."""
    cuts = cut_groups(members.group)
    gathered = gather_columns(metadata, [column], members.row, cuts, marked, folder / "baseline")
    with closing(gathered) as tables:
        return sum(
            caught_within(part, table)
            for part, table in zip(slices(members), tables, strict=True)
            if table is not None
        )


def marked(file: Table, batch: Any) -> dict[str, np.ndarray]:
    """Return fingerprints of a record batch as columns."""
    marks, known = fingerprints(file, batch)
    return {"high": marks[0], "low": marks[1], "known": known}


def caught_within(members: Members, table: Any) -> int:
    """Return how many of some whole groups' rows are caught; ``table`` has their fingerprints."""
    known = table["known"].to_numpy()
    marks = np.stack([table[name].to_numpy() for name in ("high", "low")])
    value, group = classes(marks[:, known]), members.group[known]
    by_value = np.lexsort((value, group))
    value, group = value[by_value], group[by_value]
    new = (value[1:] != value[:-1]) | (group[1:] != group[:-1])
    label = np.concatenate([np.zeros(min(len(value), 1), np.int64), np.cumsum(new)])
    removed = np.bincount(label, weights=members.is_dup[known][by_value])
    return int(np.minimum(removed, np.bincount(label) - 1).sum())
