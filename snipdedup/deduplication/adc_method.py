"""Method ``adc``: candidate pairs of an index, verified on raw rows where features are given."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import config
from snipdedup.adc.pairs import Rule, candidate_pairs
from snipdedup.adc.threshold import TWO_SIDED
from snipdedup.deduplication.pair_search import PairSearch
from snipdedup.errors import SnipError
from snipdedup.features.scan import scan
from snipdedup.features.shards import Features
from snipdedup.index.build import build
from snipdedup.index.folder import Index
from snipdedup.index.search import query_space
from snipdedup.join.forest import Edges, ForestBuilder, join_edges, make_edges, spanning_forest
from snipdedup.join.verify import verify_pairs
from snipdedup.parallel import Stage, cores
from snipdedup.storage import atomic
from snipdedup.storage.out_folder import MANIFEST, read_manifest


def check_given(features: Features | None, options: config.Dedup) -> None:
    """Refuse an index or encoder that is not there, or is of other features, before any work."""
    if options.index is not None:
        index = Index(options.index)
        if features is not None:
            query_space(index, features, options.encoder)
    elif options.encoder is not None:
        from snipdedup.encoder.network import Encoder

        encoder = Encoder.load(options.encoder, device="cpu")
        if features is not None:
            encoder.check_width(features, options.encoder)


def search_adc(
    features: Features | None, options: config.Dedup, work: Path, stage: Stage
) -> PairSearch:
    """Find pairs by the adaptive threshold on the ADC distance.

    Without features pairs stay unverified, and an index must be given; with features one is built
    in ``work`` if none is given. ``stage`` times a stage by its name.
    """
    threads = cores(options.threads)
    with stage("index"):
        if options.index is not None or features is None:
            index = Index(str(options.index))
        else:
            index = build_in(work / "index", features, options)
    seen = None
    if features is not None:
        with stage("read"):
            keep_bad, chunk_rows = options.bad_rows == "keep", options.chunk_rows
            seen = scan(features, chunk_rows=chunk_rows, threads=threads, keep_bad=keep_bad)
    with stage("search"):
        rule, blocks = candidate_pairs(
            index,
            features,
            rule=TWO_SIDED if options.rule == "mutual" else options.rule,
            margin=options.margin,
            precision=options.precision,
            threshold=options.threshold,
            calibration_rows=options.calibration_rows,
            seed=options.seed or 0,
            k=options.k,
            nprobe=options.nprobe,
            encoder=options.encoder,
            work=work,
            threads=threads,
        )
        if features is None or seen is None:
            return unverified_result(index, rule, blocks, options.threshold)
        flags, cut, builder = np.zeros(index.rows, bool), 0, ForestBuilder()
        skip, original = seen.skipped(features.rows), np.arange(features.rows)
        original[seen.copies] = seen.firsts
        for block in blocks:
            flags[block.flagged], cut = True, cut + block.cut
            a, b = original[block.a], original[block.b]
            use = (a != b) & ~skip[a] & ~skip[b]
            for edges in verify_pairs(features, a[use], b[use], options.threshold, threads):
                builder.add(edges)
    notes = adc_notes(rule, flags, cut)
    found = PairSearch.of(features, options.threshold, seen, builder.forest(), notes)
    return dataclasses.replace(found, flags=flags)


def unverified_result(index: Index, rule: Rule, blocks: Any, threshold: float) -> PairSearch:
    """Return all candidate pairs of an index whose rows are not at hand."""
    flags, cut, pairs, builder = np.zeros(index.rows, bool), 0, [], ForestBuilder()
    for block in blocks:
        flags[block.flagged], cut = True, cut + block.cut
        edges = make_edges(block.a, block.b, np.zeros(len(block.a), np.float32))
        pairs.append(edges)
        builder.add(spanning_forest(edges))
    nothing = np.empty(0, np.int64)
    return PairSearch(
        names=[str(shard["name"]) for shard in index.manifest["shards"]],
        offsets=index.offsets,
        threshold=threshold,
        forest=builder.forest(),
        copies=nothing,
        originals=nothing,
        bad=index.bad_rows(),
        pairs=unique_edges(join_edges(pairs)),
        flags=flags,
        notes=adc_notes(rule, flags, cut),
    )


def unique_edges(edges: Edges) -> Edges:
    """Return edges without repeats, ordered by (a, b)."""
    edges = edges.where(np.lexsort((edges.b, edges.a)))
    new = np.ones(len(edges.a), bool)
    new[1:] = (np.diff(edges.a) != 0) | (np.diff(edges.b) != 0)
    return edges.where(new)


def adc_notes(rule: Rule, flags: np.ndarray, cut: int) -> dict[str, Any]:
    """Return the method's figures for the manifest."""
    return {
        "rule": rule.name,
        "margin": float(rule.margin),
        "calibration": rule.calibration,
        "flagged": int(flags.sum()),
        "cut_rows": cut,
    }


def build_in(folder: Path, features: Features, options: config.Dedup) -> Index:
    """Build an index of the features, or take the one that a stopped run finished, if it is whole.

    One whose files changed since then is built anew.
    """
    try:
        if (folder / MANIFEST).is_file():
            outputs = read_manifest(folder, "index")["outputs"].items()
            if any(atomic.sha256(folder / name) != file["sha256"] for name, file in outputs):
                shutil.rmtree(folder)
    except (SnipError, OSError, LookupError, TypeError, AttributeError):
        shutil.rmtree(folder)
    settings = config.Index(
        features=options.features,
        out=str(folder),
        encoder=options.encoder,
        threads=options.threads,
        seed=options.seed or 0,
        bad_rows=options.bad_rows,
    )
    return build(features, folder, settings)
