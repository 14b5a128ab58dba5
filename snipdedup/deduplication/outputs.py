"""OUT: what a run leaves behind, written once."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.config import EXPORTS, Dedup, named_kinds, parse_epsilons
from snipdedup.deduplication import references
from snipdedup.deduplication.counts import as_json, levels
from snipdedup.deduplication.found import Found
from snipdedup.deduplication.inputs import Inputs
from snipdedup.deduplication.result import Result
from snipdedup.deduplication.tables import forest_table, groups_table, references_table
from snipdedup.errors import UsageError
from snipdedup.features.hashing import checksum_text
from snipdedup.features.shards import request_of
from snipdedup.groups.blocks import cut_groups, slices
from snipdedup.groups.keep import rank_by
from snipdedup.groups.members import Best, no_members
from snipdedup.groups.pairs import all_pairs, too_many, write_pairs
from snipdedup.groups.url_baseline import baselines
from snipdedup.join.forest import Edges, join_edges
from snipdedup.metadata.additions import added_columns, added_names, caption_column
from snipdedup.metadata.export import list_columns, write_lists
from snipdedup.metadata.files import Table
from snipdedup.metadata.gathered import gather_columns
from snipdedup.metadata.tables import Metadata, as_texts, kept_names, write_kept
from snipdedup.parallel import cores, memory_bound, run_all
from snipdedup.storage import atomic, locks
from snipdedup.storage.external_sort import load_column
from snipdedup.storage.remote import absolute_location

KIND = references.KIND
PAGE = "report.html"  # beside the tables, by snip report
EXPORT = "export"  # the folder of lists for other tools
TABLES = ("is_dup.npy", "forest.parquet", "groups.parquet", "histogram.parquet")
PAIR_TABLES = ("pairs.parquet", "copies.parquet")
TABLE_STEPS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.04)  # above the searched threshold, in the summary


def grouping_folder(out: Path) -> Path:
    """Return where groups wait that do not fit into memory; gone at the end of a run."""
    return out / locks.WORK / "grouping"


def check_metadata(options: Dedup, metadata: Metadata | None) -> str | None:
    """Return the column of keys; refuse metadata that lacks what the settings ask of it."""
    check_order(options, metadata)
    list_columns(named_kinds("export", options.export, EXPORTS), metadata, options.key)
    if metadata is None:
        if len(added_names(options)) > 1:
            raise UsageError(
                "--merge_captions and --weights add columns to the metadata: give --metadata too"
            )
        return None
    if options.merge_captions is not None:
        caption_column(options, metadata)
    kept_names(metadata.files, added_names(options))
    return metadata.column(options.key)


def check_order(options: Dedup, metadata: Metadata | None) -> None:
    """Refuse metadata that lacks a column of ``--keep``."""
    if options.method != "semdedup":  # its order is by nearness to centroids
        rank_by(str(options.keep), 0, metadata)


def write_tables(
    result: Result, out: Path, metadata: Metadata | None, key: str | None, options: Dedup
) -> list[Path]:
    """Write all files of OUT but the manifest; return their paths."""
    with atomic.writing_npy(out / "is_dup.npy", np.dtype(bool), (result.rows,)) as file:
        for mask in result.mask():
            mask.tofile(file)
    tables = (
        partial(write_forest, result.found, out),
        partial(write_groups, result, out, metadata, key),
    )
    run_all(tables, side_by_side(result, options))
    atomic.save_parquet(out / "histogram.parquet", histogram_table(result))
    outputs = [out / name for name in TABLES]
    if len(result.found.bad):
        atomic.save_parquet(out / "bad_rows.parquet", bad_table(result.found))
        outputs.append(out / "bad_rows.parquet")
    if result.found.flags is not None:
        atomic.save_npy(out / "flags.npy", result.found.flags)
        outputs.append(out / "flags.npy")
    if result.found.best is not None:
        outputs += save_best(result.found.best, out)
    if result.found.references is not None:
        atomic.save_parquet(out / "references.parquet", references_table(result.found))
        outputs.append(out / "references.parquet")
    if options.pairs:
        outputs += [(out / locks.WORK / name).replace(out / name) for name in PAIR_TABLES]
    if metadata is not None:
        outputs += write_metadata(result, out, metadata, options)
    return outputs


def side_by_side(result: Result, options: Dedup) -> int:
    """Return how many things may be made of a result at once: one where it is held in parts."""
    return 1 if result.found.is_large(result.threshold) else min(2, cores(options.threads))


def write_forest(found: Found, out: Path) -> None:
    """Write ``forest.parquet``, some edges at a time."""
    schema = forest_table(found, join_edges([])).schema
    with atomic.writing_parquet(out / "forest.parquet", schema) as write:
        for edges in found.edges(grouping_folder(out)):
            write(forest_table(found, edges))


def write_groups(result: Result, out: Path, metadata: Metadata | None, key: str | None) -> None:
    """Write ``groups.parquet``, some groups at a time."""
    found, at = result.found, 0
    schema = groups_table(found, no_members(), None).schema
    with (
        atomic.writing_parquet(out / "groups.parquet", schema) as write,
        closing(group_keys(result, out, metadata, key)) as keys,
    ):
        for members, table in zip(slices(result.members), keys, strict=False):
            named = None if table is None else table["text"]
            near = None if result.near is None else result.near[at : at + len(members.row)]
            write(groups_table(found, members, named, near))
            at += len(members.row)


def group_keys(
    result: Result, out: Path, metadata: Metadata | None, key: str | None
) -> Generator[Any, None, None]:
    """Yield the keys of each slice of the members, None where there are no keys."""
    if metadata is None or key is None:
        yield from itertools.repeat(None)
        return
    row, cuts = result.members.row, cut_groups(result.members.group)
    yield from gather_columns(metadata, [key], row, cuts, texts, grouping_folder(out) / "keys")


def texts(file: Table, batch: Any) -> dict[str, Any]:
    """Return the one column of a record batch as texts."""
    return {"text": as_texts(file, batch.schema.names[0], batch.column(0))}


def prepare_pairs(result: Result, out: Path, options: Dedup) -> None:
    """Write ``pairs.parquet`` and ``copies.parquet`` to the work folder, or refuse too many."""
    import pyarrow as pa

    found, features = result.found, result.features
    if features is None:
        raise UsageError("--pairs needs FEATURES: pairs of codes are not verified")
    if len(found.forest.a) > options.max_pairs:
        raise too_many(options.max_pairs)
    work, threads, threshold = out / locks.WORK, cores(options.threads), found.threshold

    def pairs() -> Generator[Edges, None, None]:
        for block in found.blocks(threshold, grouping_folder(out)):
            yield from all_pairs(features, block.forest, threshold, threads, found.also)

    with closing(pairs()) as parts:
        write_pairs(work / "pairs.parquet", parts, options.max_pairs)
    copies = pa.table({"row": found.copies, "first": found.firsts})
    atomic.save_parquet(work / "copies.parquet", copies)


def write_metadata(result: Result, out: Path, metadata: Metadata, options: Dedup) -> list[Path]:
    """Write the metadata of the rows that stay, and lists of them for other tools."""
    work, kinds = grouping_folder(out), named_kinds("export", options.export, EXPORTS)
    is_dup = load_column(out / "is_dup.npy")
    gone = np.broadcast_to(np.False_, result.rows) if options.weights else is_dup
    with added_columns(options, metadata, result.gone, work) as added:
        written = write_kept(metadata, gone, out / "metadata", added)
    columns = list_columns(kinds, metadata, options.key)
    return written + write_lists(columns, metadata, is_dup, out / EXPORT, work)


def bad_table(found: Found) -> Any:
    """Return the rows that could not be compared, with their places."""
    import pyarrow as pa

    shard = np.searchsorted(found.offsets, found.bad, side="right") - 1
    names = pa.array(found.names, pa.string())
    return pa.table(
        {
            "row": found.bad,
            "shard": names.take(pa.array(shard)),
            "shard_row": found.bad - found.offsets[shard],
        }
    )


def histogram_table(result: Result) -> Any:
    """Return how many groups have each size, and how many rows that stay each ``dup_count``."""
    import pyarrow as pa

    sizes, named = (sorted(counts.items()) for counts in (result.tally.sizes, result.tally.named))
    alone = result.kept - sum(result.tally.named.values())
    value, count = np.array([*sizes, (0, alone), *named], np.int64).T
    of = ["group_size"] * len(sizes) + ["dup_count"] * (1 + len(named))
    return pa.table({"of": pa.array(of, pa.string()), "value": value, "count": count})


def describe_run(
    result: Result, out: Path, inputs: Inputs, metadata: Metadata | None, options: Dedup
) -> dict[str, Any]:
    """Return the manifest's entries about what was found and decided."""
    found, features = result.found, inputs.features
    shards = features.describe() if features else []
    for shard, checksum in zip(shards, found.checksums, strict=False):
        shard["checksum"] = checksum_text(checksum)
    work = grouping_folder(out)
    steps = [round(found.threshold + step, 6) for step in TABLE_STEPS]
    forest_tells = found.verified and found.best is None and not options.references_only
    table = [t for t in steps if found.threshold <= t <= 1] if forest_tells else []
    return {
        "command": KIND,
        "verified": found.verified,
        "shards": shards or [
            {"name": name, "rows": int(rows)}
            for name, rows in zip(found.names, np.diff(found.offsets), strict=True)
        ],
        "counts": {
            "rows": result.rows,
            "removed": result.removed,
            "kept": result.kept,
            "groups": result.tally.groups,
            "largest_group": result.tally.largest,
            "exact_copies": len(found.copies),
            "bad_rows": len(found.bad),
            "chained": result.chained,
            "forest_edges": found.edge_count,
            **more_counts(result),
        },
        **describe_sources(inputs, found),
        "baselines": baselines(metadata, result.members, work) if metadata else {},
        "thresholds": as_json(levels(found, table, work)),
        "epsilons": epsilon_table(found.best, options) if found.best else [],
        "method": found.notes,
    }  # fmt: skip


