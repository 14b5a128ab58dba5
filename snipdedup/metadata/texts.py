"""What metadata says of a few rows of OUT: captions, urls, paths of pictures.

The table that was given to the run is read where it still is what it was; else the rows that stay
are known from ``OUT/metadata``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.features.shards import implied_metadata
from snipdedup.metadata.tables import Metadata, open_metadata

CAPTIONS, URLS = ("caption", "text"), ("url", "image_url")


@dataclass(frozen=True)
class RowTexts:
    """Columns of the metadata, by row of the set.

    Attributes
    ----------
    metadata : Metadata or None
        None where nothing is known of any row.
    is_dup : (rows,) bool or None
        Given where the metadata holds only the rows that stay.
    """

    metadata: Metadata | None
    is_dup: np.ndarray | None = None

    def find(self, asked: str | None = None, wanted: tuple[str, ...] = ()) -> str | None:
        """Return a column's name as `Metadata.column` does, None where there is none."""
        return None if self.metadata is None else self.metadata.column(asked, wanted)

    def read(self, column: str | None, rows: np.ndarray) -> dict[int, str]:
        """Return a column's texts by row; rows of which it says nothing are left out.

        Parameters
        ----------
        column : str or None
            From `find`.
        rows : (n,) int64
            In any order.
        """
        if self.metadata is None or column is None:
            return {}
        rows = np.unique(rows)
        places = rows
        if self.is_dup is not None:
            rows = rows[~self.is_dup[rows]]
            places = rows - removed_before(self.is_dup, rows)
        texts = self.metadata.take(column, places).to_pylist()
        return {int(r): text for r, text in zip(rows, texts, strict=True) if text is not None}


def removed_before(is_dup: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return how many rows are removed before each of some ascending rows, (n,) int64."""
    cuts = np.concatenate([[0], rows]).astype(np.int64)
    return np.cumsum(
        [np.count_nonzero(is_dup[a:b]) for a, b in pairwise(cuts)],
        dtype=np.int64,
    )


def open_texts(out: Path, manifest: dict[str, Any], asked: str | None = None) -> RowTexts:
    """Open what is known of the rows of a finished run.

    Parameters
    ----------
    out : Path
    manifest : dict
        Of kind ``dedup``.
    asked : str, optional
        Metadata that the user named; it must match the rows.

    Raises
    ------
    SnipError
        If ``asked`` cannot be read or does not match.
    """
    shards = [(shard["name"], shard["rows"]) for shard in manifest["shards"]]
    if asked is not None:
        metadata = open_metadata(asked)
        metadata.check_rows(shards)
        return RowTexts(metadata)
    for spec in named_in(manifest):
        try:
            metadata = open_metadata(spec)
            metadata.check_rows(shards)
        except SnipError:
            continue
        if is_unchanged(metadata, manifest):
            return RowTexts(metadata)
    if (out / "metadata").is_dir():
        return RowTexts(open_metadata(out / "metadata"), np.load(out / "is_dup.npy", mmap_mode="r"))
    return RowTexts(None)


def is_unchanged(metadata: Metadata, manifest: dict[str, Any]) -> bool:
    """Tell whether files have the sizes that the run saw; else they may speak of other rows."""
    sizes = [file.get("size") for file in manifest["request"].get("metadata") or ()]
    return not sizes or sizes == [path.stat().st_size for path in metadata.paths()]


def named_in(manifest: dict[str, Any]) -> list[str]:
    """Return the metadata that a run's settings name, or imply by the features' folder."""
    settings = manifest["settings"]
    if settings.get("metadata"):
        return [settings["metadata"]]
    features = settings.get("features")
    try:
        implied = None if features is None else implied_metadata(features)
    except SnipError:  # a store that cannot be asked just now
        implied = None
    return [] if implied is None else [str(implied)]
