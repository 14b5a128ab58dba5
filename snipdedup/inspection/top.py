"""``snip top``: the rows with the most duplicates, which a model is likeliest to memorise.

Groups are read some at a time, and of each batch only the best rows are held.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.config import Top
from snipdedup.deduplication.inputs import KIND, named_paths
from snipdedup.deduplication.read_out import pick, read_keys, whole_groups
from snipdedup.errors import SnipError
from snipdedup.groups.members import Members, group_starts, no_members
from snipdedup.inspection.display import places_of, terminal_text
from snipdedup.metadata.gather import CAPTIONS, URLS, RowTexts, open_row_texts
from snipdedup.storage.atomic import replacing
from snipdedup.storage.out_folder import as_written, read_manifest, refuse_output_file

CAPTION_ROWS = 10_000  # rows of one entry whose captions are counted
READ_ROWS = 1 << 18  # captions held at a time
SHOWN_CAPTIONS, SHOWN_URLS = 5, 3
CAPTION_WIDTH, URL_WIDTH = 48, 80


@dataclass(frozen=True)
class TopResult:
    """What ``snip top`` found; ``str()`` is a table.

    ``entries`` are rows by how many removed rows they represent, most first: ``row``,
    ``dup_count``, ``similarity_mean``, ``similarity_lowest``, ``chains``, ``group``,
    ``group_rows``, ``shard``, ``shard_row``, ``key``, ``captions``, ``urls``.
    """

    entries: list[dict[str, Any]]
    prompts: Path | None = None  # the file of captions that was written

    def __str__(self) -> str:
        if not self.entries:
            return "no row stands for another one"
        lines = ["       row  dup_count    mean  lowest  chains  key, most frequent caption, url"]
        for entry in self.entries:
            mean, lowest = (
                "     -" if value is None else f"{value:6.4f}"
                for value in (entry["similarity_mean"], entry["similarity_lowest"])
            )
            texts = [terminal_text(entry["key"] or f"{entry['shard']} row {entry['shard_row']}")]
            for caption in entry["captions"][:1]:
                text = terminal_text(caption["caption"], CAPTION_WIDTH)
                texts.append(f'"{text}" ({caption["rows"]})')
            texts += [terminal_text(url, URL_WIDTH) for url in entry["urls"][:1]]
            lines.append(
                f"{entry['row']:>10} {entry['dup_count']:>10,}  {mean}  {lowest}  "
                f"{'yes' if entry['chains'] else '':<6}  {'  '.join(texts)}"
            )
        lines += ["", "mean, lowest: cosine of the removed rows with this one; chains: its group"]
        lines += ["has rows that this one does not represent, or only below the threshold"]
        if self.prompts is not None:
            lines.append(f"captions written to {self.prompts}")
        return "\n".join(lines)

    def as_json(self) -> list[dict[str, Any]]:
        """Return the entries."""
        return self.entries


class Ranking(NamedTuple):
    """Rows by how many removed rows they represent, most first; ties by row. (n,) each."""

    row: np.ndarray  # int64
    group: np.ndarray  # int64
    dup_count: np.ndarray  # int64
    mean: np.ndarray  # float64: cosine of those removed rows with this one; NaN where unverified
    lowest: np.ndarray  # float32: the lowest of these cosines
    size: np.ndarray  # int64: rows of the group
    chains: np.ndarray  # bool: some of these it represents not at all, or below the threshold

    def best(self, n: int) -> Ranking:
        """Return the first n."""
        order = np.lexsort((self.row, -self.dup_count))[:n]
        return Ranking(*(column[order] for column in self))


def run(options: Top) -> TopResult:
    """Run ``snip top``."""
    folder = Path(options.out).expanduser()
    target = None if options.prompts is None else Path(options.prompts).expanduser()
    with as_written(folder):
        manifest = read_manifest(folder, KIND)
        texts = open_row_texts(folder, manifest, options.metadata)
        if target is not None:
            if texts.find(None, CAPTIONS) is None:
                raise SnipError(
                    f"--prompts writes captions, but no metadata with a column "
                    f"{' or '.join(CAPTIONS)} is known for {folder}; name it with --metadata"
                )
            known = [] if texts.metadata is None else texts.metadata.inputs()
            refuse_output_file(target, [folder, *known, *named_paths(manifest)])
        groups, threshold = folder / "groups.parquet", manifest["settings"]["threshold"]
        ranking = rank_rows(groups, options.n, threshold)
        entries = describe_ranking(ranking, groups, manifest["shards"], texts)
        if target is not None:
            captions = [e["captions"][0]["caption"] for e in entries if e["captions"]]
            with replacing(target) as part:
                text = "".join(f"{terminal_text(caption)}\n" for caption in captions)
                part.write_text(text, encoding="utf-8")
    return TopResult(entries, target)


def rank_rows(path: Path, n: int, threshold: float) -> Ranking:
    """Read ``groups.parquet`` and return the n rows that represent most others."""
    best = rank_groups(no_members(), threshold)
    for members in whole_groups(path, marked=True):
        found = rank_groups(members, threshold).best(n)
        best = Ranking(*map(np.concatenate, zip(best, found, strict=True))).best(n)
    return best


def by_representative(members: Members) -> Members:
    """Return the removed rows by representative, then row, but those of reference rows."""
    removed = pick(members, members.is_dup & (members.representative >= 0))
    return pick(removed, np.argsort(removed.representative, kind="stable"))


def rank_groups(members: Members, threshold: float) -> Ranking:
    """Return all rows of whole groups that represent others, in row order."""
    removed = by_representative(members)
    starts = group_starts(removed.representative)
    first, dup_count = starts[:-1], np.diff(starts)
    lowest = total = np.empty(0, np.float32)
    if len(first):  # reduceat takes no empty array
        lowest = np.minimum.reduceat(removed.similarity, first)
        total = np.add.reduceat(removed.similarity.astype(np.float64), first)
    group, edges = removed.group[first], group_starts(members.group)
    size = np.diff(edges)[np.searchsorted(members.group[edges[:-1]], group)]
    chains = (size > 1 + dup_count) | (lowest < np.float32(threshold))
    row = removed.representative[first]
    return Ranking(row, group, dup_count, total / dup_count, lowest, size, chains)


def describe_ranking(
    ranking: Ranking, groups: Path, shards: list[dict[str, Any]], texts: RowTexts
) -> list[dict[str, Any]]:
    """Return what is known of each row of a ranking, as JSON values."""
    keys, rows = read_keys(groups, ranking.row), represented(groups, ranking.row)
    captions = count_texts(texts, texts.find(None, CAPTIONS), rows)
    urls = count_texts(texts, texts.find(None, URLS), rows)
    entries = []
    places = places_of(shards, ranking.row.tolist())
    for at, (row, place) in enumerate(places.items()):
        known = not np.isnan(ranking.lowest[at])
        entries.append(
            {
                "row": row,
                "dup_count": int(ranking.dup_count[at]),
                "similarity_mean": round(float(ranking.mean[at]), 6) if known else None,
                "similarity_lowest": round(float(ranking.lowest[at]), 6) if known else None,
                "chains": bool(ranking.chains[at]),
                "group": int(ranking.group[at]),
                "group_rows": int(ranking.size[at]),
                **place,
                "key": keys.get(row),
                "captions": [
                    {"caption": text, "rows": count}
                    for text, count in captions[row].most_common(SHOWN_CAPTIONS)
                ],
                "urls": list(urls[row])[:SHOWN_URLS],
            }
        )
    return entries


def represented(path: Path, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """Return each wanted row with the removed rows that it represents, the first ones of many."""
    found: dict[int, list[np.ndarray]] = {row: [np.array([row])] for row in wanted.tolist()}
    for members in whole_groups(path, marked=True) if found else ():
        removed = by_representative(members)
        removed = pick(removed, np.isin(removed.representative, wanted))
        for low, high in pairwise(group_starts(removed.representative)):
            rows = removed.row[low : min(high, low + CAPTION_ROWS)]
            found[int(removed.representative[low])].append(rows)
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
