"""``snip top``: the rows with the most duplicates, which a model is likeliest to memorise.

Groups are read some at a time, and of each batch only the best rows are held.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.config import Top
from snipdedup.deduplication.inputs import KIND, named_paths
from snipdedup.deduplication.read_out import pick, read_keys, whole_groups
from snipdedup.errors import SnipError
from snipdedup.groups.members import Members, group_starts
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
            cosines = entry["similarity_mean"], entry["similarity_lowest"]
            mean, lowest = ("-" if value is None else f"{value:.4f}" for value in cosines)
            texts = [terminal_text(entry["key"] or f"{entry['shard']} row {entry['shard_row']}")]
            for caption in entry["captions"][:1]:
                text = terminal_text(caption["caption"], CAPTION_WIDTH)
                texts.append(f'"{text}" ({caption["rows"]})')
            texts += [terminal_text(url, URL_WIDTH) for url in entry["urls"][:1]]
            lines.append(
                f"{entry['row']:>10} {entry['dup_count']:>10,}  {mean:>6}  {lowest:>6}  "
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


class Ranked(NamedTuple):
    """A row and how many removed rows it represents; cosines are those of these rows with it."""

    row: int
    dup_count: int
    similarity_mean: float | None  # None where unverified
    similarity_lowest: float | None
    chains: bool  # some rows of the group it represents not at all, or below the threshold
    group: int
    group_rows: int
    removed: np.ndarray  # (n,) int64: the first `CAPTION_ROWS` of the removed rows


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
            refuse_output_file(target, [folder, *texts.inputs(), *named_paths(manifest)])
        groups, threshold = folder / "groups.parquet", manifest["settings"]["threshold"]
        ranked = rank_rows(groups, options.n, threshold)
        keys = read_keys(groups, np.array([one.row for one in ranked], np.int64))
        entries = describe_ranked(ranked, keys, manifest["shards"], texts)
        if target is not None:
            captions = [e["captions"][0]["caption"] for e in entries if e["captions"]]
            with replacing(target) as part:
                text = "".join(f"{terminal_text(caption)}\n" for caption in captions)
                part.write_text(text, encoding="utf-8")
    return TopResult(entries, target)


def rank_rows(path: Path, n: int, threshold: float) -> list[Ranked]:
    """Read ``groups.parquet`` and return the n rows that represent most others, most first."""
    best: list[Ranked] = []
    for members in whole_groups(path):
        least = best[-1].dup_count if len(best) == n else 1
        best += rank_groups(members, n, threshold, least)
        best = sorted(best, key=lambda one: (-one.dup_count, one.row))[:n]
    return best


def rank_groups(members: Members, n: int, threshold: float, least: int = 1) -> list[Ranked]:
    """Return at most n rows of whole groups that represent ``least`` others or more, most first.

    Rows of references are none of these.
    """
    named = members.representative
    removed = pick(members, members.is_dup & (named >= 0) & (named != members.row))
    removed = pick(removed, np.argsort(removed.representative, kind="stable"))
    starts = group_starts(removed.representative)
    counts, found = np.diff(starts), []
    order = np.argsort(-counts, kind="stable")[: min(n, np.count_nonzero(counts >= least))]
    for start, count in zip(starts[order].tolist(), counts[order].tolist(), strict=True):
        own = pick(removed, slice(start, start + count))
        size = int(np.diff(np.searchsorted(members.group, [own.group[0], own.group[0] + 1]))[0])
        cosines, lowest = own.similarity, own.similarity.min()
        mean, worst = (
            None if np.isnan(lowest) else round(float(cosine), 6)
            for cosine in (cosines.mean(dtype=np.float64), lowest)
        )
        chains = bool(size > 1 + count or lowest < np.float32(threshold))
        row, group = int(own.representative[0]), int(own.group[0])
        first = own.row[:CAPTION_ROWS].copy()
        found.append(Ranked(row, count, mean, worst, chains, group, size, first))
    return found


def describe_ranked(
    ranked: list[Ranked], keys: dict[int, str], shards: list[dict[str, Any]], texts: RowTexts
) -> list[dict[str, Any]]:
    """Return what is known of each row, as JSON values."""
    captions = count_texts(texts, texts.find(None, CAPTIONS), ranked)
    urls = count_texts(texts, texts.find(None, URLS), ranked)
    places, entries = places_of(shards, [one.row for one in ranked]), []
    for one in ranked:
        most = captions[one.row].most_common(SHOWN_CAPTIONS)
        entry = one._asdict() | places[one.row]
        del entry["removed"]
        entry["key"] = keys.get(one.row)
        entry["captions"] = [{"caption": text, "rows": count} for text, count in most]
        entry["urls"] = list(urls[one.row])[:SHOWN_URLS]
        entries.append(entry)
    return entries


def count_texts(
    texts: RowTexts, column: str | None, ranked: list[Ranked]
) -> dict[int, Counter[str]]:
    """Count the texts of a column over each ranked row and the rows that it represents.

    Ties of a count keep the order in which texts are met: the row's own, then by row.
    """
    own = texts.read(column, np.array([one.row for one in ranked], np.int64))
    counts = {one.row: Counter({own[one.row]: 0} if own.get(one.row) else {}) for one in ranked}
    owner = np.repeat([one.row for one in ranked], [1 + len(one.removed) for one in ranked])
    every = np.concatenate(
        [np.empty(0, np.int64), *(np.append(one.row, one.removed) for one in ranked)]
    )
    order = np.argsort(every, kind="stable")
    for start in range(0, len(every), READ_ROWS):
        rows, owners = (of[order[start : start + READ_ROWS]] for of in (every, owner))
        found = texts.read(column, rows)
        for row, of in zip(rows.tolist(), owners.tolist(), strict=True):
            if found.get(row):
                counts[of][found[row]] += 1
    return counts
