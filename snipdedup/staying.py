"""The rows of one file of features that stay: every array of it, in its own type and order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from snipdedup import store
from snipdedup.errors import SnipError
from snipdedup.formats import open_shard


def feature_rows(path: Path) -> int:
    """Return the rows of a file of features; refuse one that is damaged, by its name."""
    if path.suffix.lower() != ".npz":
        return open_shard(path).rows
    counts = {name: open_shard(path, name).rows for name in array_names(path)}
    if len(set(counts.values())) != 1:
        said = ", ".join(f"{name} {rows:,}" for name, rows in counts.items()) or "no array"
        raise SnipError(f"{path}: expected arrays with one row for each image, found {said}")
    return next(iter(counts.values()))


def array_names(path: Path) -> list[str]:
    """Return the names of the arrays in an ``.npz``."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return list(arrays.files)
    except (ValueError, OSError, EOFError) as error:
        raise SnipError(f"{path}: truncated or not an .npz archive: {error}") from error


def write_staying(path: Path, target: Path, stay: np.ndarray) -> None:
    """Write the rows of a file that stay.

    Parameters
    ----------
    path, target : Path
        ``.npy``, ``.npz`` or parquet; both of one type.
    stay : (rows,) bool
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        store.save_npy(target, np.load(path, mmap_mode="r")[stay])
    elif suffix == ".npz":
        with np.load(path) as arrays:
            store.save_npz(target, **{name: arrays[name][stay] for name in arrays.files})
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        store.save_parquet(target, pq.read_table(path).filter(pa.array(stay)))
