"""A sheet of random removed pairs for a person to judge, and the precision that person found."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.auditing.removed_rows import AuditedRun, chosen_places, raw_cosines
from snipdedup.deduplication.decisions import read_sheet
from snipdedup.deduplication.read_out import pick, read_keys, read_partners, whole_groups
from snipdedup.errors import SnipError
from snipdedup.features.shards import Features
from snipdedup.groups.members import concatenate, no_members
from snipdedup.inspection.embedded import PLACES
from snipdedup.metadata.gather import RowTexts
from snipdedup.statistics import proportion_interval, sample_rows
from snipdedup.storage.atomic import replacing

COLUMNS = (
    "row", "representative", "cosine", "verdict",
    "key", "representative_key", "url", "representative_url",
    "caption", "representative_caption", "place", "representative_place",
    "picture", "representative_picture",
)  # fmt: skip
YES = {"yes", "y", "1", "true", "same", "duplicate", "dup"}
NO = {"no", "n", "0", "false", "different", "other"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute, or worse


def sample_pairs(
    run: AuditedRun, features: Features, texts: RowTexts, n: int, seed: int
) -> list[dict[str, Any]]:
    """Return random removed pairs as `COLUMNS` has them, in random order.

    Rows that are removed for a reference are left out: captions of references are not known.
    """
    counts, path = run.manifest["counts"], run.folder / "groups.parquet"
    total = counts["removed"] - counts.get("removed_for_reference", 0)
    total -= counts.get("removed_alone", 0)
    chosen = sample_rows(total, n, np.random.default_rng(seed))
    parts, before = [], 0
    for members in whole_groups(path):
        named = members.representative
        own = pick(members, members.is_dup & (named >= 0) & (named != members.row))
        parts.append(pick(own, chosen_places(chosen, before, len(own.row))))
        before += len(own.row)
    removed = concatenate(no_members(), *parts)
    order = np.random.default_rng(seed).permutation(len(removed.row))
    a, b = removed.row[order], removed.representative[order]
    cosine = raw_cosines(features, a, b, run.threads, run.memory)
    rows = np.concatenate([a, b])
    known = texts.about(rows, "url", "caption", "key")
    known["key"] |= read_keys(path, rows)
    places = {name: texts.read(texts.find(None, (name,)), rows) for name in PLACES}
    known["picture"] = {
        row: ": ".join(values[row] for values in places.values() if row in values)
        for row in rows.tolist()
    }
    pairs = []
    for x, y, value in zip(a.tolist(), b.tolist(), cosine.tolist(), strict=True):
        pair = {"row": x, "representative": y, "cosine": f"{value:.6f}"}
        for prefix, row in (("", x), ("representative_", y)):
            file, place = features.place(row)
            pair |= {prefix + name: values.get(row, "") for name, values in known.items()}
            pair[prefix + "place"] = f"{file.name} row {place}"
        pairs.append(pair)
    return pairs


def write_sheet(path: Path, pairs: list[dict[str, Any]]) -> None:
    """Write pairs as CSV with an empty column ``verdict``.

    A text that a spreadsheet would take for a formula gets a quote in front.
    """
    with replacing(path) as part, part.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for pair in pairs:
            quoted = {k: f"'{v}" for k, v in pair.items() if str(v).startswith(FORMULA)}
            writer.writerow({**pair, **quoted})


def human_precision(folder: Path, path: Path) -> str:
    """Return the precision that a person found in a sheet; refuse one that is of another OUT."""
    judged = read_verdicts(path)
    known = read_partners(folder / "groups.parquet", np.array([row for row, _, _ in judged]))
    for row, representative, _ in judged:
        if row == representative or known.get(row, (row,))[0] != representative:
            raise SnipError(
                f"{path}: row {row:,} is not removed for row {representative:,} in {folder}; the "
                "sheet is of another run"
            )
    verdicts = [verdict in YES for _, _, verdict in judged if verdict]
    if not verdicts:
        raise SnipError("no verdict in the sheet: write yes or no into its column verdict")
    right, total = sum(verdicts), len(verdicts)
    low, high = proportion_interval(right, total)
    text = (
        f"human precision {100 * right / total:.1f} % ({right:,} of {total:,} judged pairs are "
        f"duplicates; 95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    )
    if total < len(judged):
        text += f"\n{len(judged) - total:,} pairs of the sheet have no verdict yet"
    return text


def read_verdicts(path: Path) -> list[tuple[int, int, str]]:
    """Read a sheet that was judged: row, representative, verdict (empty where there is none)."""
    judged = []
    for where, line in read_sheet(path, "a sheet of --sheet", {"row", "representative", "verdict"}):
        try:
            row, representative = int(line["row"]), int(line["representative"])
        except ValueError:
            raise SnipError(f"{where}: expected row numbers, found {line['row']!r}") from None
        verdict = line["verdict"].lower()
        if verdict not in {"", *YES, *NO}:
            raise SnipError(f"{where}: expected yes or no as verdict, found {line['verdict']!r}")
        judged.append((row, representative, verdict))
    return judged
