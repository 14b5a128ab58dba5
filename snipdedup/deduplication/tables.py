"""What was found and decided, as tables: of any part of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from snipdedup.deduplication.found import Found
from snipdedup.errors import SnipError
from snipdedup.groups.members import Members
from snipdedup.join.forest import Edges


def forest_table(found: Found, forest: Edges) -> Any:
    """Return edges of the forest as a ``pyarrow.Table``; unverified pairs have no similarity."""
    import pyarrow as pa

    unknown = np.full(len(forest.a), not found.verified)
    similarity = pa.array(forest.similarity, mask=unknown)
    return pa.table({"a": forest.a, "b": forest.b, "similarity": similarity})


def groups_table(found: Found, members: Members, keys: Any, near: np.ndarray | None = None) -> Any:
    """Return members with their places and keys as a ``pyarrow.Table``.

    Parameters
    ----------
    found, members
    keys : pyarrow.Array of string, or None
        Key of each member.
    near : (n,) float32, optional
        Cosine of each with its nearest reference row, NaN where none matches; NaN without it.
    """
    import pyarrow as pa

    offsets = found.offsets
    shard = np.searchsorted(offsets, members.row, side="right") - 1
    names = pa.array(found.names, pa.string())
    unknown = np.isnan(members.similarity)
    columns = {
        "row": members.row,
        "shard": names.take(pa.array(shard)),
        "shard_row": members.row - offsets[shard],
        "key": pa.nulls(len(members.row), pa.string()) if keys is None else keys,
        "group": members.group,
        "representative": members.representative,
        "similarity": pa.array(members.similarity, mask=unknown),
        "is_dup": members.is_dup,
    }
    return pa.table(columns | reference_columns(found, members, near))


def reference_columns(found: Found, members: Members, near: np.ndarray | None) -> dict[str, Any]:
    """Return what ``--reference`` adds to the members, and the representatives as rows there.

    ``reference`` names the input that the representative is a row of, null for FEATURES;
    ``reference_similarity`` is the cosine with the nearest reference row, null where none matches.
    """
    import pyarrow as pa

    if found.references is None or found.nearest is None:
        return {}
    outside = np.flatnonzero(members.representative < 0)
    item, row = found.references.locate(~members.representative[outside])
    representative, name = members.representative.copy(), np.full(len(members.row), -1)
    representative[outside], name[outside] = row, item
    names = pa.array([item.name for item in found.references.items], pa.string())
    near = np.full(len(members.row), np.nan, np.float32) if near is None else near
    return {
        "representative": representative,
        "reference": names.take(pa.array(name, mask=name < 0)),
        "reference_similarity": pa.array(near, mask=np.isnan(near)),
    }


def references_table(found: Found) -> Any:
    """Return each distinct row's nearest reference row, where one matches."""
    import pyarrow as pa

    if found.references is None or found.nearest is None:
        raise SnipError("there are no references to tabulate")
    item, row = found.references.locate(found.nearest.reference)
    names = pa.array([item.name for item in found.references.items], pa.string())
    return pa.table(
        {
            "row": found.nearest.row,
            "reference": names.take(pa.array(item)),
            "reference_row": row,
            "similarity": found.nearest.similarity,
        }
    )
