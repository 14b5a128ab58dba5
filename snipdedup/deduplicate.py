"""The chain: scan, search, verify, group, write.

``dedup`` is the library's function, ``run`` the command. Both do the same; ``run`` adds what paths
need: an OUT folder that is claimed first and whose manifest is written last.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import store
from snipdedup.compute import cores
from snipdedup.errors import SnipError, UsageError
from snipdedup.exact import exact_edges
from snipdedup.forest import Edges, ForestBuilder
from snipdedup.join import join
from snipdedup.metadata import Metadata, open_metadata, write_kept
from snipdedup.result import Found, Result, as_json, decide, forest_table, groups_table, levels
from snipdedup.scan import equal_rows, scan
from snipdedup.settings import Dedup, parse_bytes
from snipdedup.shards import Features, implied_metadata, open_features

KIND = "dedup"
# Settings that say how a result is computed, not what it is.
HOW = {"out", "overwrite", "chunk_rows", "threads", "max_memory", "device", "features", "metadata"}
TABLE_STEPS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.04)  # above the searched threshold, in the summary


def dedup(features: Any, **settings: Any) -> Result:
    """Find near-duplicates among features.

    Parameters
    ----------
    features : (n, d) float array, path, or a sequence of either
        As `snipdedup.shards.open_features` takes them.
    **settings
        Any setting of ``snip dedup``: ``threshold``, ``method``, ``grouping``, ``keep``, ...
        With ``out`` the result is also written there.

    Returns
    -------
    Result
        ``is_dup`` (n,) bool, ``groups`` and ``forest`` tables, ``at(threshold)``.

    Raises
    ------
    SnipError
        If the input cannot be used; says what was found, where, and what to do.
    """
    options = Dedup(features=features, **settings)
    if options.out is not None:
        return execute(options)[0]
    opened = open_features(
        features, parts=options.parts, array=options.array, column=options.column
    )
    with tempfile.TemporaryDirectory(prefix="snip-") as work:
        found = search(opened, options, Path(work), Clock())
    return decide(found, opened, options.threshold, options.grouping, options.keep, options.seed)


def run(options: Dedup) -> str:
    """Run ``snip dedup`` and return its summary."""
    if options.out is None:
        raise UsageError("dedup needs --out; for example: snip dedup img_emb --out clean")
    if options.features is None and options.index is None:
        raise UsageError("dedup needs FEATURES, or --index with --method adc")
    return execute(options)[1]


class Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's wall time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 3)


def execute(options: Dedup) -> tuple[Result, str]:
    """Claim OUT, search, decide, write; return the result and its summary."""
    clock, out = Clock(), Path(str(options.out)).expanduser()
    earlier = finished_run(options.features)
    if earlier is not None:
        options = inherit(options, earlier)
    features = open_input(options)
    metadata = open_table(options, features)
    inputs = [*(features.paths() if features else []), *(metadata.paths() if metadata else [])]
    store.refuse_output_inside(out, [*inputs, *([earlier] if earlier else [])])
    key = metadata.column(options.key) if metadata else None
    request = describe_request(options, features, metadata)
    if store.claim(out, KIND, request, overwrite=options.overwrite) == "done":
        result = load_result(out, features)
        return result, f"{out} is finished already with these settings; --overwrite makes it anew"
    if earlier is not None:
        found = load_found(earlier, features)
    else:
        found = search(features, options, out / store.WORK, clock)
    with clock.stage("group"):
        result = decide(
            found, features, options.threshold, options.grouping, options.keep, options.seed
        )
    with clock.stage("write"):
        outputs = write_tables(result, out, metadata, key)
    body = describe_run(result, options, request, features, clock)
    store.write_manifest(out, KIND, body, outputs)
    shutil.rmtree(out / store.WORK, ignore_errors=True)
    return result, summary(result, out, body)


def open_input(options: Dedup) -> Features | None:
    """Open FEATURES, None where an index alone is given."""
    if options.features is None:
        return None
    return open_features(
        options.features, parts=options.parts, array=options.array, column=options.column
    )


def open_table(options: Dedup, features: Features | None) -> Metadata | None:
    """Open META where there is one, and check that its rows match the features'."""
    spec = options.metadata
    if spec is None and isinstance(options.features, str | Path):
        implied = implied_metadata(options.features)
        spec = None if implied is None else str(implied)
    if spec is None:
        if options.key is not None:
            raise UsageError("--key names a column of the metadata: give --metadata too")
        return None
    metadata = open_metadata(spec)
    if features is not None:
        metadata.check_matches(features)
    return metadata


def describe_request(
    options: Dedup, features: Features | None, metadata: Metadata | None
) -> dict[str, Any]:
    """Return what the result depends on, by name."""
    settings = {k: v for k, v in options.as_dict().items() if k not in HOW}
    settings["method"] = method_of(options)
    described = features.describe() if features else None
    table = None
    if metadata is not None:
        table = [{"name": f.path.name, "rows": f.rows} for f in metadata.files]
    return {**settings, "features": described, "metadata": table}


def method_of(options: Dedup) -> str:
    """Return the method asked for; an index without one means ``adc``."""
    if options.method is not None:
        return options.method
    return "adc" if options.index is not None else "join"


