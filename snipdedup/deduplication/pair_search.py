"""The pairs that a search found, before anything is decided: in memory, and read from files.

In the work folder they are kept for a run that resumes (the join keeps its own task files instead).
A finished OUT keeps them for good.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from snipdedup.deduplication.decisions import Decisions
from snipdedup.deduplication.inputs import KIND, Inputs, check_searched, known_checksums
from snipdedup.deduplication.second_features import also_column, recorded_seconds
from snipdedup.errors import SnipError
from snipdedup.features.scan import Scan, equal_pairs
from snipdedup.features.shards import Features
from snipdedup.groups.members import (
    COPY,
    EDGE,
    Best,
    Block,
    Members,
    Nearest,
    blocks_of_groups,
    in_row_order,
    replace_rows,
)
from snipdedup.join.forest import Edges, edges_of, join_edges, order_by
from snipdedup.storage import atomic
from snipdedup.storage.external_sort import row_kind
from snipdedup.storage.out_folder import read_manifest

ARRAY_FILE, DONE_FILE = "search.npz", "search.json"  # in the work folder
FoundPairs = tuple[Scan, Edges, dict[str, Any]]  # a scan, a forest, figures for the manifest
TUPLES: dict[str, Any] = {"forest": Edges, "pairs": Edges, "best": Best, "nearest": Nearest}


@dataclass(frozen=True)
class PairSearch:
    """What a search for pairs found: the pairs as a forest, exact copies, bad rows."""

    names: list[str]  # file name of each shard
    offsets: np.ndarray  # (shards + 1,) int64: first row of each shard, then the number of rows
    threshold: float  # the cosine searched for
    forest: Edges  # maximum spanning forest of the pairs among distinct rows
    copies: np.ndarray  # (c,) int64, ascending: rows equal bit for bit to an earlier row
    originals: np.ndarray  # (c,) int64: the first such row of each
    bad: np.ndarray  # (m,) int64: rows that cannot be compared
    inputs: Inputs  # what was searched
    checksums: dict[str, list[int]] = field(default_factory=dict)  # of shards read, by input
    pairs: Edges | None = None  # all pairs, where there were no features to verify them
    flags: np.ndarray | None = None  # (rows,) bool, of method ``adc``
    notes: dict[str, Any] = field(default_factory=dict)  # the method's figures, for the manifest
    best: Best | None = None  # of SemDeDup's rule; its pairs are rows with their matches
    nearest: Nearest | None = None  # of each distinct row that matches a reference row
    references_only: bool = False  # rows were compared with reference rows only

    @classmethod
    def of(
        cls, inputs: Inputs, features: Features, threshold: float, found: FoundPairs
    ) -> PairSearch:
        """Put together what a search of the inputs' features found."""
        seen, forest, notes = found
        names = [shard.path.name for shard in features.shards]
        return cls(
            names, features.offsets, threshold, forest, seen.copies, seen.firsts, seen.bad, inputs,
            {"features": seen.checksums}, notes=notes,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.offsets[-1])

    @property
    def verified(self) -> bool:
        """Whether each pair was verified on the raw features."""
        return self.pairs is None

    def at(self, threshold: float) -> PairSearch:
        """Return what a search at a higher threshold would have found."""
        nearest = None if self.nearest is None else self.nearest.at(threshold)
        forest = self.forest.at(threshold)
        return dataclasses.replace(self, forest=forest, nearest=nearest, threshold=threshold)

    def whole_block(self, threshold: float) -> Block:
        """Return all groups at a threshold as one block, which may hold edges below it."""
        if self.best is None:
            return Block(self.forest, self.copies, self.originals, self.nearest, self.pairs)
        none = np.empty(0, np.int64)  # copies are matches as others are
        return Block(self.best.edges(threshold), none, none)

    def blocks(self, threshold: float, folder: Path | None = None) -> Iterator[Block]:
        """Yield whole groups at a threshold, see `blocks_of_groups`."""
        level = threshold if self.verified and self.best is None else -np.inf
        yield from blocks_of_groups(self.whole_block(threshold), level, self.rows, folder)

    def original_of(self, rows: np.ndarray) -> np.ndarray:
        """Return for each row the first that equals it bit for bit, often the row itself."""
        return replace_rows(rows, self.copies, self.originals)

    def places(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the shard's name and the row in it of each row, as columns."""
        shard = np.searchsorted(self.offsets, rows, side="right") - 1
        # not by pa.Array.take: to load pyarrow.compute takes as long as a million names do here
        names = pa.array(np.array(self.names, object)[shard], pa.string())
        return {"shard": names, "shard_row": rows - self.offsets[shard]}

    def forest_table(self, forest: Edges) -> pa.Table:
        """Return edges as rows of ``forest.parquet``; unverified pairs have no similarity."""
        similarity = pa.array(forest.similarity, mask=np.full(len(forest.a), not self.verified))
        return pa.table({"a": forest.a, "b": forest.b, "similarity": similarity})

    def groups_table(
        self,
        members: Members,
        keys: Any = None,
        near: np.ndarray | None = None,
        also: Sequence[np.ndarray] = (),
        decisions: Decisions | None = None,
    ) -> pa.Table:
        """Return members, with their ``keys`` if known, as rows of ``groups.parquet``.

        With references, ``reference`` names the input whose row the representative is, null for
        FEATURES; ``near`` and ``also`` are as in `Result`.
        """
        columns = {
            "row": members.row,
            **self.places(members.row),
            "key": pa.nulls(len(members.row), pa.string()) if keys is None else keys,
            "group": members.group,
            "representative": members.representative,
            "similarity": pa.array(members.similarity, mask=np.isnan(members.similarity)),
            "is_dup": members.is_dup,
        }
        if (references := self.inputs.references) is not None:
            outside, representative = members.representative < 0, members.representative.copy()
            names, representative[outside] = references.locate(~representative[outside])
            near = np.full(len(members.row), np.nan, np.float32) if near is None else near
            columns["representative"] = representative
            columns["reference"] = names.take(pa.array(np.cumsum(outside) - 1, mask=~outside))
            columns["reference_similarity"] = pa.array(near, mask=np.isnan(near))
        for number in range(len(self.inputs.seconds)):
            cosine = also[number] if also else np.full(len(members.row), np.nan, np.float32)
            columns[also_column(number)] = pa.array(cosine, mask=np.isnan(cosine))
        if decisions is not None:
            columns["decision"] = decisions.column(members.row)
        return pa.table(columns)

    def edges(self, folder: Path | None = None) -> Iterator[Edges]:
        """Yield the forest with exact copies, ordered by (a, b), some at a time."""
        block, row = self.whole_block(self.threshold), row_kind(self.rows)
        kinds = {"a": row, "b": row, "similarity": "<f4"}
        parts = (part for what, part in block.parts(-np.inf) if what in (EDGE, COPY))
        path = folder and folder / "edges"
        for records in in_row_order(parts, kinds, block.size(), self.rows, path):
            edges = edges_of(records)
            yield edges.where(order_by(edges.a, edges.b))

    @cached_property
    def whole_forest(self) -> Edges:
        """The forest with exact copies, ordered by (a, b)."""
        return join_edges(list(self.edges()))


def save_search(search: PairSearch, work: Path) -> None:
    """Write what a search found, but its inputs, to the work folder, with checksums."""
    arrays: dict[str, np.ndarray] = {}
    values: dict[str, Any] = {}
    for name, value in vars(search).items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif name in TUPLES and value is not None:
            arrays |= {f"{name}_{column}": part for column, part in value._asdict().items()}
        elif name not in (*TUPLES, "inputs", "whole_forest"):
            values[name] = value
    atomic.save_npz(work / ARRAY_FILE, lasting=False, **arrays)
    atomic.write_done_file(work / DONE_FILE, [work / ARRAY_FILE], {"values": values})


def load_search(work: Path, inputs: Inputs) -> PairSearch | None:
    """Read back what `save_search` wrote; None where there is nothing, or it is damaged.

    Nor is what another version wrote, with other entries, read.
    """
    done = atomic.read_done(work / DONE_FILE, work)
    if done is None:
        return None
    values = done["values"]
    with np.load(work / ARRAY_FILE) as file:
        values |= dict(file)
    for name, kind in TUPLES.items():
        columns = [values.pop(f"{name}_{column}", None) for column in kind._fields]
        values[name] = None if columns[0] is None else kind(*columns)
    if not values.keys() <= {field.name for field in fields(PairSearch)}:
        return None
    return PairSearch(**values, inputs=inputs)


def read_search(folder: Path, inputs: Inputs) -> PairSearch:
    """Read back what a finished run found; its pairs must be verified.

    Its features must be the same, if they are among the inputs.
    """
    manifest = read_manifest(folder, KIND)
    if not manifest["verified"]:
        raise SnipError(f"{folder}: its pairs are unverified and have no cosines; search again")
    if inputs.features is not None:
        check_searched(folder, inputs.features, manifest)
    offsets = np.cumsum([0, *(shard["rows"] for shard in manifest["shards"])], dtype=np.int64)
    also = recorded_seconds(manifest)
    for second, entry in zip(inputs.seconds, also, strict=True):
        check_searched(folder, second.features, entry)
    forest, copies, originals = read_forest(folder, inputs, int(offsets[-1]))
    settings, best, nearest = manifest["settings"], None, None
    if settings["method"] == "semdedup":
        best = read_best(folder, int(offsets[-1]))
    if inputs.references is not None:
        table = pq.read_table(folder / "references.parquet")
        row, similarity = table["row"].to_numpy(), table["similarity"].to_numpy()
        names, rows = table["reference"].to_numpy(False), table["reference_row"].to_numpy()
        called = [entry["name"] for entry in manifest["references"]]
        nearest = Nearest(row, inputs.references.numbers_of(called, names, rows), similarity)
    bad = folder / "bad_rows.parquet"
    references = manifest.get("references", [])
    read = {"features": [manifest], "references": references, "also": also}
    return PairSearch(
        names=[shard["name"] for shard in manifest["shards"]],
        offsets=offsets,
        threshold=settings["threshold"],
        forest=forest,
        copies=copies,
        originals=originals,
        bad=pq.read_table(bad)["row"].to_numpy() if bad.is_file() else np.empty(0, np.int64),
        inputs=inputs,
        checksums={
            name: [checksum for entry in entries for checksum in known_checksums(entry)]
            for name, entries in read.items()
        },
        notes=manifest["method"],
        best=best,
        nearest=nearest,
        references_only=bool(settings.get("references_only")),
    )


def read_forest(folder: Path, inputs: Inputs, rows: int) -> tuple[Edges, np.ndarray, np.ndarray]:
    """Read back the forest of distinct rows, and exact copies with the original of each."""
    table = pq.read_table(folder / "forest.parquet")
    edges = Edges(*(table[name].to_numpy() for name in ("a", "b", "similarity")))
    if [column.dtype.kind for column in edges] != ["i", "i", "f"] or not all(
        len(ends) == 0 or 0 <= ends.min() <= ends.max() < rows for ends in edges[:2]
    ):
        raise SnipError(f"{folder / 'forest.parquet'}: damaged: not a forest of these rows")
    one = np.flatnonzero(edges.similarity == 1)
    for source in inputs.compared():
        one = one[equal_pairs(source, edges.b[one], edges.a[one])]
    distinct = np.ones(len(edges.a), bool)
    distinct[one] = False
    order = one[np.argsort(edges.b[one])]
    return edges.where(distinct), edges.b[order], edges.a[order]


def read_best(folder: Path, rows: int) -> Best:
    """Read back what SemDeDup's rule decides by."""
    import pyarrow.compute as pc  # here: it takes a tenth of a second to load

    path = folder / "semdedup.parquet"
    table = pq.read_table(path)
    if table.num_rows != rows:
        raise SnipError(f"{path}: expected {rows:,} rows, found {table.num_rows:,}; search again")
    missing = {"cluster": -1, "nearness": np.nan, "match": -1, "similarity": np.nan}
    columns = {name: np.asarray(pc.fill_null(table[name], fill)) for name, fill in missing.items()}
    return Best(**columns, centroids=np.load(folder / "centroids.npy"))
