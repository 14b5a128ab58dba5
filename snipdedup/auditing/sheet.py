"""A sheet of random removed pairs for a person to judge, and the precision that person found."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.statistics import proportion_interval
from snipdedup.storage import atomic

COLUMNS = (
    "row", "representative", "cosine", "verdict",
    "key", "representative_key", "url", "representative_url",
    "caption", "representative_caption", "place", "representative_place",
)  # fmt: skip
YES = {"yes", "y", "1", "true", "same", "duplicate", "dup"}
NO = {"no", "n", "0", "false", "different", "other"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute, or worse


def write_sheet(path: Path, pairs: list[dict[str, Any]]) -> None:
    """Write pairs as CSV with an empty column ``verdict``.

    Parameters
    ----------
    path : Path
        Must not exist: it may hold a person's verdicts.
    pairs : list of dict
        By the names of `COLUMNS`.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for pair in pairs:
        writer.writerow({name: defused(value) for name, value in pair.items()})
    with atomic.replacing(path) as part:
        part.write_text(text.getvalue(), encoding="utf-8-sig")  # else Excel guesses wrong


def refuse_existing(path: Path) -> None:
    """Refuse to write over a sheet, which may be judged already."""
    if path.exists():
        raise SnipError(
            f"{path} exists and may hold verdicts; give it back with --judged, or choose another "
            "name for --sheet"
        )


def defused(value: Any) -> Any:
    """Return a text that no spreadsheet takes for a formula; captions are anyone's."""
    if isinstance(value, str) and value.startswith(FORMULA):
        return "'" + value
    return value


def read_verdicts(path: Path) -> tuple[np.ndarray, np.ndarray, list[bool | None]]:
    """Read a sheet that was judged.

    Returns
    -------
    rows, representatives : (n,) int64
    verdicts : list of bool or None
        Whether the person found the two to be the same; None where nothing was written.

    Raises
    ------
    SnipError
        If it is no such sheet, or a verdict is neither yes nor no: names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SnipError(f"{path}: expected a sheet of --sheet as UTF-8 CSV: {error}") from error
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)  # what spreadsheets of other countries save
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    missing = {"row", "representative", "verdict"} - set(reader.fieldnames or ())
    if missing:
        raise SnipError(
            f"{path}: expected a sheet of --sheet, its column {min(missing)} is not there"
        )
    found: list[tuple[int, int, bool | None]] = []
    for line in reader:
        where = f"{path} line {reader.line_num}"
        try:
            pair = int(line["row"]), int(line["representative"])
        except (TypeError, ValueError):
            raise SnipError(f"{where}: expected row numbers, found {line['row']!r}") from None
        found.append((*pair, verdict_of(line["verdict"], where)))
    rows, representatives = (np.array([f[i] for f in found], np.int64) for i in (0, 1))
    return rows, representatives, [judged for *_, judged in found]


def verdict_of(text: str | None, where: str) -> bool | None:
    """Return what a person wrote: True for yes, False for no, None for nothing."""
    word = (text or "").strip().lower()
    if not word:
        return None
    if word not in YES | NO:
        raise SnipError(f"{where}: expected yes or no as verdict, found {text!r}")
    return word in YES


def precision_text(verdicts: list[bool | None]) -> str:
    """Return the human precision with its interval.

    Raises
    ------
    SnipError
        If nothing was judged.
    """
    judged = [verdict for verdict in verdicts if verdict is not None]
    if not judged:
        raise SnipError("no verdict in the sheet: write yes or no into its column verdict")
    right, total = sum(judged), len(judged)
    low, high = proportion_interval(right, total)
    lines = [
        f"human precision {100 * right / total:.1f} % ({right:,} of {total:,} judged pairs are "
        f"duplicates; 95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    ]
    if total < len(verdicts):
        lines.append(f"{len(verdicts) - total:,} pairs of the sheet have no verdict yet")
    return "\n".join(lines)
