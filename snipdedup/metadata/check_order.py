"""``snip filter`` by position: the keys of removed rows must be those that the run removed.

Row counts do not prove an order: a shuffled file has as many rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from snipdedup.errors import SnipError
from snipdedup.metadata.keys import fingerprints, is_binary
from snipdedup.metadata.masks import MASK, Mask
from snipdedup.metadata.tables import Metadata, open_metadata, open_table
from snipdedup.storage import atomic
from snipdedup.storage.external_sort import Sorter, pack
from snipdedup.storage.manifest import MANIFEST, read_manifest

RECORD = np.dtype([("row", "<i8"), ("key", "<u8")])


def check_removed_keys(metadata: Metadata, mask: Mask, first: int, work: Path) -> str | None:
    """Compare the keys of removed rows with those in OUT, the mask's folder.

    Parameters
    ----------
    metadata : Metadata
        Placed in the mask by position; its row 0 is the mask's row ``first``.
    mask : Mask
    first : int
    work : Path
        For temporary files.

    Returns
    -------
    str or None
        What to print of it; None where OUT has no keys of these rows.

    Raises
    ------
    SnipError
        If the key of a row is another one; names the first such row.
    """
    groups = mask.path.parent / "groups.parquet"
    column = _key_column(groups, mask, metadata)
    if column is None:
        return None
    sorter = Sorter(work / "removed_keys", RECORD, lambda records: records["row"].view(np.uint64))
    table = open_table(groups)
    for _, batch in table.batches(["row", "key", "is_dup"]):
        row = batch.column("row").to_numpy() - first
        inside = batch.column("is_dup").to_numpy(zero_copy_only=False)
        inside = inside & (row >= 0) & (row < metadata.rows)
        prints, _ = fingerprints(table, batch.select(["key"]))
        sorter.add(pack(RECORD, row[inside], prints[0, inside]))
    count = sorter.count
    # groups.parquet of some methods does not list all removed rows: it proves nothing then.
    if not count or count != np.count_nonzero(mask.is_dup[first : first + metadata.rows]):
        return None
    for records in sorter.ascending():
        records.sort(order="row")
        for file, which, batch in metadata.pick([column], records["row"]):
            prints, _ = fingerprints(file, batch)
            wrong = np.flatnonzero(prints[0] != records["key"][which])
            if len(wrong):
                row = int(records["row"][which][wrong[0]])
                there = pq.read_table(groups, columns=["key"], filters=[("row", "=", row + first)])
                raise SnipError(
                    f"{metadata.place(row)} has the {column} {batch[0][int(wrong[0])].as_py()!r}, "
                    f"the row that {groups.parent} removed there {there['key'][0].as_py()!r}: "
                    f"these rows are in another order, or are others; find them by --on {column}"
                )
    return f"  checked: the {column} of {count:,} rows that go is that in {groups}"


def _key_column(groups: Path, mask: Mask, metadata: Metadata) -> str | None:
    """Return the metadata's column that OUT holds as ``key``, None where none can be compared."""
    out = groups.parent
    if mask.sizes is None or not groups.is_file() or not (out / MANIFEST).is_file():
        return None
    manifest = read_manifest(out, "dedup")
    if manifest["outputs"].get(MASK, {}).get("sha256") != atomic.sha256(mask.path):
        return None  # not the mask that the run wrote
    asked = manifest["settings"].get("key")
    if asked is None and (out / "metadata").is_dir():
        asked = open_metadata(out / "metadata").column()
    same = [name for name in metadata.columns if asked and name.lower() == asked.lower()]
    if len(same) != 1:
        return None
    kinds = [file.schema.field(same[0]).type for file in metadata.files]
    return same[0] if all(map(_has_one_text, kinds)) else None


def _has_one_text(kind: Any) -> bool:
    """Tell whether values of an arrow type have one text each, whatever file they are in."""
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or is_binary(kind)
    )
