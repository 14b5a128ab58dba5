"""What the script of a report shows, as JSON values: rows, groups of them, pairs, lists.

A row stands once, as a list that `FIELDS` names, cut after its last value; groups, pairs and lists
name it by number. Entries are [row, representative, cosine]; a representative below 0 is the
complement of a row of a reference, a cosine that is not known is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from snipdedup.deduplication.read_out import Survey
from snipdedup.groups.members import Members
from snipdedup.inspection.display import ShownRow, cosine_text, page_text, safe_link

FIELDS = (
    "row", "shard", "place", "removed", "key", "caption", "url", "link", "facts", "also", "long",
    "cutKey", "picture", "changed",
)  # fmt: skip
KEY, TEXT, FACTS = 80, 240, 120  # characters of a key, of a caption or url, of facts


@dataclass
class Row(ShownRow):
    """What the page shows of one row."""

    removed: bool = False
    picture: str | None = None  # a ``data:`` URL of a thumbnail
    changed: bool = False  # its file is not the one that was embedded
    also: list[tuple[str, float]] = field(default_factory=list)  # second features, cosine in each
    facts: str = ""  # of the picture: width, height, bytes, time


def row_values(row: Row, shards: dict[str, int]) -> list[Any]:
    """Return a row as `FIELDS` has it; ``shards`` has the number of each shard."""
    key, caption = page_text(row.key, KEY), page_text(row.caption, TEXT)
    also = [f"{page_text(name, 40)} {cosine_text(value)}" for name, value in row.also]
    values = [
        row.row, shards[row.shard], row.shard_row, int(row.removed), key, caption,
        page_text(row.url, TEXT), safe_link(row.url), page_text(row.facts, FACTS),
        " · ".join(also), len(row.caption or "") if caption.endswith("…") else 0,
        int(key != (row.key or "")), row.picture, int(row.changed),
    ]  # fmt: skip
    while not values[-1] and len(values) > 4:
        values.pop()
    return [value or 0 for value in values[:4]] + [value or "" for value in values[4:]]


def entries(members: Members) -> list[tuple[int, int, float | None]]:
    """Return members as entries."""
    cosines = map(known, members.similarity.tolist())
    return list(zip(members.row.tolist(), members.representative.tolist(), cosines, strict=True))


def known(cosine: float) -> float | None:
    """Return a cosine as JSON has it."""
    return None if np.isnan(cosine) else round(cosine, 6)


def ordered_rows(survey: Survey, asked: Iterable[int]) -> Iterator[np.ndarray]:
    """Yield the rows that the page shows, the most interesting first; some several times."""
    yield np.array(list(asked), np.int64)
    samples = [sample.shown for sample in (*survey.bands, survey.below, survey.spared)]
    for members in (*samples, *(group.shown for group in survey.largest)):
        yield np.stack([members.row, members.representative], 1).ravel()
        if members is samples[-1]:
            yield survey.copied


def page_data(
    rows: dict[int, Row], survey: Survey, asked: list[Any], names: list[str], known_keep: bool
) -> dict[str, Any]:
    """Return all that the script shows; ``asked`` are entries, ``names`` those of the shards."""
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "fields": FIELDS,
        "rows": [row_values(row, numbers) for row in rows.values()],
        "shards": names,
        "groups": [
            [int(g.shown.group[0]), g.size, g.removed, known(g.lowest), entries(g.shown)]
            for g in survey.largest
        ],
        "bands": [entries(band.shown) for band in survey.bands],
        "asked": asked,
        "copied": list(zip(survey.copied.tolist(), survey.copies.tolist(), strict=True)),
        "spared": [[a, b, None] for a, b, _ in entries(survey.spared.shown)],
        "below": entries(survey.below.shown),
        "knownKeep": known_keep,
    }
