"""The columns of groups.parquet, forest.parquet, references.parquet and semdedup.parquet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.deduplication.pair_search import PairSearch
from snipdedup.groups.members import Best, Members
from snipdedup.join.forest import Edges


def groups_table(
    search: PairSearch, members: Members, keys: Any, near: np.ndarray | None = None
) -> Any:
    """Return members with their places and ``keys`` as a ``pyarrow.Table``.

    With references, ``reference`` names the input whose row the representative is, null for
    FEATURES; ``near`` is as in `Result`.
    """
    columns = {
        "row": members.row,
        **search.places(members.row),
        "key": pa.nulls(len(members.row), pa.string()) if keys is None else keys,
        "group": members.group,
        "representative": members.representative,
        "similarity": pa.array(members.similarity, mask=np.isnan(members.similarity)),
        "is_dup": members.is_dup,
    }
    if search.references is not None and search.nearest is not None:
        outside = np.flatnonzero(members.representative < 0)
        item, row = search.references.locate(~members.representative[outside])
        representative, name = members.representative.copy(), np.full(len(members.row), -1)
        representative[outside], name[outside] = row, item
        names = pa.array([item.name for item in search.references.items], pa.string())
        near = np.full(len(members.row), np.nan, np.float32) if near is None else near
        columns["representative"] = representative
        columns["reference"] = names.take(pa.array(name, mask=name < 0))
        columns["reference_similarity"] = pa.array(near, mask=np.isnan(near))
    return pa.table(columns)


def forest_table(search: PairSearch, forest: Edges) -> Any:
    """Return edges of the forest as a ``pyarrow.Table``; unverified pairs have no similarity."""
    similarity = pa.array(forest.similarity, mask=np.full(len(forest.a), not search.verified))
    return pa.table({"a": forest.a, "b": forest.b, "similarity": similarity})


def references_table(search: PairSearch) -> Any:
    """Return each distinct row's nearest reference row, where one matches."""
    references, nearest = search.references, search.nearest
    if references is None or nearest is None:
        raise ValueError("a search without references")
    item, row = references.locate(nearest.reference)
    names = pa.array([item.name for item in references.items], pa.string())
    return pa.table(
        {
            "row": nearest.row,
            "reference": names.take(pa.array(item)),
            "reference_row": row,
            "similarity": nearest.similarity,
        }
    )


def semdedup_table(best: Best) -> Any:
    """Return what SemDeDup's rule decides by, one entry a row."""
    outside, single = best.cluster < 0, best.match < 0
    return pa.table(
        {
            "cluster": pa.array(best.cluster, mask=outside),
            "nearness": pa.array(best.nearness, mask=outside),
            "match": pa.array(best.match, mask=single),
            "similarity": pa.array(best.similarity, mask=single),
        }
    )
