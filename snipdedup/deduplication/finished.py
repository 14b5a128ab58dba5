"""A finished OUT, read back: what its search found, and its decision."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.deduplication.inputs import Inputs
from snipdedup.deduplication.references import KIND, check_searched
from snipdedup.deduplication.result import Result, decide
from snipdedup.deduplication.search_result import SearchResult
from snipdedup.errors import SnipError
from snipdedup.features.scan import equal_rows
from snipdedup.groups.star import Best, Nearest, Rank
from snipdedup.join.forest import Edges
from snipdedup.storage import atomic
from snipdedup.storage.manifest import MANIFEST, is_finished, read_manifest


def finished_run(features: Any) -> Path | None:
    """Return FEATURES where it is a finished OUT, to be decided again."""
    if isinstance(features, str | Path):
        folder = Path(features).expanduser()
        if is_finished(folder):
            manifest = atomic.load_json(folder / MANIFEST)
            if isinstance(manifest, dict) and manifest.get("kind") == KIND:
                return folder
    return None


def read_result(folder: Path, inputs: Inputs, rank: Rank) -> Result:
    """Read back a finished run and decide as it did; ``rank`` is its keep order."""
    manifest = read_manifest(folder, KIND)
    settings = manifest["settings"]
    search = read_search(folder, inputs)
    grouping, keep = str(settings["grouping"]), settings["keep"]
    result = decide(search, inputs.features, settings["threshold"], grouping, keep, rank)
    return dataclasses.replace(result, manifest=manifest, out=folder)


def read_search(folder: Path, inputs: Inputs) -> SearchResult:
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
    forest, copies, originals = read_forest(folder, inputs)
    settings, bad = manifest["settings"], folder / "bad_rows.parquet"
    best = read_best(folder, features.rows) if settings["method"] == "semdedup" else None
    return SearchResult(
        names=[shard["name"] for shard in manifest["shards"]],
        offsets=features.offsets,
        threshold=settings["threshold"],
        forest=forest,
        copies=copies,
        originals=originals,
        bad=pq.read_table(bad)["row"].to_numpy() if bad.is_file() else np.empty(0, np.int64),
        checksums=known_checksums(manifest),
        notes=manifest["method"],
        also=inputs.also,
        best=best,
        references=inputs.references,
        nearest=read_nearest(folder, manifest, inputs),
        text_checksums=known_checksums(manifest["text"]) if inputs.text else [],
        reference_checksums=[
            value for entry in manifest.get("references", []) for value in known_checksums(entry)
        ],
        references_only=bool(settings.get("references_only")),
    )


def known_checksums(entry: dict[str, Any]) -> list[int]:
    """Return the Checksum of the shards of a manifest, or of one of its inputs."""
    return [int(shard["checksum"], 16) for shard in entry["shards"]]


def read_forest(folder: Path, inputs: Inputs) -> tuple[Edges, np.ndarray, np.ndarray]:
    """Read back the forest of distinct rows, and exact copies with the original of each."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "forest.parquet")
    edges = Edges(*(table[name].to_numpy() for name in ("a", "b", "similarity")))
    rows = 0 if inputs.features is None else inputs.features.rows
    if [column.dtype.kind for column in edges] != ["i", "i", "f"] or not all(
        len(ends) == 0 or 0 <= ends.min() <= ends.max() < rows for ends in edges[:2]
    ):
        raise SnipError(f"{folder / 'forest.parquet'}: damaged: not a forest of these rows")
    one = np.flatnonzero(edges.similarity == 1)
    for source in (inputs.features, inputs.text):
        if source is not None:
            one = one[equal_rows(source, edges.b[one], edges.a[one])]
    distinct = np.ones(len(edges.a), bool)
    distinct[one] = False
    order = one[np.argsort(edges.b[one])]
    return edges.where(distinct), edges.b[order], edges.a[order]


def read_nearest(folder: Path, manifest: dict[str, Any], inputs: Inputs) -> Nearest | None:
    """Read back each row's nearest reference row."""
    import pyarrow.parquet as pq

    if inputs.references is None:
        return None
    table = pq.read_table(folder / "references.parquet")
    names = table["reference"].to_numpy(zero_copy_only=False)
    called = [entry["name"] for entry in manifest["references"]]
    numbers = inputs.references.numbers_of(called, names, table["reference_row"].to_numpy())
    return Nearest(table["row"].to_numpy(), numbers, table["similarity"].to_numpy())


def read_best(folder: Path, rows: int) -> Best:
    """Read back what SemDeDup's rule decides by."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = folder / "semdedup.parquet"
    table = pq.read_table(path)
    if table.num_rows != rows:
        raise SnipError(f"{path}: expected {rows:,} rows, found {table.num_rows:,}; search again")
    missing = {"cluster": -1, "nearness": np.nan, "match": -1, "similarity": np.nan}
    columns = {name: np.asarray(pc.fill_null(table[name], fill)) for name, fill in missing.items()}
    return Best(**columns, centroids=np.load(folder / "centroids.npy"))
