"""OUT: what a run leaves behind, written once, read back for another threshold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import store
from snipdedup.additions import Removed, added_columns, added_names, caption_column
from snipdedup.baseline import baselines
from snipdedup.compute import cores, memory_bound
from snipdedup.errors import SnipError, UsageError
from snipdedup.forest import Edges
from snipdedup.groups import Members
from snipdedup.handover import list_columns, write_lists
from snipdedup.keep import rank_by
from snipdedup.metadata import Metadata, kept_names, write_kept
from snipdedup.result import Found, Result, as_json, decide, forest_table, groups_table, levels
from snipdedup.scan import equal_rows
from snipdedup.settings import EXPORTS, Dedup, named_kinds
from snipdedup.shards import Features, accept_dates, request_of

KIND = "dedup"
EXPORT = "export"  # the folder of lists for other tools
TABLES = ("is_dup.npy", "forest.parquet", "groups.parquet", "histogram.parquet")
TABLE_STEPS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.04)  # above the searched threshold, in the summary


def check_metadata(options: Dedup, metadata: Metadata | None) -> str | None:
    """Return the column of keys; refuse metadata that lacks what the settings ask of it."""
    if options.method != "semdedup":
        rank_by(str(options.keep), 0, metadata)
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


def write_tables(
    result: Result, out: Path, metadata: Metadata | None, key: str | None, options: Dedup
) -> list[Path]:
    """Write all files of OUT but the manifest; return their paths."""
    store.save_npy(out / "is_dup.npy", result.is_dup)
    store.save_parquet(out / "forest.parquet", forest_table(result.found))
    keys = None
    if metadata is not None and key is not None:
        order = np.argsort(result.members.row)
        back = np.argsort(order)
        keys = metadata.take(key, result.members.row[order]).take(back)
    store.save_parquet(out / "groups.parquet", groups_table(result, keys))
    store.save_parquet(out / "histogram.parquet", histogram_table(result))
    outputs = [out / name for name in TABLES]
    if len(result.found.bad):
        store.save_parquet(out / "bad_rows.parquet", bad_table(result.found))
        outputs.append(out / "bad_rows.parquet")
    if result.found.flags is not None:
        store.save_npy(out / "flags.npy", result.found.flags)
        outputs.append(out / "flags.npy")
    if metadata is not None:
        outputs += write_metadata(result, out, metadata, options)
    return outputs


def write_metadata(result: Result, out: Path, metadata: Metadata, options: Dedup) -> list[Path]:
    """Write the metadata of the rows that stay, and lists of them for other tools."""
    work, kinds = out / store.WORK, named_kinds("export", options.export, EXPORTS)
    gone = np.broadcast_to(np.False_, result.rows) if options.weights else result.is_dup
    with added_columns(options, metadata, removed_rows(result.members), work) as added:
        written = write_kept(metadata, gone, out / "metadata", added)
    columns = list_columns(kinds, metadata, options.key)
    return written + write_lists(columns, metadata, result.is_dup, out / EXPORT, work)


def removed_rows(members: Members) -> Removed:
    """Return the rows that go, ascending, and what stands for them."""
    order = np.argsort(members.row)
    order = order[members.is_dup[order]]
    return Removed(members.row[order], members.representative[order])


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

    _, sizes = np.unique(result.members.group, return_counts=True)
    rows, named = result.dup_counts()
    named = named[~result.is_dup[rows]]
    size, groups = np.unique(sizes, return_counts=True)
    dup_count, staying = np.unique(named, return_counts=True)
    of = ["group_size"] * len(size) + ["dup_count"] * (1 + len(dup_count))
    return pa.table(
        {
            "of": pa.array(of, pa.string()),
            "value": np.concatenate([size, [0], dup_count]).astype(np.int64),
            "count": np.concatenate([groups, [result.kept - len(named)], staying]).astype(np.int64),
        }
    )


def describe_run(
    result: Result, features: Features | None, metadata: Metadata | None
) -> dict[str, Any]:
    """Return the manifest's entries about what was found and decided."""
    found = result.found
    shards = features.describe() if features else []
    for shard, crc in zip(shards, found.crcs, strict=False):
        shard["crc32"] = f"{crc:08x}"
    _, sizes = np.unique(result.members.group, return_counts=True)
    steps = [round(found.threshold + step, 6) for step in TABLE_STEPS]
    table = [t for t in steps if found.threshold <= t <= 1] if found.verified else []
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
            "groups": len(sizes),
            "largest_group": int(sizes.max(initial=1)),
            "exact_copies": len(found.copies),
            "bad_rows": len(found.bad),
            "chained": result.chained,
            "forest_edges": len(found.whole_forest.a),
        },
        "baselines": baselines(metadata, result.members) if metadata else {},
        "thresholds": as_json(levels(found, table)),
        "method": found.notes,
    }  # fmt: skip


def finished_run(features: Any) -> Path | None:
    """Return FEATURES where it is a finished OUT, to be decided anew."""
    if isinstance(features, str | Path):
        folder = Path(features).expanduser()
        if (folder / store.MANIFEST).is_file():
            manifest = store.load_json(folder / store.MANIFEST)
            if isinstance(manifest, dict) and manifest.get("kind") == KIND:
                return folder
    return None