def more_counts(result: Result) -> dict[str, int]:
    """Return the counts that references add."""
    if result.found.references is None:
        return {}
    counts = {"reference_rows": result.found.references.rows}
    return counts | {"removed_for_reference": result.tally.for_reference}


def describe_sources(inputs: Inputs, found: Found) -> dict[str, Any]:
    """Return the manifest's entries about captions and references."""
    entries: dict[str, Any] = {}
    if inputs.text is not None:
        shards = inputs.text.describe()
        for shard, checksum in zip(shards, found.text_checksums, strict=True):
            shard["checksum"] = checksum_text(checksum)
        entries["text"] = {"request": request_of(inputs.text), "shards": shards}
    if inputs.references is not None:
        entries["references"] = inputs.references.describe(found.reference_checksums)
    return entries


def epsilon_table(best: Best, options: Dedup) -> list[dict[str, Any]]:
    """Return what goes at each epsilon asked for."""
    epsilons = parse_epsilons(options.epsilon) or [round(1 - options.threshold, 9)]
    return [
        {"epsilon": epsilon, "removed": int(best.removed(1 - epsilon).sum())}
        for epsilon in epsilons
    ]


def saved_settings(options: Dedup, method: str) -> dict[str, Any]:
    """Return settings as a manifest holds them: paths absolute, so that a later run finds them."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in options.as_dict().items()
    }
    settings |= {
        "method": method,
        "threads": cores(options.threads),
        "max_memory": memory_bound(options.max_memory),
    }
    for name in ("features", "metadata", "index", "encoder", "text_features"):
        value = settings[name]
        is_path = isinstance(value, str | Path)
        settings[name] = absolute_location(value) if is_path else None
    sources = [] if options.reference is None else references.split(options.reference)
    are_paths = bool(sources) and all(isinstance(source, str | Path) for source in sources)
    settings["epsilon"] = parse_epsilons(options.epsilon)
    settings["reference"] = [absolute_location(source) for source in sources] if are_paths else None
    return settings


def save_best(best: Best, out: Path) -> list[Path]:
    """Write what SemDeDup's rule looks at, one entry a row, and the centroids."""
    import pyarrow as pa

    lone = best.match < 0
    columns = {
        "cluster": pa.array(best.cluster, mask=best.cluster < 0),
        "nearness": pa.array(best.nearness, mask=best.cluster < 0),
        "match": pa.array(best.match, mask=lone),
        "similarity": pa.array(best.similarity, mask=lone),
    }
    atomic.save_parquet(out / "semdedup.parquet", pa.table(columns))
    atomic.save_npy(out / "centroids.npy", best.centroids)
    return [out / "semdedup.parquet", out / "centroids.npy"]
