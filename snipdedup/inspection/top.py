"""The rows that stand for most others: candidates for images that a model memorises.

Groups are read a few at a time, and of each batch only the best rows are held.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.config import Top
from snipdedup.deduplication.inputs import named_paths
from snipdedup.deduplication.out_reader import pick, read_keys, whole_groups
from snipdedup.errors import SnipError
from snipdedup.groups.members import Members, group_starts, no_members
from snipdedup.metadata.texts import CAPTIONS, URLS, RowTexts, open_texts
from snipdedup.storage import atomic, out_folder
from snipdedup.storage.manifest import as_written, read_manifest

KIND = "dedup"
CAPTION_ROWS = 10_000  # rows of one entry whose captions are counted
READ_ROWS = 1 << 18  # captions held at a time
SHOWN_CAPTIONS, SHOWN_URLS = 5, 3
CAPTION_WIDTH, URL_WIDTH = 48, 80
# White space, and what steers a terminal or the direction of writing.
STEERING = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


class Ranking(NamedTuple):
    """Rows by how many removed rows they represent, most first; ties by row. (n,) each.

    Attributes
    ----------
    row, group : int64
    dup_count : int64
    mean, lowest : float64, float32
        Cosine of those removed rows with this one; NaN where unverified.
    size : int64
        Rows of the group.
    chains : bool
        The group holds rows that this one does not stand for, or stands for below the threshold.
    """

    row: np.ndarray
    group: np.ndarray
    dup_count: np.ndarray
    mean: np.ndarray
    lowest: np.ndarray
    size: np.ndarray
    chains: np.ndarray

    def best(self, n: int) -> Ranking:
        """Return the first n."""
        order = np.lexsort((self.row, -self.dup_count))[:n]
        return Ranking(*(column[order] for column in self))


def run(options: Top) -> str:
    """Run ``snip top`` and return its table."""
    folder = Path(options.out).expanduser()
    with as_written(folder):
        return rank(folder, options)


def rank(folder: Path, options: Top) -> str:
    """Return the table of a finished OUT, and write what else is asked for."""
    manifest = read_manifest(folder, KIND)
    texts = open_texts(folder, manifest, options.metadata)
    target = None if options.prompts is None else Path(options.prompts).expanduser()
    if target is not None:
        if texts.find(None, CAPTIONS) is None:
            raise SnipError(
                f"--prompts writes captions, but no metadata with a column "
                f"{' or '.join(CAPTIONS)} is known for {folder}; name it with --metadata"
            )
        known = [] if texts.metadata is None else texts.metadata.inputs()
        out_folder.refuse_output_file(target, [folder, *known, *named_paths(manifest)])
    ranking = rank_rows(folder / "groups.parquet", options.n, manifest["settings"]["threshold"])
    entries = describe(ranking, folder, manifest, texts)
    if target is not None:
        write_prompts(target, entries)
    if options.json:
        return json.dumps(entries, indent=2, ensure_ascii=False)
    return table(entries, target)


def rank_rows(path: Path, n: int, threshold: float) -> Ranking:
    """Read ``groups.parquet`` and return the n rows that represent most others."""
    best = rank_groups(no_members(), threshold)
    for members in whole_groups(path, marked=True):
        found = rank_groups(members, threshold).best(n)
        best = Ranking(*map(np.concatenate, zip(best, found, strict=True))).best(n)
    return best


def rank_groups(members: Members, threshold: float) -> Ranking:
    """Return all rows of whole groups that represent others, in row order."""
    gone = pick(members, members.is_dup & (members.representative >= 0))
    order = np.argsort(gone.representative, kind="stable")
    gone = pick(gone, order)
    starts = group_starts(gone.representative)
    first, dup_count = starts[:-1], np.diff(starts)
    lowest = np.empty(0, np.float32)
    if len(first):
        lowest = np.minimum.reduceat(gone.similarity, first)
    total = np.add.reduceat(gone.similarity.astype(np.float64), first) if len(first) else lowest
    group = gone.group[first]
    edges = group_starts(members.group)
    at = np.searchsorted(members.group[edges[:-1]], group)
    size = np.diff(edges)[at]
    return Ranking(
        gone.representative[first],
        group,
        dup_count,
        total / dup_count,
        lowest,
        size,
        (size > 1 + dup_count) | (lowest < np.float32(threshold)),
    )


def describe(
    ranking: Ranking, folder: Path, manifest: dict[str, Any], texts: RowTexts
) -> list[dict[str, Any]]:
    """Return what is known of each row of a ranking, as JSON values."""
    offsets = np.cumsum([0, *(shard["rows"] for shard in manifest["shards"])], dtype=np.int64)
    keys = read_keys(folder / "groups.parquet", ranking.row)
    rows = represented(folder / "groups.parquet", ranking.row)
    captions = count_texts(texts, texts.find(None, CAPTIONS), rows)
    urls = count_texts(texts, texts.find(None, URLS), rows)
    entries = []
    for place, row in enumerate(ranking.row.tolist()):
        shard = int(np.searchsorted(offsets, row, side="right")) - 1
        known = not np.isnan(ranking.lowest[place])
        own = urls[row]
        entries.append(
            {
                "row": row,
                "dup_count": int(ranking.dup_count[place]),
                "similarity_mean": round(float(ranking.mean[place]), 6) if known else None,
                "similarity_lowest": round(float(ranking.lowest[place]), 6) if known else None,
                "chains": bool(ranking.chains[place]),
                "group": int(ranking.group[place]),
                "group_rows": int(ranking.size[place]),
                "shard": manifest["shards"][shard]["name"],
                "shard_row": row - int(offsets[shard]),
                "key": keys.get(row),
                "captions": [
                    {"caption": text, "rows": count}
                    for text, count in captions[row].most_common(SHOWN_CAPTIONS)
                ],
                "urls": list(own)[:SHOWN_URLS],
            }
        )
    return entries


def represented(path: Path, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """Return each wanted row with the removed rows that it represents, the first ones of many."""
    if not len(wanted):
        return {}
    order = np.sort(wanted)
    found: dict[int, list[np.ndarray]] = {row: [np.array([row])] for row in wanted.tolist()}
    for members in whole_groups(path, marked=True):
        gone = pick(members, members.is_dup & (members.representative >= 0))
        place = np.searchsorted(order, gone.representative)
        here = np.flatnonzero(order[np.minimum(place, len(order) - 1)] == gone.representative)
        by = np.argsort(gone.representative[here], kind="stable")
        row, representative = gone.row[here][by], gone.representative[here][by]
        starts = group_starts(representative)
        for low, high in pairwise(starts):
            found[int(representative[low])].append(row[low : min(high, low + CAPTION_ROWS)])
    return {row: np.concatenate(parts) for row, parts in found.items()}


def count_texts(
    texts: RowTexts, column: str | None, rows: dict[int, np.ndarray]
) -> dict[int, Counter[str]]:
    """Count the texts of a column over the rows of each entry, its own row's text first.

    Ties of a count keep the order in which texts are met: the entry's own, then by row.
    """
    owner = np.repeat(list(rows), [len(held) for held in rows.values()])
    every = np.concatenate([np.empty(0, np.int64), *rows.values()])
    own = texts.read(column, np.array(list(rows), np.int64))
    counts = {row: Counter({own[row]: 0} if own.get(row) else {}) for row in rows}
    order = np.argsort(every, kind="stable")
    for start in range(0, len(every), READ_ROWS):
        part = order[start : start + READ_ROWS]
        found = texts.read(column, every[part])
        for row, of in zip(every[part].tolist(), owner[part].tolist(), strict=True):
            if found.get(row):
                counts[of][found[row]] += 1
    return counts


def write_prompts(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write the most frequent caption of each entry that has one, a line each."""
    captions = [one_line(e["captions"][0]["caption"]) for e in entries if e["captions"]]
    with atomic.replacing(path) as part:
        part.write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")