def saved_settings(options: Dedup, method: str) -> dict[str, Any]:
    """Return settings as a manifest holds them: paths absolute, so that a later run finds them."""
    settings = options.as_dict() | {
        "method": method,
        "threads": cores(options.threads),
        "max_memory": memory_bound(options.max_memory),
    }
    for name in ("features", "metadata", "index", "encoder"):
        value = settings[name]
        is_path = isinstance(value, str | Path)
        settings[name] = str(Path(value).expanduser().absolute()) if is_path else None
    return settings


def load_found(folder: Path, features: Features | None) -> Found:
    """Read back what a finished run found.

    Raises
    ------
    SnipError
        If the run's pairs were never verified, or its features are not the same any more.
    """
    import pyarrow.parquet as pq

    manifest = store.read_manifest(folder, KIND)
    if not manifest["verified"] or features is None:
        raise SnipError(f"{folder}: its pairs are unverified and have no cosines; search again")
    check_searched(folder, features, manifest)
    table = pq.read_table(folder / "forest.parquet")
    edges = Edges(*(table[name].to_numpy() for name in ("a", "b", "similarity")))
    one = np.flatnonzero(edges.similarity == 1)
    one = one[equal_rows(features, edges.b[one], edges.a[one])]
    distinct = np.ones(len(edges.a), bool)
    distinct[one] = False
    bad = folder / "bad_rows.parquet"
    return Found(
        names=[shard["name"] for shard in manifest["shards"]],
        offsets=features.offsets,
        threshold=manifest["settings"]["threshold"],
        forest=edges.where(distinct),
        copies=edges.b[one],
        firsts=edges.a[one],
        bad=pq.read_table(bad)["row"].to_numpy() if bad.is_file() else np.empty(0, np.int64),
        crcs=[int(shard["crc32"], 16) for shard in manifest["shards"]],
        notes=manifest["method"],
    )


def check_searched(folder: Path, features: Features, manifest: dict[str, Any]) -> None:
    """Refuse features that are not those a finished run searched.

    Raises
    ------
    SnipError
        If shards came, went or changed since.
    """
    now = request_of(features)
    accept_dates(now, features, manifest)
    names = [[shard["name"] for shard in found["features"]] for found in (now, manifest["request"])]
    if names[0] != names[1]:
        changed = sorted(set(names[0]) ^ set(names[1])) or ["their order"]
    else:
        known = [(manifest["request"][key], now[key]) for key in now]
        changed = [
            name
            for number, name in enumerate(names[0])
            if any(then[number] != found[number] for then, found in known)
        ]
    if changed:
        raise SnipError(
            f"{folder}: the features are not those that were searched ({changed[0]} differs); "
            "search again"
        )


def clear_earlier(out: Path) -> None:
    """Remove an earlier result from OUT, just before a new one is written.

    Of a finished run what its manifest names; of a stopped one, which has none, every table.
    """
    if (out / store.MANIFEST).is_file():
        store.clear(out, keep_work=True)
        return
    for name in (*TABLES, "bad_rows.parquet", "flags.npy"):
        (out / name).unlink(missing_ok=True)
    for path in (*(out / "metadata").glob("*.parquet"), *(out / EXPORT).glob("*")):
        path.unlink()
    for folder in (out / "metadata", out / EXPORT):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def load_result(
    folder: Path, features: Features | None, metadata: Metadata | None = None
) -> Result:
    """Read back a finished run's decision; by metadata too, where its keep rules name columns."""
    settings = store.read_manifest(folder, KIND)["settings"]
    found = load_found(folder, features)
    names = ("threshold", "grouping", "keep", "seed")
    threshold, grouping, keep, seed = (settings[name] for name in names)
    rank = rank_by(keep, seed, metadata)
    return decide(found, features, threshold, grouping, keep, seed, rank)


def summary(result: Result, out: Path, body: dict[str, Any]) -> str:
    """Return the few lines that a run ends with."""
    counts = body["counts"]
    lines = [
        f"{result.rows:,} rows, threshold {result.threshold:g}, grouping {result.grouping}, "
        f"keep {result.keep}",
        f"  removed     {counts['removed']:>12,}  ({100 * result.duplicate_ratio:.2f} %)",
        f"  stay        {counts['kept']:>12,}",
        f"  groups      {counts['groups']:>12,}  (the largest: {counts['largest_group']:,} rows)",
        f"  exact copies{counts['exact_copies']:>12,}",
    ]
    for column, caught in body["baselines"].items():
        lines.append(f"  by {column:<9}{caught:>12,}  of them equal {column}s alone would catch")
    if counts["bad_rows"]:
        lines.append(f"  bad rows    {counts['bad_rows']:>12,}  (stay; see bad_rows.parquet)")
    if result.chained:
        lines.append(
            f"  chained     {result.chained:>12,}  removed rows are below the threshold to the row "
            "that stays; --grouping star avoids that"
        )
    if not result.found.verified:
        lines.append("  unverified: no features were given, so no pair was proved")
    lines += threshold_table(body["thresholds"])
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in body["seconds"].items())
    return "\n".join([*lines, f"seconds: {spent}", f"written to {out}"])


def threshold_table(table: list[dict[str, Any]]) -> list[str]:
    """Lay out what other thresholds would remove."""
    if not table:
        return []
    lines = ["", "  components at threshold   rows that go        groups  largest group"]
    for level in table:
        lines.append(
            f"  {level['threshold']:>23.3f}   {level['removed']:>12,}  {level['groups']:>12,}  "
            f"{level['largest']:>13,}"
        )
    return [*lines, ""]
