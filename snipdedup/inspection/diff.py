"""``snip diff``: what changed between two runs over the same rows, with examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from snipdedup.config import Diff
from snipdedup.deduplication.inputs import KIND
from snipdedup.deduplication.read_out import pick, read_keys, read_partners, whole_groups
from snipdedup.deduplication.settings import HOW
from snipdedup.errors import SnipError
from snipdedup.groups.members import Members, concatenate, no_members
from snipdedup.inspection.display import places_of
from snipdedup.metadata.masks import load_mask
from snipdedup.storage.out_folder import as_written, read_manifest

ROW_KINDS = {
    "newly_removed": "rows kept in 1 and removed in 2",
    "newly_staying": "rows removed in 1 and kept in 2",
    "other_representative": "rows removed in both, for another row",
}
GROUP_KINDS = {
    "split": ("groups of 1 are not whole in 2", "is in"),
    "merged": ("groups of 2 were not whole in 1", "was in"),
}

TOLD = "no row: it was told to go"


@dataclass(frozen=True)
class DiffResult:
    """What ``snip diff`` found; ``str()`` is a text.

    ``differences`` has ``runs``, ``settings``, ``counts``: pairs of values; ``newly_removed``,
    ``newly_staying``, ``other_representative``: rows and examples; ``split``, ``merged``: groups
    and examples.
    """

    differences: dict[str, Any]

    def __str__(self) -> str:
        found = self.differences
        lines = [f"1: {found['runs'][0]}", f"2: {found['runs'][1]}", ""]
        for name, pair in {**found["settings"], **found["counts"]}.items():
            one, other = (f"{value:,}" if isinstance(value, int) else str(value) for value in pair)
            lines.append(f"  {name:<16}  {one:>14}  {other:>14}")
        for name, what in ROW_KINDS.items():
            lines += ["", f"{found[name]['rows']:,} {what}"]
            lines += [f"  {example_text(entry)}" for entry in found[name]["examples"]]
        for name, (what, verb) in GROUP_KINDS.items():
            lines += ["", f"{found[name]['groups']:,} {what}"]
            lines += [
                f"  group {entry['group']} ({entry['rows']:,} rows) {verb} {entry['parts']:,} parts"
                for entry in found[name]["examples"]
            ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return the differences."""
        return self.differences


def run(options: Diff) -> DiffResult:
    """Run ``snip diff``."""
    folders = [Path(out).expanduser() for out in (options.out1, options.out2)]
    with as_written(folders[0]), as_written(folders[1]):
        manifests = [read_manifest(folder, KIND) for folder in folders]
        refuse_other_rows(folders, manifests)
        return DiffResult(compare(folders, manifests, options.n))


def refuse_other_rows(folders: list[Path], manifests: list[dict[str, Any]]) -> None:
    """Refuse two runs whose shards differ in number, rows or checksum; name the first that does."""
    shards = [manifest["shards"] for manifest in manifests]
    text = f"{folders[0]} and {folders[1]} are not runs over the same rows"
    if len(shards[0]) != len(shards[1]):
        raise SnipError(
            f"{text}: {len(shards[0]):,} shards of features, {len(shards[1]):,} in the other"
        )
    for one, other in zip(*shards, strict=True):
        for name in ("rows", "checksum"):  # without features none was taken
            if name in one and name in other and one[name] != other[name]:
                raise SnipError(
                    f"{text}: {one['name']} has {name} {one[name]}, {other['name']} {other[name]}"
                )


