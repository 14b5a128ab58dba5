"""Texts of some rows of a finished OUT: captions, URLs, paths of pictures.

The metadata that the run read is used if it has not changed; else ``OUT/metadata``, which holds the
kept rows only.
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
    """Columns of the metadata (None where none is left), by row of the set.

    ``is_dup``, (rows,) bool, is given where the metadata holds the kept rows only.
    """

    metadata: Metadata | None
    is_dup: np.ndarray | None = None

    def find(self, asked: str | None = None, wanted: tuple[str, ...] = ()) -> str | None:
        """Return a column's name as `Metadata.column` does, None without metadata."""
        return None if self.metadata is None else self.metadata.column(asked, wanted)

    def read(self, column: str | None, rows: np.ndarray) -> dict[int, str]:
        """Return a column's texts by row, for rows (n,) in any order; rows without are left out."""
        if self.metadata is None or column is None:
            return {}
        rows = places = np.unique(rows)
        if self.is_dup is not None:
            rows = rows[~self.is_dup[rows]]
            places = rows - removed_before(self.is_dup, rows)
        texts = self.metadata.take(column, places).to_pylist()
        return {int(r): text for r, text in zip(rows, texts, strict=True) if text is not None}


def removed_before(is_dup: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return how many rows are removed before each of some ascending rows, (n,) int64."""
    cuts = np.concatenate([[0], rows]).astype(np.int64)
    return np.cumsum(
        [np.count_nonzero(is_dup[start:stop]) for start, stop in pairwise(cuts)], dtype=np.int64
    )


def open_row_texts(out: Path, manifest: dict[str, Any], asked: str | None = None) -> RowTexts:
    """Open the metadata of a finished run of ``snip dedup``.

    ``asked`` is metadata that the user named; it is refused if it does not match the run's rows.
    """
    shards = [(shard["name"], shard["rows"]) for shard in manifest["shards"]]
    if asked is not None:
        metadata = open_metadata(asked)
        metadata.check_rows(shards)
        return RowTexts(metadata)
    if (found := find_run_metadata(manifest)) is not None:
        return RowTexts(found)
    if (out / "metadata").is_dir():
        return RowTexts(open_metadata(out / "metadata"), np.load(out / "is_dup.npy", mmap_mode="r"))
    return RowTexts(None)


def find_run_metadata(manifest: dict[str, Any]) -> Metadata | None:
    """Return the metadata of a run of ``snip dedup``, None if it is missing or has changed.

    It is named by the settings, or implied by the folder of features.
    """
    settings = manifest["settings"]
    known = manifest["request"].get("metadata") or ()
    try:
        spec = settings.get("metadata")
        if spec is None and settings.get("features") is not None:
            spec = implied_metadata(settings["features"])
        if spec is None:
            return None
        metadata = open_metadata(spec)
        metadata.check_rows([(shard["name"], shard["rows"]) for shard in manifest["shards"]])
    except SnipError:  # moved, or in a store that cannot be reached now
        return None
    sizes = [path.stat().st_size for path in metadata.paths()]
    return metadata if not known or sizes == [file.get("size") for file in known] else None
