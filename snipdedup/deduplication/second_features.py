"""Second features (``--also``, ``--text_features``), in which a pair must match, too.

They are row for row: as many as FEATURES have, in the same order. Where both have metadata with
keys, these must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from snipdedup import progress
from snipdedup.commands import split_also
from snipdedup.config import Dedup
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.origin import origin_of
from snipdedup.features.shards import (
    Features,
    implied_metadata,
    open_features,
    parts_for,
    request_of,
)
from snipdedup.groups.pairs import Also
from snipdedup.metadata.tables import Metadata, as_texts, open_metadata
from snipdedup.storage.remote import absolute_location
from snipdedup.storage.web import redacted

TEXTS = pa.array([], pa.string())
ALSO = "also_similarity_"  # begins the columns of groups.parquet
ROWS = "expected one for each row, in the same order"
FAILED = "pictures that failed in one of two runs of snip embed are missing there: failed.parquet"


class SecondFeatures(NamedTuple):
    """Rows of another kind: two match from the cosine ``threshold`` on."""

    name: str  # as manifests, messages and pages call them
    features: Features
    threshold: float
    source: str | None = None  # where they lie; None of an array
    metadata: Path | None = None  # beside them

    @property
    def also(self) -> Also:
        """What a pair must match in besides."""
        return Also(self.features.gather, self.threshold)

    def request(self) -> dict[str, Any]:
        """Return what tells them from others."""
        return {**request_of(self.features), "threshold": self.threshold}


def also_column(number: int) -> str:
    """Return the column of ``groups.parquet`` for second features, numbered from 0."""
    return f"{ALSO}{number + 1}"


def known_thresholds(given: Any) -> list[tuple[Any, float]]:
    """Return what ``--also`` names, each with its threshold: the one given, or its model's."""
    known = []
    for source, limit in split_also(given):
        if limit is not None:
            known.append((source, limit))
        elif (origin := origin_of(source)) is not None:
            known.append((source, origin.threshold))
        else:
            is_path = isinstance(source, str | Path)
            raise UsageError(
                f"--also {source if is_path else 'with an array'} has no threshold, and is not of "
                "snip embed, which knows one: give "
                + (f"{source}:THRESHOLD" if is_path else "(features, threshold)")
            )
    return known


def second_sources(options: Dedup) -> list[tuple[Any, float]]:
    """Return the second features of some settings, those of the captions first."""
    texts = [(options.text_features, options.text_threshold)]
    return [*(texts if options.text_features is not None else []), *known_thresholds(options.also)]


def saved_also(given: Any) -> list[str] | None:
    """Return ``--also`` as a manifest holds it, None of arrays."""
    known = known_thresholds(given)
    if not known or not all(isinstance(source, str | Path) for source, _ in known):
        return None
    return [f"{absolute_location(source)}:{limit!r}" for source, limit in known]


def open_seconds(
    sources: Sequence[tuple[Any, float]], features: Features, parts: str | None = None,
    **how: str | None,
) -> tuple[SecondFeatures, ...]:  # fmt: skip
    """Open second features; ``how`` is ``array`` and ``column`` of `open_features`.

    ``parts`` are those of a pattern, and of no others.
    """
    found = []
    for number, (source, limit) in enumerate(sources, 1):
        is_path = isinstance(source, str | Path)
        name = redacted(str(source)) if is_path else f"array {number}"
        rows = open_features(source, parts=parts_for(source, parts), **how)
        metadata = metadata_of(source)
        if rows.rows != features.rows:
            raise SnipError(
                f"{name} has {rows.rows:,} rows, FEATURES has {features.rows:,}; {ROWS}"
                + (f" ({FAILED})" if metadata is not None else "")
            )
        place = absolute_location(source) if is_path else None
        found.append(SecondFeatures(name, rows, limit, place, metadata))
    return tuple(found)


def metadata_of(source: Any) -> Path | None:
    """Return the metadata beside features, None where there is none."""
    if not isinstance(source, str | Path):
        return None
    origin = origin_of(source)
    return implied_metadata(source if origin is None else origin.folder)


def check_keys(seconds: Sequence[SecondFeatures], source: Any, metadata: Metadata | None) -> None:
    """Refuse second features whose metadata has other keys than that of FEATURES.

    ``metadata`` is what the run reads; without it, what lies beside ``source``.
    """
    named = [second for second in seconds if second.metadata is not None]
    if named and metadata is None and (beside := metadata_of(source)) is not None:
        metadata = open_metadata(beside)
    for second in named:
        if metadata is None or second.metadata is None:
            continue
        other = open_metadata(second.metadata)
        other.check_matches(second.features.describe())
        key, others = metadata.column(), other.column()
        if metadata.paths() == other.paths() or key is None or others is None:
            continue
        if key.lower() != others.lower():  # a uid, say, and a hash
            continue
        for row, own, there in compare_columns((metadata, key), (other, others)):
            raise SnipError(
                f"{metadata.place(row)} has the key {own!r}, {other.place(row)}, beside "
                f"{second.name}, has {there!r}; {ROWS} ({FAILED})"
            )


def compare_columns(
    one: tuple[Metadata, str], other: tuple[Metadata, str]
) -> Iterator[tuple[int, Any, Any]]:
    """Yield each row in which two columns differ, and both values as texts."""
    sides, waiting, row = [texts_of(*one), texts_of(*other)], [TEXTS, TEXTS], 0
    with progress.bar(one[0].rows, "comparing keys", "rows") as bar:
        while True:
            for side, texts in enumerate(sides):
                waiting[side] = waiting[side] if len(waiting[side]) else next(texts, TEXTS)
            size = min(map(len, waiting))
            if not size:
                return
            left, right = (texts.slice(0, size) for texts in waiting)
            if not left.equals(right):
                pairs = zip(left.to_pylist(), right.to_pylist(), strict=True)
                yield from ((row + n, a, b) for n, (a, b) in enumerate(pairs) if a != b)
            waiting, row = [texts.slice(size) for texts in waiting], row + size
            bar.update(size)


def texts_of(metadata: Metadata, column: str) -> Iterator[Any]:
    """Yield a column as arrow arrays of texts; none is empty."""
    for file, _, batch in metadata.read([column]):
        if batch.num_rows:
            yield as_texts(file, column, batch.column(0))


def recorded_seconds(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a manifest's entries of second features, those of older versions too.

    Each has ``name``, ``source``, ``threshold``, ``request`` and ``shards``; a source is None of an
    array.
    """
    found = list(manifest.get("also", []))
    if (text := manifest.get("text")) is not None:  # before there was --also
        settings = manifest["settings"]
        source, limit = settings["text_features"], settings["text_threshold"]
        found = [{"name": source, "source": source, "threshold": limit, **text}]
    return found