def search(features: Features | None, options: Dedup, work: Path, clock: Clock) -> Found:
    """Find all pairs by the method asked for.

    Raises
    ------
    SnipError
        If there are bad rows and they are not to be kept.
    """
    method = method_of(options)
    if method == "adc":
        from snipdedup.adc import search_index

        return search_index(features, options, work, clock.stage)
    if features is None:
        raise UsageError(f"--method {method} compares raw rows: give FEATURES")
    if method == "join":
        seen, forest, notes = join(
            features,
            threshold=options.threshold,
            recall=options.recall,
            seed=options.seed,
            keep_bad=options.bad_rows == "keep",
            chunk_rows=options.chunk_rows,
            threads=cores(options.threads),
            memory=memory_of(options),
            work=work,
            stage=clock.stage,
        )
        return make_found(features, options, seen, forest, notes)
    threads = cores(options.threads)
    with clock.stage("read"):
        seen = scan(
            features,
            chunk_rows=options.chunk_rows,
            threads=threads,
            keep_bad=options.bad_rows == "keep",
        )
    with clock.stage("compare"):
        builder = ForestBuilder()
        rows = np.flatnonzero(~seen.skipped(features.rows))
        for edges in exact_edges(
            features, rows, options.threshold, threads=threads, memory=memory_of(options)
        ):
            builder.add(edges)
    return make_found(features, options, seen, builder.forest(), {})


def make_found(
    features: Features, options: Dedup, seen: Any, forest: Edges, notes: dict[str, Any]
) -> Found:
    """Put together what a scan and a search found."""
    return Found(
        names=[shard.path.name for shard in features.shards],
        offsets=features.offsets,
        threshold=options.threshold,
        forest=forest,
        copies=seen.copies,
        firsts=seen.firsts,
        bad=seen.bad,
        crcs=seen.crcs,
        notes=notes,
    )


def memory_of(options: Dedup) -> int:
    """Return the bound on memory in bytes; by default a quarter of the machine's."""
    if options.max_memory is not None:
        return parse_bytes(options.max_memory)
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def write_tables(
    result: Result, out: Path, metadata: Metadata | None, key: str | None
) -> list[Path]:
    """Write all files of OUT but the manifest; return their paths."""
    store.save_npy(out / "is_dup.npy", result.is_dup)
    store.save_parquet(out / "forest.parquet", forest_table(result.found.whole_forest))
    keys = None
    if metadata is not None and key is not None:
        order = np.argsort(result.members.row)
        back = np.argsort(order)
        keys = metadata.take(key, result.members.row[order]).take(back)
    store.save_parquet(out / "groups.parquet", groups_table(result, keys))
    outputs = [out / "is_dup.npy", out / "forest.parquet", out / "groups.parquet"]
    if len(result.found.bad):
        store.save_parquet(out / "bad_rows.parquet", bad_table(result.found))
        outputs.append(out / "bad_rows.parquet")
    if result.found.flags is not None:
        store.save_npy(out / "flags.npy", result.found.flags)
        outputs.append(out / "flags.npy")
    if metadata is not None:
        outputs += write_kept(metadata, result.is_dup, out / "metadata", result.dup_counts())
    return outputs


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


def describe_run(
    result: Result, options: Dedup, request: dict[str, Any], features: Features | None, clock: Clock
) -> dict[str, Any]:
    """Return the manifest's own entries."""
    found = result.found
    shards = features.describe() if features else []
    for shard, crc in zip(shards, found.crcs, strict=False):
        shard["crc32"] = f"{crc:08x}"
    _, sizes = np.unique(result.members.group, return_counts=True)
    steps = [round(found.threshold + step, 6) for step in TABLE_STEPS]
    table = [t for t in steps if found.threshold <= t <= 1] if found.verified else []
    return {
        "command": sys.argv,
        "request": request,
        "settings": options.as_dict() | {"method": method_of(options)},
        "input": input_spec(options),
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
        "thresholds": as_json(levels(found, table)),
        "method": found.notes,
        "seconds": clock.seconds,
    }  # fmt: skip


def input_spec(options: Dedup) -> dict[str, Any]:
    """Return where the features were, so that a re-threshold can read them again."""
    where = options.features
    if isinstance(where, str | Path):
        where = str(Path(str(where)).expanduser().absolute())
    elif where is not None:
        where = None  # arrays in memory
    return {
        "features": where,
        "metadata": None if options.metadata is None else str(Path(options.metadata).absolute()),
        "parts": options.parts,
        "array": options.array,
        "column": options.column,
    }


def finished_run(features: Any) -> Path | None:
    """Return FEATURES where it is a finished OUT, to be decided anew."""
    if isinstance(features, str | Path):
        folder = Path(features).expanduser()
        if (folder / store.MANIFEST).is_file():
            manifest = store.load_json(folder / store.MANIFEST)
            if isinstance(manifest, dict) and manifest.get("kind") == KIND:
                return folder
    return None


def inherit(options: Dedup, earlier: Path) -> Dedup:
    """Return settings for a re-threshold: the input and the search of the finished run."""
    manifest = store.read_manifest(earlier, KIND)
    spec, searched = manifest["input"], manifest["settings"]
    if spec["features"] is None and manifest["verified"]:
        raise SnipError(f"{earlier} was made from arrays in memory; use Result.at(threshold)")
    return Dedup(
        **{
            **options.as_dict(),
            **spec,
            "metadata": options.metadata or spec["metadata"],
            "method": searched["method"],
            "index": searched["index"],
            "encoder": searched["encoder"],
            "bad_rows": searched["bad_rows"],
        }
    )


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
    for now, then in zip(features.describe(), manifest["shards"], strict=False):
        if any(now[name] != then[name] for name in ("name", "size", "rows", "dtype")):
            raise SnipError(f"{folder}: shard {then['name']} is not the one that was searched")
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


def load_result(folder: Path, features: Features | None) -> Result:
    """Read back a finished run's decision."""
    settings = store.read_manifest(folder, KIND)["settings"]
    found = load_found(folder, features)
    return decide(
        found, features, settings["threshold"], settings["grouping"], settings["keep"],
        settings["seed"],
    )  # fmt: skip


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
