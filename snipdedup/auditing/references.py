"""Rows that go for a row of a reference, proved on the reference's own raw features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.auditing.proof import Proof, Run
from snipdedup.auditing.verdict import Verdict
from snipdedup.deduplication.out_reader import BATCH_ROWS
from snipdedup.errors import SnipError
from snipdedup.features.shards import Features, open_features
from snipdedup.metadata.files import open_parquet
from snipdedup.metadata.masks import load_mask
from snipdedup.storage import atomic

COLUMNS = ["row", "reference", "representative", "similarity"]


class Held(NamedTuple):
    """A reference, as it lies on disk now.

    Attributes
    ----------
    name : str
        What groups.parquet calls it.
    features : Features
    gone : (rows,) bool
        Its rows that do not stay, of an earlier OUT.
    """

    name: str
    features: Features
    gone: np.ndarray


def open_held(described: dict[str, Any], settings: dict[str, Any]) -> Held:
    """Open a reference that a manifest describes.

    Raises
    ------
    SnipError
        If it cannot be read, or an earlier OUT was made anew since.
    """
    if not described["files"]:
        raise SnipError(f"reference {described['name']} was an array, which cannot be read again")
    features = open_features(described["files"], array=settings["array"], column=settings["column"])
    gone = np.zeros(features.rows, bool)
    known = described["request"]["mask"]
    if known is not None:
        path = Path(described["path"]) / "is_dup.npy"
        gone = load_mask(path)
        if atomic.sha256(path) != known:
            raise SnipError(f"reference {described['name']}: {path} was made anew since")
    return Held(described["name"], features, gone)


def check_references(run: Run, held: list[Held], proof: Proof, verdict: Verdict) -> None:
    """Prove the rows that go for a row of a reference.

    Those of references that could not be opened are noted as not proved.
    """
    by_name = {reference.name: reference for reference in held}
    unproved: dict[str, int] = {}
    proved = 0
    for name, row, representative, similarity in referred(run.folder / "groups.parquet"):
        reference = by_name.get(name)
        if reference is None or proof.features is None:
            unproved[name] = unproved.get(name, 0) + len(row)
            continue
        proved += len(row)
        prove(run, reference, proof, verdict, (row, representative, similarity))
    for name, rows in unproved.items():
        verdict.fail("unproved", f"{rows:,} rows go for rows of {name}, which are not proved")
    named = f"{len(held):,} reference{'s' * (len(held) != 1)}"
    verdict.say("references", f"{proved:,} rows go for rows of {named}")


def prove(
    run: Run,
    reference: Held,
    proof: Proof,
    verdict: Verdict,
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """Compare rows with their representatives in one reference."""
    row, representative, similarity = pairs
    there = (representative >= 0) & (representative < reference.features.rows)
    there[there] &= ~reference.gone[representative[there]]
    verdict.fail_each(
        "reference",
        np.flatnonzero(~there),
        lambda i: (
            f"{run.place(row[i])}: row {representative[i]:,} of {reference.name}, for which "
            "it goes, is none that stays there"
        ),
    )
    row, representative, similarity = (values[there] for values in pairs)

    def other(i: int) -> str:
        path, place = reference.features.place(int(representative[i]))
        return f"row {representative[i]:,} of {reference.name} ({path.name} row {place})"

    if proof.features is not None:
        found = proof.cosines(proof.features, row, representative, reference.features)
        proof.judge(row, found, similarity, other)


def referred(path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (reference, rows, their representatives there, cosines), a batch at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for batch in open_parquet(path).iter_batches(BATCH_ROWS, columns=COLUMNS):
        table = pa.Table.from_batches([batch]).filter(pc.field("reference").is_valid())
        for name in pc.unique(table["reference"]).to_pylist():
            part = table.filter(pc.field("reference") == name)
            rows, named, similarity = (
                part[column].to_numpy() for column in ("row", "representative", "similarity")
            )
            yield name, rows, named, similarity
