"""Columns of lists in Arrow tables and parquet files, each list a row of features."""

from __future__ import annotations

from typing import Any

import numpy as np

from snipdedup.errors import InputError


def list_value_type(kind: Any) -> Any:
    """Return the float type inside an arrow list type, None for any other type.

    Lists of lists, and tensors of a fixed shape, are lists too: their rows are flattened.
    """
    from pyarrow import types

    kind, depth = getattr(kind, "storage_type", kind), 0
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return kind if depth and types.is_floating(kind) else None


def find_list_column(schema: Any, column: str | None, name: str, flag: str) -> str:
    """Return the column of features: the one that is named, or the only list column of floats.

    Lists of lists must be named, unless their type says that they are tensors.
    """
    kinds = {field.name: field.type for field in schema}
    if column is None:
        lists = [
            name
            for name, kind in kinds.items()
            if list_value_type(kind) is not None
            and (hasattr(kind, "storage_type") or list_value_type(kind.value_type) is None)
        ]
        if len(lists) != 1:
            names = [*list(kinds)[:20], "..."] if len(kinds) > 20 else list(kinds)
            found = f"several: {', '.join(lists)}" if lists else f"none among {', '.join(names)}"
            raise InputError(
                f"{name}: expected one list column of floats, found {found}; name it with {flag}"
            )
        column = str(lists[0])
    if column not in kinds:
        raise InputError(f"{name}: no column {column!r}; it has {', '.join(kinds)}")
    if list_value_type(kinds[column]) is None:
        raise InputError(f"{name}: column {column!r} is {kinds[column]}, not a list of floats")
    if (count := schema.names.count(column)) > 1:
        raise InputError(f"{name}: {count} columns are called {column!r}; expected one")
    return column


def list_rows(column: Any, where: str, first: int, dim: int | None = None) -> np.ndarray:
    """Return the lists of an arrow column as rows, (n, dim).

    Refused by number: the first row that is null, holds a null, or has another length than ``dim``
    (None: that of the longest). ``first`` is the number of the first; ``where`` names a row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    values, rows, width = getattr(column, "storage", column), len(column), 1
    while hasattr(values.type, "value_type"):
        lengths = pc.fill_null(pc.list_value_length(values), -1).to_numpy()
        inner = hasattr(values.type.value_type, "value_type")
        usual = lengths.max(initial=0) if inner or dim is None else dim // max(width, 1)
        wrong = np.flatnonzero(lengths != usual)
        if len(wrong):
            found = "null" if lengths[wrong[0]] < 0 else f"a list of {lengths[wrong[0]]}"
            row = first + wrong[0] // width
            raise InputError(f"{where.format(row)} is {found}, expected {usual} values")
        values, width = pc.list_flatten(values), width * int(usual)
    if values.null_count:
        row = first + int(np.flatnonzero(pc.is_null(values).to_numpy(False))[0]) // width
        raise InputError(f"{where.format(row)} holds a null value")
    return np.asarray(values.to_numpy(zero_copy_only=False).reshape(rows, width))
