"""``snip filter --on``: whose keys decide, and whether what a join says can be trusted.

A wrong column, another set or running numbers that start anew in each download give a join that
looks whole and is wrong. So rows in doubt are counted and named, and too many of them refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.config import Filter
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.shards import implied_metadata
from snipdedup.metadata.files import Table
from snipdedup.metadata.join_by_key import (
    AMBIGUOUS,
    CONTRADICTED,
    GOES,
    STATES,
    UNMATCHED,
    Joined,
    decided_rows,
    join_decisions,
    keyed,
    published_rows,
    wanted,
)
from snipdedup.metadata.masks import Held, Mask, place_all
from snipdedup.metadata.precheck import Use
from snipdedup.metadata.tables import Metadata, named, open_metadata
from snipdedup.storage.manifest import read_manifest
from snipdedup.storage.remote import is_remote

CONTENT_COLUMNS = ("url", "uid", "hash", "md5", "sha256")  # what a row is, not its number
MOST = 0.5  # share of the rows that may be in doubt without a word from the user


class Source(NamedTuple):
    """Where the keys of decided rows come from.

    Attributes
    ----------
    metadata : Metadata
        Of all rows of the mask's set, in its order; with ``groups`` of those that stay.
    groups : Path or None
        The ``groups.parquet`` with the keys of the rows that go.
    """

    metadata: Metadata
    groups: Path | None = None


@dataclass(frozen=True)
class ByKey:
    """A join to be made.

    Attributes
    ----------
    source : Source
    columns, theirs : sequence of str
        The key's columns in the metadata to filter, and in the source.
    witness : (str, str) or None
        A column in each that should agree too, where the key is only a running number.
    removing : list of int
        States whose rows are removed.
    decided : list of int
        States that the user has decided on, however many rows there are.
    """

    source: Source
    columns: Sequence[str]
    theirs: Sequence[str]
    witness: tuple[str, str] | None
    removing: Sequence[int]
    decided: Sequence[int]

    def mine(self) -> list[Use]:
        """Return what columns of the metadata to filter are read for."""
        return [key_use(self.columns, self.witness and self.witness[0])]

    def others(self) -> list[Use]:
        """Return what columns of the source are read for."""
        return [key_use(self.theirs, self.witness and self.witness[1])]

    def run(self, metadata: Metadata, mask: Mask, work: Path) -> Joined:
        """Decide the rows of metadata by key.

        Raises
        ------
        SnipError
            If more than half of the rows are in doubt.
        """
        mine, other = self.witness or (None, None)
        if self.source.groups is None:
            rows = decided_rows(self.source.metadata, mask.is_dup, self.theirs, other)
        else:
            rows = published_rows(self.source.metadata, self.theirs[0], self.source.groups)
        joined = join_decisions(
            rows, mask.rows, metadata, self.columns, mine, self.removing, work / "join"
        )
        for state in (CONTRADICTED, UNMATCHED, AMBIGUOUS):
            if state not in self.decided and joined.counts[state] > MOST * metadata.rows:
                raise SnipError(self.doubt(state, joined, metadata))
        return joined

    def doubt(self, state: int, joined: Joined, metadata: Metadata) -> str:
        """Say why a join is refused."""
        key, theirs = ", ".join(self.columns), named(self.source.metadata.files)
        what = {
            UNMATCHED: f"are not in {theirs} by their {key}: another column or set? If they shall "
            "stay or go anyhow, say so with --unmatched keep or remove",
            AMBIGUOUS: f"have a {key} that both stays and goes in {theirs}: it does not tell rows "
            "apart; name more columns by comma, or say --ambiguous keep or remove",
            CONTRADICTED: f"have the {key} of a row of {theirs} but another "
            f"{self.witness and self.witness[0]}: numbers of another download? Join by "
            f"--on {self.witness and self.witness[0]}",
        }
        count = int(joined.counts[state])
        examples = ", ".join(metadata.place(row) for row in joined.examples[state])
        return f"{count:,} of {metadata.rows:,} rows ({examples}, ...) {what[state]}"

    def describe(self, joined: Joined) -> dict[str, Any]:
        """Return what the manifest says of the join."""
        counts = dict(zip(STATES, joined.counts.tolist(), strict=True))
        return {"on": list(self.columns), **counts, "repeated": joined.repeated}

    def report(self, joined: Joined, metadata: Metadata) -> str:
        """Return the lines that a run says of its join."""
        key = ", ".join(self.columns)
        matched = int(joined.counts.sum() - joined.counts[[UNMATCHED, CONTRADICTED]].sum())
        lines = [f"  matched by {key:<12}{matched:>12,}"]
        why = {
            UNMATCHED: "not in the mask's set",
            AMBIGUOUS: "of these: their key both stays and goes there",
            CONTRADICTED: f"another {self.witness and self.witness[0]}, so no match",
        }
        for state, reason in why.items():
            if joined.counts[state] or state != CONTRADICTED:
                where = ", ".join(metadata.place(row) for row in joined.examples[state])
                fate = f"; they {'go' if state in self.removing else 'stay'}: {where}"
                more = fate if joined.counts[state] else ""
                lines.append(f"  {STATES[state]:<23}{joined.counts[state]:>12,}  {reason}{more}")
        lines.append(f"  {'repeated':<23}{joined.repeated:>12,}  share their key with another row")
        return "\n".join(lines)


def key_use(columns: Sequence[str], witness: str | None) -> Use:
    """Return what the columns of a key, and of what should agree too, are read for."""

    def marks(file: Table, batch: Any) -> None:
        keyed(file, batch, columns, witness)

    return Use(wanted(columns, witness), marks, "find rows by another column with --on")


def plan_join(options: Filter, metadata: Metadata, mask: Mask) -> ByKey:
    """Find the columns of ``--on`` on both sides.

    Raises
    ------
    SnipError
        If a column is not there, or it is not known what keys the mask's rows have.
    """
    asked = [name.strip() for name in str(options.on).split(",") if name.strip()]
    if not asked:
        raise UsageError(f"--on names columns, by comma, found {options.on!r}")
    columns = [str(metadata.column(name)) for name in asked]
    source = find_source(options, mask, asked)
    theirs = [str(source.metadata.column(name)) for name in asked]
    witness = None
    if source.groups is None and not any(c.lower() in CONTENT_COLUMNS for c in columns):
        both = [(metadata.column(None, [n]), source.metadata.column(None, [n])) for n in
                CONTENT_COLUMNS]  # fmt: skip
        witness = next(((a, b) for a, b in both if a and b), None)
    policies = {UNMATCHED: options.unmatched, AMBIGUOUS: options.ambiguous}
    removing = [GOES, *(state for state, policy in policies.items() if policy == "remove")]
    decided = [state for state, policy in policies.items() if policy is not None]
    return ByKey(source, columns, theirs, witness, removing, decided)


def find_source(options: Filter, mask: Mask, asked: Sequence[str]) -> Source:
    """Return where the keys of the mask's rows come from: META0, what OUT names, or OUT itself."""
    if options.keys is not None:
        return Source(whole_set(open_metadata(options.keys), mask))
    folder = mask.path.parent
    if mask.sizes is None:  # no manifest vouches for it
        raise SnipError(
            f"{mask.path} is a mask alone and names no rows; give the metadata that it matches by "
            "position with --keys"
        )
    manifest = read_manifest(folder, "dedup")
    used = metadata_used(manifest)
    if used is not None:
        return Source(whole_set(used, mask))
    if (folder / "metadata").is_dir():
        found = open_metadata(folder / "metadata")
        if found.rows == mask.rows:
            return Source(whole_set(found, mask))
        column = found.column(manifest["settings"]["key"])
        if found.rows == mask.rows - int(np.count_nonzero(mask.is_dup)) and column is not None:
            if [column.lower()] == [name.lower() for name in asked]:
                return Source(found, folder / "groups.parquet")
            raise SnipError(
                f"{folder} knows the rows that go by their {column} only, and the metadata that "
                f"it was made from is not there; join --on {column}, or give it with --keys"
            )
    raise SnipError(
        f"{folder} was made without metadata, or it is not there any more; give the metadata that "
        "matches its features by position with --keys"
    )


def whole_set(metadata: Metadata, mask: Mask) -> Metadata:
    """Return metadata whose rows are the mask's; refuse other."""
    place_all(Held([str(f.path) for f in metadata.files], [f.rows for f in metadata.files]), mask)
    return metadata


def metadata_used(manifest: dict[str, Any]) -> Metadata | None:
    """Return the metadata that a run of ``snip dedup`` read, None where it is not as it was."""
    settings, described = manifest["settings"], manifest["request"].get("metadata")
    spec = settings["metadata"]
    features = settings["features"]
    if spec is None and features and (is_remote(features) or Path(features).is_dir()):
        spec = implied_metadata(features)
    if spec is None or not described:
        return None
    try:
        metadata = open_metadata(spec)
    except SnipError:  # moved, or made on another machine
        return None
    now = [(f.path.name, f.rows, f.path.stat().st_size) for f in metadata.files]
    return metadata if now == [(f["name"], f["rows"], f["size"]) for f in described] else None