def compare(folders: list[Path], manifests: list[dict[str, Any]], n: int) -> dict[str, Any]:
    """Return all differences as JSON values, ``n`` examples of each kind."""
    masks = [load_mask(folder / "is_dup.npy") for folder in folders]
    tables = [folder / "groups.parquet" for folder in folders]
    groups = [load_groups(table) for table in tables]
    rows = {
        "newly_removed": np.flatnonzero(masks[1] > masks[0]),
        "newly_staying": np.flatnonzero(masks[0] > masks[1]),
        "other_representative": other_representatives(groups[0], groups[1], masks[0] & masks[1]),
    }
    shown = np.concatenate([found[:n] for found in rows.values()])
    keys = read_keys(tables[0], shown) | read_keys(tables[1], shown)
    partners = [read_partners(table, shown) for table in tables]
    examples = {
        row: {"row": row, **place, "key": keys.get(row), **decisions(row, partners, masks)}
        for row, place in places_of(manifests[0]["shards"], shown.tolist()).items()
    }
    one, other = (manifest["settings"] for manifest in manifests)
    settings = {  # but those that say how or where only
        name: [one.get(name), other.get(name)]
        for name in sorted({*one, *other} - HOW)
        if one.get(name) != other.get(name)
    }
    counts = ("rows", "removed", "kept", "groups", "largest_group", "chained")
    split, merged = regrouped(*groups), regrouped(*groups[::-1])
    return {
        "runs": [str(folder) for folder in folders],
        "settings": settings,
        "counts": {name: [m["counts"].get(name) for m in manifests] for name in counts},
        **{
            name: {"rows": len(found), "examples": [examples[row] for row in found[:n].tolist()]}
            for name, found in rows.items()
        },
        "split": {"groups": len(split), "examples": split[:n]},
        "merged": {"groups": len(merged), "examples": merged[:n]},
    }


def load_groups(path: Path) -> Members:
    """Read the members of all groups, by row."""
    members = concatenate(no_members(), *whole_groups(path))
    return pick(members, np.argsort(members.row))


def other_representatives(one: Members, other: Members, removed: np.ndarray) -> np.ndarray:
    """Return the rows that both runs remove, but for different rows, (n,) int64."""
    rows, i, j = np.intersect1d(one.row, other.row, assume_unique=True, return_indices=True)
    moved = one.representative[i] != other.representative[j]
    return rows[moved & removed[rows]]


def regrouped(one: Members, other: Members) -> list[dict[str, int]]:
    """Return the groups of ``one`` whose rows are not all together in ``other``, largest first.

    A row in no group of ``other`` is a part by itself.
    """
    _, i, j = np.intersect1d(one.row, other.row, assume_unique=True, return_indices=True)
    label = one.row.copy()
    label[i] = other.group[j]
    table = pa.table({"group": one.group, "label": label}).group_by("group")
    found = table.aggregate([("label", "count"), ("label", "count_distinct")])
    torn = found.filter(pc.field("label_count_distinct") > 1)
    return [
        {"group": g["group"], "rows": g["label_count"], "parts": g["label_count_distinct"]}
        for g in torn.sort_by([("label_count", "descending"), ("group", "ascending")]).to_pylist()
    ]


def decisions(
    row: int, partners: list[dict[int, tuple[int, float]]], masks: list[np.ndarray]
) -> dict[str, list[Any]]:
    """Return a row's representative in both runs and its cosine with it; None where there is none.

    A representative that is a row of a reference is given as ``reference row N``; that of a row
    that was told to go and duplicates none that stays, as `TOLD`.
    """
    found: list[tuple[Any, float]] = [known.get(row, (None, np.nan)) for known in partners]
    for number, (other, _) in enumerate(found):
        if other == row and masks[number][row]:
            found[number] = (TOLD, np.nan)
    return {
        "representatives": [
            f"reference row {~other}" if isinstance(other, int) and other < 0 else other
            for other, _ in found
        ],
        "similarities": [None if np.isnan(similarity) else similarity for _, similarity in found],
    }


def example_text(entry: dict[str, Any]) -> str:
    """Return an example as a line."""
    decided = []
    both = zip(entry["representatives"], entry["similarities"], strict=True)
    for number, (representative, similarity) in enumerate(both, 1):
        if representative in (None, entry["row"]):
            decided.append(f"kept in {number}")
        else:
            cosine = "" if similarity is None else f" (cosine {similarity:.4f})"
            what = "row " if isinstance(representative, int) else ""
            decided.append(f"removed in {number} for {what}{representative}{cosine}")
    key = f" {entry['key']}" if entry["key"] else ""
    place = f"{entry['shard']} row {entry['shard_row']}"
    return f"row {entry['row']}{key} ({place}): {', '.join(decided)}"
