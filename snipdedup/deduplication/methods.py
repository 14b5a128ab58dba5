"""The search: what there is to compare, and which pairs the method asked for finds."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.config import Dedup
from snipdedup.deduplication.adc_method import check_given, search_adc
from snipdedup.deduplication.captions import with_captions
from snipdedup.deduplication.found import Found
from snipdedup.deduplication.inputs import Inputs
from snipdedup.deduplication.references import References, kept_model, settle
from snipdedup.deduplication.result import choose
from snipdedup.deduplication.semdedup import search_semdedup
from snipdedup.features.scan import Scan, scan
from snipdedup.features.shards import Features
from snipdedup.groups.members import Best
from snipdedup.groups.pairs import all_pairs
from snipdedup.join.brute_force import exact_edges
from snipdedup.join.forest import Edges, ForestBuilder, join_edges
from snipdedup.join.memory import needed_memory
from snipdedup.join.model import is_readable
from snipdedup.join.pipeline import join
from snipdedup.join.tasks import JoinSettings
from snipdedup.parallel import cores, memory_bound
from snipdedup.progress import Clock
from snipdedup.runners.base import Runner
from snipdedup.runners.local import Local


def method_of(options: Dedup) -> str:
    """Return the method asked for; an index without one means ``adc``."""
    if options.method is not None:
        return options.method
    return "adc" if options.index is not None else "join"


def search(
    inputs: Inputs, options: Dedup, work: Path, clock: Clock, runner: Runner | None = None
) -> Found:
    """Find all pairs by the method asked for; ``runner`` does the tasks of a join.

    Raises
    ------
    SnipError
        If there are bad rows and they are not to be kept.
    slurm.ShareDone
        If this is not the process that writes the result.
    """
    features, method = inputs.features, method_of(options)
    if method == "adc" or features is None:
        return search_adc(features, options, work, clock.stage)
    if method == "semdedup":
        return find_semdedup(features, options, work, clock)
    joined = functools.partial(search_join, runner=runner)
    compare = joined if method == "join" else search_exact
    if method == "join":  # refused before anything is written
        every = inputs.references.before(features) if inputs.references else features
        here = cores(options.threads) if runner is None else runner.here
        memory_bound(options.max_memory, needed_memory(every, here))
    if inputs.references is None:
        found = make_found(features, options, *compare(features, 0, options, work, clock))
    else:
        found = find_beside(inputs.references, features, options, work, clock, compare)
    also = inputs.also(options)
    if inputs.text is None or also is None:
        return found
    with clock.stage("captions"):
        seen = read_all(inputs.text, options)
        found = with_captions(found, features, seen, also, cores(options.threads))
    return dataclasses.replace(found, text_checksums=seen.checksums)


def search_join(
    features: Features,
    frozen: int,
    options: Dedup,
    work: Path,
    clock: Clock,
    runner: Runner | None = None,
    kept: Path | None = None,
) -> tuple[Scan, Edges, dict[str, Any]]:
    """Find pairs by the join, by the model ``kept`` if there is one.

    Pairs among the first ``frozen`` rows are not wanted. What is returned as forest, and which
    pairs else are not wanted: see `join`.
    """
    check_given(features, options)
    runner = runner or Local(cores(options.threads))
    settings = JoinSettings(
        threshold=options.threshold,
        recall=options.recall,
        seed=options.seed or 0,
        keep_bad=options.bad_rows == "keep",
        chunk_rows=options.chunk_rows,
        device="cpu" if options.runner == "ray" else options.device,
        reference_rows=frozen,
        references_only=options.references_only and frozen > 0,
        encoder=None if options.encoder is None else Path(options.encoder).expanduser(),
        kept_model=kept,
    )
    memory = memory_bound(options.max_memory, needed_memory(features, runner.here, frozen))
    return join(features, settings, work, runner, memory=memory, stage=clock.stage)


def search_exact(
    features: Features, frozen: int, options: Dedup, work: Path, clock: Clock
) -> tuple[Scan, Edges, dict[str, Any]]:
    """Find all pairs by brute force, but those among the first ``frozen`` rows."""
    del work
    threads, memory = cores(options.threads), memory_bound(options.max_memory)
    with clock.stage("read"):
        seen = read_all(features, options)
    with clock.stage("compare"):
        rows = np.flatnonzero(~seen.skipped(features.rows, frozen))
        builder = ForestBuilder(frozen)
        for edges in exact_edges(
            features, rows, options.threshold, threads=threads, memory=memory,
            reference_rows=frozen, references_only=options.references_only and frozen > 0,
        ):  # fmt: skip
            builder.add(edges)
    return seen, builder.forest(), {}


def read_all(features: Features, options: Dedup) -> Scan:
    """Read all rows once."""
    return scan(
        features,
        chunk_rows=options.chunk_rows,
        threads=cores(options.threads),
        keep_bad=options.bad_rows == "keep",
    )


def find_beside(
    references: References,
    features: Features,
    options: Dedup,
    work: Path,
    clock: Clock,
    compare: Any,
) -> Found:
    """Search over reference rows and features, and cut down what is found to the features."""
    rows, frozen = references.before(features), references.rows
    joins = method_of(options) == "join"
    model = kept_model(references, features.rows, options) if joins else None
    if model is not None and not is_readable(model):
        model = None
    if model is not None:
        compare = functools.partial(compare, kept=model)
    seen, forest, notes = compare(rows, frozen, options, work, clock)
    if joins:
        notes = {**notes, "model": "fitted" if model is None else "kept"}
    with clock.stage("refer"):
        settled = settle(
            rows,
            frozen,
            forest,
            (seen.copies, seen.firsts),
            options.threshold,
            cores(options.threads),
            across=options.references_only,
            folder=work / "refer",
        )
    shards = len(references.features.shards)
    bad = seen.bad[seen.bad >= frozen] - frozen
    own = Scan(bad, settled.copies, settled.firsts, seen.checksums[shards:])
    return dataclasses.replace(
        make_found(features, options, own, settled.forest, notes),
        references=references,
        reference_checksums=seen.checksums[:shards],
        nearest=settled.nearest,
    )


def find_semdedup(features: Features, options: Dedup, work: Path, clock: Clock) -> Found:
    """Find by SemDeDup's rule, and what the borders of its clusters cost."""
    with clock.stage("read"):
        seen = read_all(features, options)
    best = search_semdedup(
        features,
        seen,
        clusters=options.clusters,
        keep=str(options.keep),
        seed=options.seed or 0,
        threads=cores(options.threads),
        stage=clock.stage,
    )
    notes: dict[str, Any] = {"clusters": len(best.centroids)}
    if options.borders:
        with clock.stage("borders"):
            notes["borders"] = border_cost(features, best, options, work)
    found = make_found(features, options, seen, join_edges([]), notes)
    return dataclasses.replace(found, best=best)


def border_cost(features: Features, best: Best, options: Dedup, work: Path) -> dict[str, int]:
    """Return what the join finds that lies across borders of clusters.

    ``pairs`` and ``across`` count pairs of distinct rows; ``beside`` the rows that stay although an
    earlier row that stays is their pair; ``star`` what star would remove, ``both`` what both do.
    """
    clock = Clock()
    found = make_found(features, options, *search_join(features, 0, options, work, clock))
    gone = best.removed(options.threshold)
    pairs, across = 0, 0
    beside = np.zeros(features.rows, bool)
    threads = cores(options.threads)
    for edges in all_pairs(features, found.forest, options.threshold, threads):
        pairs += len(edges.a)
        across += int((best.cluster[edges.a] != best.cluster[edges.b]).sum())
        beside[edges.b[~gone[edges.a] & ~gone[edges.b]]] = True
    star = choose(found, features, options.threshold, "star", "first", 0).is_dup
    return {
        "pairs": pairs,
        "across": across,
        "beside": int(beside.sum()),
        "star": int(star.sum()),
        "both": int((star & gone).sum()),
    }


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
        checksums=seen.checksums,
        notes=notes,
    )
