"""The files of OUT but the manifest, each written once; and what the manifest says of the run."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from snipdedup.deduplication.decisions import FILE
from snipdedup.deduplication.inputs import describe_shards
from snipdedup.deduplication.pair_search import PairSearch
from snipdedup.deduplication.result import Result
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.shards import request_of
from snipdedup.groups.keep import ColumnRank
from snipdedup.groups.members import Members, Rank, cut_groups, no_members, slices
from snipdedup.groups.pairs import all_pairs
from snipdedup.join.forest import Edges, join_edges
from snipdedup.metadata import additions
from snipdedup.metadata.gather import gather_column
from snipdedup.metadata.join_by_key import key_bytes
from snipdedup.metadata.kept_rows import (
    LISTS,
    kept_names,
    list_columns,
    list_uses,
    try_writing,
    write_kept,
    write_lists,
)
from snipdedup.metadata.tables import (
    ANY_KEY,
    ColumnUse,
    Metadata,
    as_texts,
    try_column_uses,
    use_of_column,
)
from snipdedup.storage import atomic, locks

PAGE = "report.html"  # beside the tables, by snip report
BASELINE_COLUMNS = ("hash", "md5", "sha256", "url")


class MetadataPlan(NamedTuple):
    """What is made of the metadata: keys of groups, added columns, lists for other tools.

    ``lists`` has for each list the column that names its rows.
    """

    table: Metadata
    key: str | None
    columns: additions.ColumnSettings
    lists: dict[str, str]


def plan_metadata(
    table: Metadata | None,
    rank: Rank,
    key: str | None,
    columns: additions.ColumnSettings,
    kinds: list[str],
) -> MetadataPlan | None:
    """Check that the metadata has what a run reads of it at its end; ``kinds`` are lists.

    Columns are converted on the first rows of each file, so that wrong types are refused before
    the search.
    """
    lists = list_columns(kinds, table, key)
    if table is None:
        if len(additions.added_names(columns)) > 1:
            raise UsageError(
                "--merge_captions and --weights add columns to the metadata: give --metadata too"
            )
        if key is not None:
            raise UsageError("--key names a column of the metadata: give --metadata too")
        return None
    uses = [rank.use()] if isinstance(rank, ColumnRank) else []
    if columns.merge_captions is not None:
        caption = table.require_column(columns.caption, additions.CAPTION_COLUMNS, "--caption")
        columns = columns._replace(caption=caption)
        uses.append(use_of_column(caption, as_texts, "name a column of texts with --caption"))
    kept_names(table.files, additions.added_names(columns))
    key = table.column(key, ANY_KEY)
    if key is not None:
        remedy = "name a column of texts or numbers with --key"
        uses.append(use_of_column(key, as_texts, remedy))
    remedy = "a column of this name is compared between copies: rename it, or leave it out of META"
    for column in baseline_columns(table):
        uses.append(use_of_column(column, key_bytes, remedy))
    uses += list_uses(lists, table)
    uses.append(ColumnUse(None, try_writing, "leave it out of META", by_schema=True))
    try_column_uses(table, uses)
    return MetadataPlan(table, key, columns, lists)


def grouping_folder(out: Path) -> Path:
    """Return the folder, in the work, of what does not fit into memory."""
    return out / locks.WORK / "grouping"


def write_files(
    result: Result, out: Path, plan: MetadataPlan | None, epsilons: Sequence[float]
) -> dict[str, Any]:
    """Write all files of OUT but the manifest and those of pairs; return `describe_run`."""
    write_small_files(result, out)
    if result.decisions is not None:
        with atomic.replacing(out / FILE) as part:
            part.write_text(result.decisions.csv(), "utf-8")
    write_forest(result.search, out)
    write_groups(result, out, plan)
    if plan is not None:
        write_metadata(result, out, plan)
    return describe_run(result, out, plan, epsilons)


def write_small_files(result: Result, out: Path) -> None:
    """Write the files that are made of arrays in memory."""
    search, best = result.search, result.search.best
    arrays = {"is_dup.npy": result.is_dup}
    tables = {"histogram.parquet": histogram_table(result)}
    if len(search.bad):
        tables["bad_rows.parquet"] = pa.table({"row": search.bad, **search.places(search.bad)})
    if search.flags is not None:
        arrays["flags.npy"] = search.flags
    if best is not None:
        arrays["centroids.npy"] = best.centroids
        masks = {"cluster": best.cluster < 0, "nearness": best.cluster < 0}
        masks |= {"match": best.match < 0, "similarity": best.match < 0}
        columns = {name: pa.array(getattr(best, name), mask=mask) for name, mask in masks.items()}
        tables["semdedup.parquet"] = pa.table(columns)
    if search.inputs.references is not None and search.nearest is not None:
        names, row = search.inputs.references.locate(search.nearest.reference)
        columns = {"row": search.nearest.row, "reference": names, "reference_row": row}
        columns["similarity"] = search.nearest.similarity
        tables["references.parquet"] = pa.table(columns)
    for name, array in arrays.items():
        atomic.save_npy(out / name, array)
    for name, table in tables.items():
        atomic.save_parquet(out / name, table)


def histogram_table(result: Result) -> pa.Table:
    """Return how many groups have each size, and how many kept rows each ``dup_count``."""
    sizes = sorted(result.counts.sizes.items())
    represented = sorted(result.counts.represented.items())
    alone = result.kept - sum(result.counts.represented.values())
    value, count = np.array([*sizes, (0, alone), *represented], np.int64).T
    of = ["group_size"] * len(sizes) + ["dup_count"] * (1 + len(represented))
    return pa.table({"of": pa.array(of, pa.string()), "value": value, "count": count})


def write_forest(search: PairSearch, out: Path) -> None:
    """Write ``forest.parquet``, some edges at a time."""
    schema = search.forest_table(join_edges([])).schema
    with atomic.writing_parquet(out / "forest.parquet", schema) as write:
        for edges in search.edges(grouping_folder(out)):
            write(search.forest_table(edges))


def write_groups(result: Result, out: Path, plan: MetadataPlan | None) -> None:
    """Write ``groups.parquet``, some groups at a time."""
    search, members, at = result.search, result.members, 0
    keys: Generator[Any, None, None] = (None for _ in itertools.count())
    if plan is not None and plan.key is not None:
        cuts, folder = cut_groups(members.group), grouping_folder(out) / "keys"
        keys = gather_column(plan.table, plan.key, members.row, cuts, as_texts, folder)
    schema = search.groups_table(no_members(), decisions=result.decisions).schema
    with atomic.writing_parquet(out / "groups.parquet", schema) as write, closing(keys):
        for part, named in zip(slices(members), keys, strict=False):
            near = None if result.near is None else result.near[at : at + len(part.row)]
            also = [cosine[at : at + len(part.row)] for cosine in result.also]
            write(search.groups_table(part, named, near, also, result.decisions))
            at += len(part.row)


def write_pair_files(result: Result, out: Path, most: int, threads: int) -> None:
    """Write ``pairs.parquet`` and ``copies.parquet``, or refuse more than ``most`` pairs."""
    search, inputs = result.search, result.search.inputs
    features = inputs.features
    if features is None:
        raise UsageError("--pairs needs FEATURES: pairs of codes are not verified")
    too_many = SnipError(
        f"expected at most {most:,} pairs (--max_pairs), found more: raise --max_pairs, which goes "
        "on with what was searched, or give a higher --threshold, or leave out --pairs"
    )
    if len(search.forest.a) > most:
        raise too_many

    def pairs() -> Generator[Edges, None, None]:
        for block in search.blocks(search.threshold, grouping_folder(out)):
            yield from all_pairs(features, block.forest, search.threshold, threads, inputs.also)

    count, schema = 0, search.forest_table(join_edges([])).schema
    with atomic.writing_parquet(out / "pairs.parquet", schema) as write, closing(pairs()) as parts:
        for edges in parts:
            count += len(edges.a)
            if count > most:
                raise too_many
            write(search.forest_table(edges))
    copies = pa.table({"row": search.copies, "first": search.originals})
    atomic.save_parquet(out / "copies.parquet", copies)


def write_metadata(result: Result, out: Path, plan: MetadataPlan) -> None:
    """Write the metadata of the kept rows, and lists of them for other tools."""
    work, table = grouping_folder(out), plan.table
    none = np.broadcast_to(np.False_, result.rows)
    removed = none if plan.columns.weights else result.is_dup
    added = additions.add_columns(plan.columns, table, result.removed_rows, work)
    write_kept(table, removed, out / "metadata", added)
    write_lists(plan.lists, table, result.is_dup, out / LISTS, work)


def describe_run(
    result: Result, out: Path, plan: MetadataPlan | None, epsilons: Sequence[float]
) -> dict[str, Any]:
    """Return the manifest's entries about the inputs and the decision."""
    search, inputs, work = result.search, result.search.inputs, grouping_folder(out)
    described, checksums = result.entries(epsilons, work), search.checksums
    if inputs.features is not None:
        described["shards"] = describe_shards(inputs.features, checksums["features"])
    else:
        sizes = zip(search.names, np.diff(search.offsets).tolist(), strict=True)
        described["shards"] = [{"name": name, "rows": rows} for name, rows in sizes]
    if inputs.seconds:
        read = iter(checksums["also"])
        described["also"] = [
            {
                "name": second.name,
                "source": second.source,
                "threshold": second.threshold,
                "request": request_of(second.features),
                "shards": describe_shards(
                    second.features, list(islice(read, len(second.features.shards)))
                ),
            }
            for second in inputs.seconds
        ]
    if inputs.references is not None:
        described["references"] = inputs.references.describe(checksums["references"])
    described["baselines"] = count_baselines(plan.table, result.members, work) if plan else {}
    return described


