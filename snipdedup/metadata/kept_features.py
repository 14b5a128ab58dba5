"""The rows of one file of features that stay: every array of it, in its own type and order."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.features.formats import Shard, open_shard
from snipdedup.features.shards import plan_blocks
from snipdedup.metadata.files import open_table
from snipdedup.metadata.tables import Metadata, write_kept
from snipdedup.storage import atomic

BLOCK_ROWS = 16_384  # held in memory at a time


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
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise SnipError(f"{path}: truncated or not an .npz archive: {error}") from error


def write_staying(path: Path, target: Path, stay: np.ndarray) -> None:
    """Write the rows of a file that stay.

    Parameters
    ----------
    path, target : Path
        ``.npy``, ``.npz`` or parquet; both of one name. An ``.npz`` is written uncompressed, so
        that it is read in place.
    stay : (rows,) bool
    """
    kept = int(np.count_nonzero(stay))
    suffix = path.suffix.lower()
    if suffix == ".npy":
        shard = open_shard(path)
        with atomic.writing_npy(target, shard.dtype, (kept, shard.dim)) as file:
            file.writelines(staying_blocks(shard, stay))
    elif suffix == ".npz":
        with atomic.replacing(target) as part, zipfile.ZipFile(part, "w") as archive:
            for name in array_names(path):
                shard = open_shard(path, name)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    header = {"descr": shard.dtype.str, "fortran_order": False}
                    np.lib.format.write_array_header_1_0(
                        file, {**header, "shape": (kept, shard.dim)}
                    )
                    file.writelines(staying_blocks(shard, stay))
    else:
        write_kept(Metadata([open_table(path)]), ~stay, target.parent)


def staying_blocks(shard: Shard, stay: np.ndarray) -> Iterator[bytes]:
    """Yield the bytes of the rows that stay, block by block."""
    for start, stop in plan_blocks(shard.rows, BLOCK_ROWS):
        yield shard.read(start, stop)[stay[start:stop]].tobytes()
