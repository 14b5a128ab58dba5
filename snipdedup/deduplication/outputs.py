"""The files of OUT but the manifest, each written once; and what the manifest says of the run."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.deduplication.inputs import Inputs
from snipdedup.deduplication.result import Result, forest_table, groups_table
from snipdedup.deduplication.search_result import SearchResult
from snipdedup.errors import UsageError
from snipdedup.features.shards import request_of
from snipdedup.groups import url_baseline
from snipdedup.groups.blocks import cut_groups, slices
from snipdedup.groups.keep import ColumnRank
from snipdedup.groups.pairs import all_pairs, too_many, write_pairs
from snipdedup.groups.star import Best, Rank, no_members
from snipdedup.join.forest import Edges, join_edges
from snipdedup.metadata import additions, export
from snipdedup.metadata.files import Table
from snipdedup.metadata.gathered import gather_columns
from snipdedup.metadata.precheck import Use, rehearse
from snipdedup.metadata.tables import Metadata, as_texts, kept_names, try_writing, write_kept
from snipdedup.parallel import run_all
from snipdedup.storage import store
from snipdedup.storage.external_sort import load_column

PAGE = "report.html"  # beside the tables, by snip report
EXPORT = "export"  # the folder of lists for other tools


@dataclass(frozen=True)
class OutputSettings:
    """Which files and columns a run writes, and on how many threads.

    Attributes
    ----------
    key : str or None
        Column of keys as asked for.
    pairs, max_pairs
        Whether to write all pairs, and how many at the most.
    columns : additions.ColumnSettings
        Columns added to the metadata.
    export : list of str
        Lists for other tools.
    epsilons : sequence of float
        To tabulate, for SemDeDup's rule.
    """

    key: str | None
    pairs: bool
    max_pairs: int
    columns: additions.ColumnSettings
    export: list[str]
    epsilons: Sequence[float]
    threads: int


def grouping_folder(out: Path) -> Path:
    """Return the folder, in the work, of what does not fit into memory."""
    return out / store.WORK / "grouping"


def check_metadata(
    metadata: Metadata | None, rank: Rank | None, settings: OutputSettings
) -> str | None:
    """Check that the metadata has what a run reads of it at its end; return the column of keys.

    Columns are converted on the first rows of each file, so that types are refused before the
    search.
    """
    lists = export.list_columns(settings.export, metadata, settings.key)
    if metadata is None:
        if len(additions.added_names(settings.columns)) > 1:
            raise UsageError(
                "--merge_captions and --weights add columns to the metadata: give --metadata too"
            )
        if settings.key is not None:
            raise UsageError("--key names a column of the metadata: give --metadata too")
        return None
    added = additions.uses(settings.columns, metadata)
    kept_names(metadata.files, additions.added_names(settings.columns))
    key = metadata.column(settings.key)
    named = "name a column of texts or numbers with --key"
    rehearse(
        metadata,
        [
            *([rank.use()] if isinstance(rank, ColumnRank) else []),
            *([Use([key], texts, named)] if key else []),
            *url_baseline.uses(metadata),
            *added,
            *export.uses(lists, metadata),
            Use(None, try_writing, "leave it out of META", by_schema=True),
        ],
    )
    return key


def texts(file: Table, batch: Any) -> dict[str, Any]:
    """Return the one column of a record batch as texts."""
    return {"text": as_texts(file, batch.schema.names[0], batch.column(0))}


def write_files(
    result: Result, out: Path, metadata: Metadata | None, key: str | None, settings: OutputSettings
) -> list[Path]:
    """Write all files of OUT but the manifest; return their paths.

    Raises
    ------
    SnipError
        If there are more pairs than allowed.
    """
    search, outputs = result.search, [out / "is_dup.npy"]
    with store.writing_npy(outputs[0], np.dtype(bool), (result.rows,)) as file:
        for mask in result.mask():
            mask.tofile(file)
    write_tables = (
        partial(write_forest, search, out),
        partial(write_groups, result, out, metadata, key),
    )
    outputs += run_all(write_tables, threads_for(result, settings.threads))
    tables = {"histogram.parquet": histogram_table(result)}
    if len(search.bad):
        tables["bad_rows.parquet"] = bad_table(search)
    if search.references is not None:
        tables["references.parquet"] = references_table(search)
    arrays = {} if search.flags is None else {"flags.npy": search.flags}
    if search.best is not None:
        tables["semdedup.parquet"] = semdedup_table(search.best)
        arrays["centroids.npy"] = search.best.centroids
    for name, table in tables.items():
        store.save_parquet(out / name, table)
    for name, array in arrays.items():
        store.save_npy(out / name, array)
    outputs += [out / name for name in (*tables, *arrays)]
    if metadata is not None:
        outputs += write_metadata(result, out, metadata, settings)
    return outputs


def threads_for(result: Result, threads: int) -> int:
    """Return how many files may be made of a result at once: one where it is held in parts."""
    return 1 if result.search.is_large(result.threshold) else min(2, threads)


def write_forest(search: SearchResult, out: Path) -> Path:
    """Write ``forest.parquet``, some edges at a time."""
    path = out / "forest.parquet"
    with store.writing_parquet(path, forest_table(search, join_edges([])).schema) as write:
        for edges in search.edges(grouping_folder(out)):
            write(forest_table(search, edges))
    return path


def write_groups(result: Result, out: Path, metadata: Metadata | None, key: str | None) -> Path:
    """Write ``groups.parquet``, some groups at a time."""
    search, path, at = result.search, out / "groups.parquet", 0
    with (
        store.writing_parquet(path, groups_table(search, no_members(), None).schema) as write,
        closing(group_keys(result, out, metadata, key)) as keys,
    ):
        for members, table in zip(slices(result.members), keys, strict=False):
            named = None if table is None else table["text"]
            near = None if result.near is None else result.near[at : at + len(members.row)]
            write(groups_table(search, members, named, near))
            at += len(members.row)
    return path


def group_keys(
    result: Result, out: Path, metadata: Metadata | None, key: str | None
) -> Generator[Any, None, None]:
    """Yield the keys of each slice of the members, None where there are no keys."""
    if metadata is None or key is None:
        yield from itertools.repeat(None)
        return
    row, cuts = result.members.row, cut_groups(result.members.group)
    yield from gather_columns(metadata, [key], row, cuts, texts, grouping_folder(out) / "keys")


def write_pair_files(result: Result, out: Path, settings: OutputSettings) -> list[Path]:
    """Write ``pairs.parquet`` and ``copies.parquet``, or refuse too many pairs."""
    import pyarrow as pa

    search, features = result.search, result.features
    if features is None:
        raise UsageError("--pairs needs FEATURES: pairs of codes are not verified")
    if len(search.forest.a) > settings.max_pairs:
        raise too_many(settings.max_pairs)

    def pairs() -> Generator[Edges, None, None]:
        for block in search.blocks(search.threshold, grouping_folder(out)):
            yield from all_pairs(
                features, block.forest, search.threshold, settings.threads, search.also
            )

    with closing(pairs()) as parts:
        write_pairs(out / "pairs.parquet", parts, settings.max_pairs)
    copies = pa.table({"row": search.copies, "first": search.originals})
    store.save_parquet(out / "copies.parquet", copies)
    return [out / "pairs.parquet", out / "copies.parquet"]


def write_metadata(
    result: Result, out: Path, metadata: Metadata, settings: OutputSettings
) -> list[Path]:
    """Write the metadata of the kept rows, and lists of them for other tools."""
    work, is_dup = grouping_folder(out), load_column(out / "is_dup.npy")
    removed = np.broadcast_to(np.False_, result.rows) if settings.columns.weights else is_dup
    columns = settings.columns
    with additions.added_columns(columns, metadata, result.removed_rows, work) as added:
        written = write_kept(metadata, removed, out / "metadata", added)
    lists = export.list_columns(settings.export, metadata, settings.key)
    return written + export.write_lists(lists, metadata, is_dup, out / EXPORT, work)


def bad_table(search: SearchResult) -> Any:
    """Return the rows that could not be compared, with their places."""
    import pyarrow as pa

    shard = np.searchsorted(search.offsets, search.bad, side="right") - 1
    return pa.table(
        {
            "row": search.bad,
            "shard": pa.array(search.names, pa.string()).take(pa.array(shard)),
            "shard_row": search.bad - search.offsets[shard],
        }
    )


def references_table(search: SearchResult) -> Any:
    """Return each distinct row's nearest reference row, where one matches."""
    import pyarrow as pa

    references, nearest = search.references, search.nearest
    if references is None or nearest is None:
        raise ValueError("a search without references")
    item, row = references.locate(nearest.reference)
    names = pa.array([item.name for item in references.items], pa.string())
    return pa.table(
        {
            "row": nearest.row,
            "reference": names.take(pa.array(item)),
            "reference_row": row,
            "similarity": nearest.similarity,
        }
    )