def baseline_columns(metadata: Metadata) -> list[str]:
    """Return the columns of hashes and URLs."""
    found = (metadata.column(None, [name]) for name in BASELINE_COLUMNS)
    return [name for name in found if name is not None]


def count_baselines(metadata: Metadata, members: Members, folder: Path) -> dict[str, int]:
    """Return, for each column of hashes or URLs, how many of the removed rows it would catch.

    Within each group, one row of each value would be kept; those of the removed rows are counted
    that would be removed so, too. Rows without a value are never equal; a column in which all rows
    are without is left out. ``folder`` is for temporary files.
    """
    cuts, folder = cut_groups(members.group), folder / "baseline"
    counts: dict[str, int] = {}
    for name in baseline_columns(metadata):
        gathered = gather_column(metadata, name, members.row, cuts, key_bytes, folder)
        with closing(gathered) as found:
            for part, values in zip(slices(members), found, strict=True):
                caught = None if values is None else caught_rows(part, values.combine_chunks())
                if caught is not None:
                    counts[name] = counts.get(name, 0) + caught
    return counts


def caught_rows(members: Members, values: Any) -> int | None:
    """Return how many removed rows of whole groups are caught; None if no row has a value."""
    import pyarrow.compute as pc  # here: it takes a tenth of a second to load

    known = pc.greater(pc.binary_length(values), 0).to_numpy(zero_copy_only=False)
    if not known.any():
        return None
    value = values.dictionary_encode().indices.to_numpy()[known].astype(np.int64)
    _, group = np.unique(members.group[known], return_inverse=True)
    _, label = np.unique(group * (len(values) + 1) + value, return_inverse=True)
    removed = np.bincount(label, weights=members.is_dup[known])
    return int(np.minimum(removed, np.bincount(label) - 1).sum())
