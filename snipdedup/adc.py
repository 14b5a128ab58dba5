"""Method ``adc`` of the chain: pairs by the index, verified on raw rows where they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import settings
from snipdedup.compute import Stage, cores
from snipdedup.forest import Edges, ForestBuilder, join_edges, make_edges, spanning_forest
from snipdedup.index import Index, build
from snipdedup.result import Found
from snipdedup.scan import scan
from snipdedup.search import Adc, adc_candidates, query_space
from snipdedup.shards import Features
from snipdedup.verify import verify_pairs


def search_adc(
    features: Features | None, options: settings.Dedup, work: Path, stage: Stage
) -> Found:
    """Find pairs by the adaptive threshold on the ADC distance.

    Parameters
    ----------
    features : Features or None
        Without them pairs stay unverified, and an index must be given.
    options : settings.Dedup
    work : Path
        Where an index is built if none is given.
    stage : function of str
        Times a stage.
    """
    with stage("index"):
        index = open_or_build(features, options, work)
    if features is None:
        return unverified(index, options, stage)
    threads = cores(options.threads)
    with stage("read"):
        seen = scan(
            features,
            chunk_rows=options.chunk_rows,
            threads=threads,
            keep_bad=options.bad_rows == "keep",
        )
    with stage("search"):
        adc = adc_candidates(index, features, options)
        builder = ForestBuilder()
        skip = seen.skipped(features.rows)
        first = np.arange(features.rows)
        first[seen.copies] = seen.firsts
        for pair in adc.pairs():
            a, b = first[pair[0]], first[pair[1]]
            open_ = (a != b) & ~skip[a] & ~skip[b]
            for edges in verify_pairs(features, a[open_], b[open_], options.threshold, threads):
                builder.add(edges)
    return Found(
        names=[shard.path.name for shard in features.shards],
        offsets=features.offsets,
        threshold=options.threshold,
        forest=builder.forest(),
        copies=seen.copies,
        firsts=seen.firsts,
        bad=seen.bad,
        crcs=seen.crcs,
        flags=adc.flags,
        notes=describe(adc),
    )


def check_given(features: Features | None, options: settings.Dedup) -> None:
    """Refuse an index or encoder that cannot be used, before any work.

    Raises
    ------
    SnipError
        If it is not there, or is of other features.
    """
    if options.index is not None:
        index = Index.open(options.index)
        if features is not None:
            query_space(index, features, options.encoder)
    elif options.encoder is not None:
        from snipdedup.encoder import Encoder

        Encoder.load(options.encoder, device="cpu")


def open_or_build(features: Features | None, options: settings.Dedup, work: Path) -> Index:
    """Open the index given, or build one of the features."""
    if options.index is not None or features is None:
        return Index.open(str(options.index))
    asked = settings.Index(
        features=options.features,
        out=str(work / "index"),
        encoder=options.encoder,
        threads=options.threads,
        seed=options.seed or 0,
        bad_rows=options.bad_rows,
    )
    return build(features, work / "index", asked)[0]


def unverified(index: Index, options: settings.Dedup, stage: Stage) -> Found:
    """Group what passes in an index whose rows are not at hand."""
    with stage("search"):
        adc = adc_candidates(index, None, options)
        pairs, builder = [], ForestBuilder()
        for a, b in adc.pairs():
            edges = make_edges(a, b, np.zeros(len(a), np.float32))
            pairs.append(edges)
            builder.add(spanning_forest(edges))
    nothing = np.empty(0, np.int64)
    return Found(
        names=[str(shard["name"]) for shard in index.manifest["shards"]],
        offsets=index.offsets,
        threshold=options.threshold,
        forest=builder.forest(),
        copies=nothing,
        firsts=nothing,
        bad=index.bad_rows(),
        pairs=unique_edges(join_edges(pairs)),
        flags=adc.flags,
        notes=describe(adc),
    )


def unique_edges(edges: Edges) -> Edges:
    """Return edges without repeats, ordered by (a, b)."""
    edges = edges.where(np.lexsort((edges.b, edges.a)))
    new = np.ones(len(edges.a), bool)
    new[1:] = (np.diff(edges.a) != 0) | (np.diff(edges.b) != 0)
    return edges.where(new)


def describe(adc: Adc) -> dict[str, Any]:
    """Return the method's figures for the manifest."""
    return {
        "rule": adc.rule,
        "margin": float(adc.margin),
        "calibration": adc.calibration,
        "flagged": int(adc.flags.sum()),
        "cut_rows": adc.cut,
    }
