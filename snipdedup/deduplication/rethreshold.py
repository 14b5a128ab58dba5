"""OUT read back: what a finished run found, to be decided anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.config import Dedup
from snipdedup.deduplication.found import Found
from snipdedup.deduplication.inputs import Inputs
from snipdedup.deduplication.references import KIND, References, check_searched
from snipdedup.deduplication.result import Result, decide
from snipdedup.errors import SnipError
from snipdedup.features.scan import equal_rows
from snipdedup.features.shards import Features
from snipdedup.groups.keep import rank_by
from snipdedup.groups.members import Best, Nearest
from snipdedup.join.forest import Edges
from snipdedup.metadata.tables import Metadata
from snipdedup.storage import atomic
from snipdedup.storage.manifest import MANIFEST, is_finished, read_manifest


def finished_run(features: Any) -> Path | None:
    """Return FEATURES where it is a finished OUT, to be decided anew."""
    if isinstance(features, str | Path):
        folder = Path(features).expanduser()
        if is_finished(folder):
            manifest = atomic.load_json(folder / MANIFEST)
            if isinstance(manifest, dict) and manifest.get("kind") == KIND:
                return folder
    return None


def load_result(
    folder: Path, inputs: Inputs, options: Dedup, metadata: Metadata | None = None
) -> Result:
    """Read back a finished run's decision; by metadata too, where its keep rules name columns."""
    settings = read_manifest(folder, KIND)["settings"]
    found = load_found(folder, inputs, options)
    names = ("threshold", "grouping", "keep", "seed")
    threshold, grouping, keep, seed = (settings[name] for name in names)
    rank = None if options.method == "semdedup" else rank_by(keep, seed, metadata)
    return decide(found, inputs.features, threshold, str(grouping), keep, seed, rank)


def load_found(folder: Path, inputs: Inputs, options: Dedup) -> Found:
    """Read back what a finished run found.

    Raises
    ------
    SnipError
        If the run's pairs were never verified, or its features are not the same any more.
    """
    import pyarrow.parquet as pq

    manifest, features = read_manifest(folder, KIND), inputs.features
    if not manifest["verified"] or features is None:
        raise SnipError(f"{folder}: its pairs are unverified and have no cosines; search again")
    check_searched(folder, features, manifest)
    if inputs.text is not None:
        check_searched(folder, inputs.text, manifest["text"])
    forest, copies, firsts = load_forest(folder, features, inputs.text)
    bad = folder / "bad_rows.parquet"
    best = load_best(folder, features.rows) if options.method == "semdedup" else None
    return Found(
        names=[shard["name"] for shard in manifest["shards"]],
        offsets=features.offsets,
        threshold=manifest["settings"]["threshold"],
        forest=forest,
        copies=copies,
        firsts=firsts,
        bad=pq.read_table(bad)["row"].to_numpy() if bad.is_file() else np.empty(0, np.int64),
        checksums=known_checksums([manifest]),
        notes=manifest["method"],
        also=inputs.also(options),
        best=best,
        references=inputs.references,
        nearest=load_nearest(folder, manifest, inputs.references),
        text_checksums=known_checksums([manifest["text"]] if inputs.text else []),
        reference_checksums=known_checksums(manifest.get("references", [])),
    )


def known_checksums(described: list[dict[str, Any]]) -> list[int]:
    """Return the Checksum of the shards of some entries of a manifest."""
    return [int(shard["checksum"], 16) for entry in described for shard in entry["shards"]]


def load_forest(
    folder: Path, features: Features, text: Features | None
) -> tuple[Edges, np.ndarray, np.ndarray]:
    """Read back the forest of distinct rows, and exact copies with the first row of each."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "forest.parquet")
    edges = Edges(*(table[name].to_numpy() for name in ("a", "b", "similarity")))
    if [column.dtype.kind for column in edges] != ["i", "i", "f"] or not all(
        len(ends) == 0 or 0 <= ends.min() <= ends.max() < features.rows for ends in edges[:2]
    ):
        raise SnipError(f"{folder / 'forest.parquet'}: damaged: not a forest of these rows")
    one = np.flatnonzero(edges.similarity == 1)
    for source in (features, text):
        if source is not None:
            one = one[equal_rows(source, edges.b[one], edges.a[one])]
    distinct = np.ones(len(edges.a), bool)
    distinct[one] = False
    order = one[np.argsort(edges.b[one])]
    return edges.where(distinct), edges.b[order], edges.a[order]


def load_nearest(
    folder: Path, manifest: dict[str, Any], references: References | None
) -> Nearest | None:
    """Read back each row's nearest reference row."""
    import pyarrow.parquet as pq

    if references is None:
        return None
    table = pq.read_table(folder / "references.parquet")
    names = table["reference"].to_numpy(zero_copy_only=False)
    called = [held["name"] for held in manifest["references"]]
    numbers = references.find(called, names, table["reference_row"].to_numpy())
    return Nearest(table["row"].to_numpy(), numbers, table["similarity"].to_numpy())


def load_best(folder: Path, rows: int) -> Best:
    """Read back what `save_best` wrote."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "semdedup.parquet")
    if table.num_rows != rows:
        raise SnipError(
            f"{folder / 'semdedup.parquet'}: expected {rows:,} rows, found "
            f"{table.num_rows:,}; search again"
        )

    def column(name: str, fill: float) -> np.ndarray:
        return np.asarray(pc.fill_null(table[name], fill))

    return Best(
        cluster=column("cluster", -1),
        nearness=column("nearness", np.nan),
        match=column("match", -1),
        similarity=column("similarity", np.nan),
        centroids=np.load(folder / "centroids.npy"),
    )
