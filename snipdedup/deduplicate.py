"""The chain: scan, search, verify, group, write.

``dedup`` is the library's function, ``run`` the command. Both do the same; ``run`` adds what paths
need: an OUT folder that is claimed first and whose manifest is written last.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import store
from snipdedup.adc import check_given, search_adc
from snipdedup.compute import cores, library_threads, memory_bound, pick_device
from snipdedup.errors import InputError, SnipError, UsageError
from snipdedup.exact import exact_edges
from snipdedup.forest import Edges, ForestBuilder
from snipdedup.join import join
from snipdedup.keep import rank_by
from snipdedup.metadata import Metadata, open_metadata
from snipdedup.outfolder import (
    KIND,
    check_metadata,
    clear_earlier,
    describe_run,
    finished_run,
    load_found,
    load_result,
    saved_settings,
    summary,
    write_tables,
)
from snipdedup.progress import Clock
from snipdedup.result import Found, Result, check_threshold, decide
from snipdedup.scan import Scan, scan
from snipdedup.settings import Dedup, keep_rules
from snipdedup.shards import (
    Features,
    accept_dates,
    implied_metadata,
    open_features,
    request_of,
)

# Settings that say how a result is computed, not what it is.
HOW = {"out", "overwrite", "chunk_rows", "threads", "max_memory", "device", "features", "metadata"}


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
        return execute(options, load=True)[0]
    options = options.filled()
    if options.device != "auto":
        pick_device(options.device)
    opened = open_input(options)
    metadata = open_table(options, opened) if keep_rules(str(options.keep))[0] else None
    rank_by(str(options.keep), 0, metadata)  # refused now, not after the search
    with tempfile.TemporaryDirectory(prefix="snip-") as work:
        found = search(opened, options, Path(work), Clock())
    return decide_by(found, opened, metadata, options)


def run(options: Dedup) -> str:
    """Run ``snip dedup`` and return its summary."""
    if options.out is None:
        raise UsageError("dedup needs --out; for example: snip dedup img_emb --out clean")
    return execute(options)[1]


def execute(options: Dedup, *, load: bool = False) -> tuple[Any, str]:
    """Claim OUT, search, decide, write; return the result and its summary.

    Of a run that is finished already the result is read back with ``load``, else None.
    """
    clock, out = Clock(), Path(str(options.out)).expanduser()
    if options.device != "auto":
        pick_device(options.device)
    earlier = finished_run(options.features)
    if earlier is not None:
        options = inherit(options, earlier)
    options = options.filled()
    features = open_input(options)
    metadata = open_table(options, features)
    store.refuse_output_inside(out, list_inputs(options, features, metadata, earlier))
    key = check_metadata(options, metadata)  # refused now, not after the search
    request = describe_request(options, features, metadata)
    if earlier is None and method_of(options) == "adc":
        check_given(features, options)
    found = None if earlier is None else reuse(earlier, features, options.threshold)
    if features is not None and (out / store.MANIFEST).is_file():
        accept_dates(request, features, store.read_manifest(out, KIND))
    state = store.claim(out, KIND, request, overwrite=options.overwrite, late=True)
    if state == "done":
        said = f"{out} is finished already with these settings; --overwrite makes it anew"
        return load_result(out, features, metadata) if load else None, said
    try:
        found = found or search(features, options, out / store.WORK, clock)
    except InputError:
        store.release(out)
        raise
    with clock.stage("group"):
        result = decide_by(found, features, metadata, options)
    with clock.stage("write"):
        clear_earlier(out)
        outputs = write_tables(result, out, metadata, key, options)
    body = {
        "request": request,
        "settings": saved_settings(options, method_of(options)),
        **describe_run(result, features, metadata),
        "seconds": {stage: round(spent, 3) for stage, spent in clock.seconds.items()},
    }
    store.write_manifest(out, KIND, body, outputs)
    shutil.rmtree(out / store.WORK, ignore_errors=True)
    return result, summary(result, out, body)


def decide_by(
    found: Found, features: Features | None, metadata: Metadata | None, options: Dedup
) -> Result:
    """Decide by the settings, which are `Dedup.filled`."""
    grouping, keep, seed = str(options.grouping), str(options.keep), options.seed or 0
    rank = rank_by(keep, seed, metadata)
    with library_threads(cores(options.threads)):
        return decide(found, features, options.threshold, grouping, keep, seed, rank)


def reuse(earlier: Path, features: Features | None, threshold: float) -> Found:
    """Return what a finished run found, as if it had searched at this threshold."""
    found = load_found(earlier, features)
    check_threshold(found, threshold)
    return dataclasses.replace(found, forest=found.forest.at(threshold), threshold=threshold)


def list_inputs(
    options: Dedup, features: Features | None, metadata: Metadata | None, earlier: Path | None
) -> list[Path]:
    """Return the files and folders that are read, in which OUT must not lie."""
    folders = [Path(str(name)).expanduser() for name in (options.index, options.encoder) if name]
    return [
        *(features.inputs() if features else []),
        *(metadata.inputs() if metadata else []),
        *(folder for folder in folders if folder.is_dir()),
        *([earlier] if earlier else []),
    ]


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
    else:
        held = store.read_manifest(Path(str(options.index)).expanduser(), "index")["shards"]
        metadata.check_rows([(shard["name"], shard["rows"]) for shard in held])
    return metadata


def describe_request(
    options: Dedup, features: Features | None, metadata: Metadata | None
) -> dict[str, Any]:
    """Return what the result depends on, by name."""
    settings = {k: v for k, v in options.as_dict().items() if k not in HOW}
    settings["method"] = method_of(options)
    for name in ("index", "encoder"):  # what they are, not where
        if settings[name] is not None:
            manifest = Path(settings[name]).expanduser() / store.MANIFEST
            settings[name] = store.sha256(manifest) if manifest.is_file() else settings[name]
    described = request_of(features) if features else {}
    table = None
    if metadata is not None:
        table = [describe_file(file.path, file.rows) for file in metadata.files]
    return {**settings, "features": None, **described, "metadata": table}


def describe_file(path: Path, rows: int) -> dict[str, Any]:
    """Return what tells a metadata file from another."""
    stat = path.stat()
    return {"name": path.name, "rows": rows, "size": stat.st_size, "changed": stat.st_mtime_ns}


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
    if method == "adc" or features is None:
        return search_adc(features, options, work, clock.stage)
    if method == "join":
        seen, forest, notes = join(
            features,
            threshold=options.threshold,
            recall=options.recall,
            seed=options.seed or 0,
            keep_bad=options.bad_rows == "keep",
            chunk_rows=options.chunk_rows,
            threads=cores(options.threads),
            memory=memory_bound(options.max_memory),
            device=pick_device(options.device),
            work=work,
            stage=clock.stage,
        )
        return make_found(features, options, seen, forest, notes)
    return search_exact(features, options, clock)


def search_exact(features: Features, options: Dedup, clock: Clock) -> Found:
    """Find all pairs by brute force."""
    threads, memory = cores(options.threads), memory_bound(options.max_memory)
    keep_bad = options.bad_rows == "keep"
    with clock.stage("read"):
        seen = scan(features, chunk_rows=options.chunk_rows, threads=threads, keep_bad=keep_bad)
    with clock.stage("compare"):
        builder, rows = ForestBuilder(), np.flatnonzero(~seen.skipped(features.rows))
        found = exact_edges(features, rows, options.threshold, threads=threads, memory=memory)
        for edges in found:
            builder.add(edges)
    return make_found(features, options, seen, builder.forest(), {})


def make_found(
    features: Features, options: Dedup, seen: Scan, forest: Edges, notes: dict[str, Any]
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


def inherit(options: Dedup, earlier: Path) -> Dedup:
    """Return settings for a re-threshold: the input and the search of the finished run."""
    searched = store.read_manifest(earlier, KIND)["settings"]
    if searched["features"] is None:
        raise SnipError(f"{earlier} names no features; use Result.at(threshold), or search again")
    if options.method not in (None, searched["method"]):
        raise UsageError(
            f"{earlier} was searched by {searched['method']}; search again to change it"
        )
    kept = (
        "features", "parts", "array", "column", "method", "index", "encoder", "bad_rows",
        "recall", "rule", "margin", "precision", "calibration_rows", "k", "nprobe",
    )  # fmt: skip
    metadata = options.metadata or searched["metadata"]
    settings = {name: searched[name] for name in kept}
    for name in ("grouping", "keep", "seed", "key"):  # what is not said now stays as it was
        settings[name] = (
            searched[name] if getattr(options, name) is None else getattr(options, name)
        )
    return Dedup(**{**options.as_dict(), **settings, "metadata": metadata})
