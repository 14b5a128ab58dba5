"""Whether metadata is the table that a run of ``snip dedup`` read, before files move by it.

Metadata that was made anew may have as many rows, and even the same keys, of other pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from snipdedup.errors import SnipError
from snipdedup.metadata.tables import Metadata, as_texts, open_metadata, stream_parquet

GROUPS = "groups.parquet"


def refuse_other_metadata(
    out: Path, manifest: dict[str, Any], metadata: Metadata, is_dup: np.ndarray, *, named: bool
) -> None:
    """Refuse metadata that is not what the run read; a table that is ``named`` may be a copy.

    The run noted the size and the time of each file. Of a copy, the keys must be those of the
    groups, and the kept rows those of ``OUT/metadata``.
    """
    known = manifest["request"].get("metadata") or []
    noted = [(file.get("size"), file.get("changed")) for file in known]
    found = [file.path.stat() for file in metadata.files]
    if [(file.st_size, file.st_mtime_ns) for file in found] == noted:
        return
    if not named:
        raise SnipError(
            f"{metadata.describe()}: written anew since the run of {out} read it, so its rows may "
            "be of other pictures; run snip dedup again, or name the table that it read with "
            "--metadata"
        )
    key = metadata.column(manifest["settings"].get("key"))
    if not (has_keys(metadata, key, out / GROUPS) and has_kept_rows(metadata, is_dup, out)):
        raise SnipError(
            f"--metadata {metadata.describe()}: its keys, paths or sha256s are not those of the "
            f"table that the run of {out} read; name that one, or run snip dedup again"
        )


def has_keys(metadata: Metadata, column: str | None, path: Path) -> bool:
    """Tell whether metadata has the keys of ``groups.parquet``, where that has any."""
    groups = stream_parquet(path).read(["row", "key"])
    groups = groups.filter(pc.is_valid(groups["key"]))
    if not groups.num_rows or column is None:
        return not groups.num_rows
    return bool(read_texts(metadata, column).take(groups["row"]).equals(large(groups["key"])))


def has_kept_rows(metadata: Metadata, is_dup: np.ndarray, out: Path) -> bool:
    """Tell whether paths and sha256s of kept rows are those of ``OUT/metadata``, if it is there."""
    if not (out / "metadata").is_dir():
        return True
    kept, stays = open_metadata(out / "metadata"), pa.array(~np.asarray(is_dup))
    for name in ("path", "sha256"):
        theirs, ours = (table.column(None, [name]) for table in (kept, metadata))
        if theirs is not None and (
            ours is None
            or not read_texts(metadata, ours).filter(stays).equals(read_texts(kept, theirs))
        ):
            return False
    return True


def read_texts(metadata: Metadata, column: str) -> Any:
    """Return a column of all rows, as a chunked array of large strings."""
    parts = [
        as_texts(file, column, batch.column(0), pa.large_string())
        for file, _, batch in metadata.read([column])
    ]
    return pa.chunked_array(parts, pa.large_string())


def large(column: Any) -> Any:
    """Return texts as large strings."""
    return column.cast(pa.large_string())