def one_line(text: str) -> str:
    """Return a text on one line, without what could steer a terminal; captions are anyone's."""
    return STEERING.sub(" ", text).strip()


def table(entries: list[dict[str, Any]], prompts: Path | None) -> str:
    """Lay out entries for a person to read."""
    if not entries:
        return "no row stands for another one"
    lines = ["       row  dup_count    mean  lowest  chains  key, most frequent caption, url"]
    for entry in entries:
        cosines = [
            "     -" if value is None else f"{value:6.4f}"
            for value in (entry["similarity_mean"], entry["similarity_lowest"])
        ]
        said = [entry["key"] or f"{entry['shard']} row {entry['shard_row']}"]
        if entry["captions"]:
            caption = entry["captions"][0]
            said.append(f'"{short(caption["caption"], CAPTION_WIDTH)}" ({caption["rows"]})')
        said += [short(url, URL_WIDTH) for url in entry["urls"][:1]]
        lines.append(
            f"{entry['row']:>10} {entry['dup_count']:>10,}  {cosines[0]}  {cosines[1]}  "
            f"{'yes' if entry['chains'] else '':<6}  {'  '.join(map(one_line, said))}"
        )
    lines += ["", "mean, lowest: cosine of the removed rows with this one; chains: its group holds"]
    lines += ["rows that it does not stand for, or only below the threshold"]
    if prompts is not None:
        lines.append(f"captions written to {prompts}")
    return "\n".join(lines)


def short(text: str, width: int) -> str:
    """Return a text cut to a width."""
    text = one_line(text)
    return text if len(text) <= width else text[: width - 1] + "…"