def semdedup_table(best: Best) -> Any:
    """Return what SemDeDup's rule decides by, one entry a row."""
    import pyarrow as pa

    outside, single = best.cluster < 0, best.match < 0
    return pa.table(
        {
            "cluster": pa.array(best.cluster, mask=outside),
            "nearness": pa.array(best.nearness, mask=outside),
            "match": pa.array(best.match, mask=single),
            "similarity": pa.array(best.similarity, mask=single),
        }
    )


def histogram_table(result: Result) -> Any:
    """Return how many groups have each size, and how many kept rows each ``dup_count``."""
    import pyarrow as pa

    sizes = sorted(result.counts.sizes.items())
    represented = sorted(result.counts.represented.items())
    alone = result.kept - sum(result.counts.represented.values())
    value, count = np.array([*sizes, (0, alone), *represented], np.int64).T
    of = ["group_size"] * len(sizes) + ["dup_count"] * (1 + len(represented))
    return pa.table({"of": pa.array(of, pa.string()), "value": value, "count": count})


def describe_run(
    result: Result, out: Path, inputs: Inputs, metadata: Metadata | None, epsilons: Sequence[float]
) -> dict[str, Any]:
    """Return the manifest's entries about the inputs and the decision."""
    search, work = result.search, grouping_folder(out)
    shards = [
        {"name": name, "rows": int(rows)}
        for name, rows in zip(search.names, np.diff(search.offsets), strict=True)
    ]
    if inputs.features is not None:
        shards = add_crcs(inputs.features.describe(), search.crcs)
    sources: dict[str, Any] = {}
    if inputs.text is not None:
        texts = add_crcs(inputs.text.describe(), search.text_crcs)
        sources["text"] = {"request": request_of(inputs.text), "shards": texts}
    if inputs.references is not None:
        sources["references"] = inputs.references.describe(search.reference_crcs)
    baselines = url_baseline.baselines(metadata, result.members, work) if metadata else {}
    entries = result.entries(epsilons, work)
    return {**entries, "shards": shards, **sources, "baselines": baselines}


def add_crcs(shards: list[dict[str, Any]], crcs: list[int]) -> list[dict[str, Any]]:
    """Add the CRC32 that was computed of each shard to its description."""
    for shard, crc in zip(shards, crcs, strict=True):
        shard["crc32"] = f"{crc:08x}"
    return shards
