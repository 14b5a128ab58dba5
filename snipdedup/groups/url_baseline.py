"""The baseline: how many of the removed rows equal hashes or URLs alone would have caught."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from snipdedup.groups.blocks import cut_groups, slices
from snipdedup.groups.members import Members
from snipdedup.metadata.gather import gather_columns
from snipdedup.metadata.join_by_key import as_bytes
from snipdedup.metadata.tables import ColumnUse, Metadata, Table

BASELINE_COLUMNS = ("hash", "md5", "sha256", "url")


def baselines(metadata: Metadata, members: Members, folder: Path) -> dict[str, int]:
    """Return, for each column of hashes or URLs, how many of the removed rows it would catch.

    Within each group, one row of each value would be kept; those of the removed rows are counted
    that would be removed so, too. Rows without a value are never equal. ``folder`` is for temporary
    files.
    """
    cuts, counts = cut_groups(members.group), {}
    for name in baseline_columns(metadata):
        gathered = gather_columns(metadata, [name], members.row, cuts, _values, folder / "baseline")
        with closing(gathered) as tables:
            parts = zip(slices(members), tables, strict=True)
            counts[name] = sum(_caught(part, table) for part, table in parts if table is not None)
    return counts


def baseline_columns(metadata: Metadata) -> list[str]:
    """Return the columns of hashes and URLs."""
    found = (metadata.column(None, [name]) for name in BASELINE_COLUMNS)
    return [name for name in found if name is not None]


def baseline_uses(metadata: Metadata) -> list[ColumnUse]:
    """Return what these columns are read for."""
    remedy = "a column of this name is compared between copies: rename it, or leave it out of META"
    columns = baseline_columns(metadata)
    return [ColumnUse([c], lambda file, _, batch: _values(file, batch), remedy) for c in columns]


def _values(file: Table, batch: Any) -> dict[str, Any]:
    return {"value": as_bytes(file, batch.schema.names[0], batch.column(0))}


def _caught(members: Members, table: Any) -> int:
    """Return how many removed rows of whole groups are caught by their values in ``table``."""
    values = table["value"].combine_chunks()
    known = pc.greater(pc.binary_length(values), 0).to_numpy(zero_copy_only=False)
    value = values.dictionary_encode().indices.to_numpy()[known].astype(np.int64)
    _, group = np.unique(members.group[known], return_inverse=True)
    _, label = np.unique(group * (len(values) + 1) + value, return_inverse=True)
    removed = np.bincount(label, weights=members.is_dup[known])
    return int(np.minimum(removed, np.bincount(label) - 1).sum())
