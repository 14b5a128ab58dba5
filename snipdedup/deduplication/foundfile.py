"""What a search found, kept in the work until OUT is whole, where no task of it left a file.

A run that is stopped or refused while it decides goes on from here. (The join needs none: what its
tasks left is brought together again.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.config import Dedup
from snipdedup.deduplication.found import Found
from snipdedup.deduplication.inputs import Inputs
from snipdedup.groups.members import Best, Nearest
from snipdedup.join.forest import Edges
from snipdedup.storage import atomic

ARRAYS, NOTE = "found.npz", "found.json"
PLAIN = ("offsets", "copies", "firsts", "bad", "flags")
PARTS: dict[str, Any] = {"forest": Edges, "pairs": Edges, "best": Best, "nearest": Nearest}
SAID = ("names", "threshold", "checksums", "notes", "text_checksums", "reference_checksums")


def save_found(found: Found, work: Path) -> None:
    """Write what was found, with checksums."""
    arrays = {name: getattr(found, name) for name in PLAIN}
    for name, kind in PARTS.items():
        part = getattr(found, name)
        if part is not None:
            arrays |= {f"{name}_{field}": getattr(part, field) for field in kind._fields}
    held = {name: array for name, array in arrays.items() if array is not None}
    atomic.save_npz(work / ARRAYS, lasting=False, **held)
    atomic.write_done_file(
        work / NOTE, [work / ARRAYS], {name: getattr(found, name) for name in SAID}
    )


def load_found_kept(work: Path, inputs: Inputs, options: Dedup) -> Found | None:
    """Read back what `save_found` wrote; None where there is nothing, or it is damaged."""
    if not atomic.is_done(work / NOTE, work):
        return None
    said = atomic.load_json(work / NOTE)
    with np.load(work / ARRAYS) as file:
        arrays = dict(file)
    parts: dict[str, Any] = {name: arrays.get(name) for name in PLAIN}
    for name, kind in PARTS.items():
        fields = [arrays.get(f"{name}_{field}") for field in kind._fields]
        parts[name] = None if fields[0] is None else kind(*fields)
    return Found(
        **{name: said[name] for name in SAID},
        **parts,
        also=inputs.also(options),
        references=inputs.references,
    )
