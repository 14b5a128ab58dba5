"""The search methods: which pairs of rows each of them finds.

The join and brute force find pairs, with references and second features; SemDeDup's rule finds
matches inside clusters; ``adc`` takes candidate pairs of an index, verified where features are
given.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup import config
from snipdedup.adc.pairs import candidate_pairs
from snipdedup.deduplication.inputs import Inputs, References
from snipdedup.deduplication.pair_search import FoundPairs, PairSearch
from snipdedup.deduplication.result import choose
from snipdedup.deduplication.semdedup import search_semdedup
from snipdedup.errors import SnipError
from snipdedup.features.scan import Scan, scan
from snipdedup.features.shards import Features
from snipdedup.groups.keep import rank_by
from snipdedup.groups.members import Best, replace_rows
from snipdedup.groups.pairs import all_pairs, own_pairs, pairs_within
from snipdedup.index.build import build
from snipdedup.index.folder import Index
from snipdedup.index.search import query_encoder
from snipdedup.join.brute_force import exact_edges
from snipdedup.join.forest import (
    Edges,
    ForestBuilder,
    components,
    join_edges,
    make_edges,
    order_by,
    spanning_forest,
)
from snipdedup.join.model import is_readable
from snipdedup.join.pipeline import join, needed_memory
from snipdedup.join.tasks import JoinSettings
from snipdedup.join.verify import verify_pairs
from snipdedup.parallel import Stage, memory_bound
from snipdedup.progress import Clock
from snipdedup.runners.local import Local, Runner
from snipdedup.storage import atomic
from snipdedup.storage.out_folder import MANIFEST, read_manifest


class SearchSetup(NamedTuple):
    """How pairs are searched: by the join; without a ``runner`` by brute force."""

    join: JoinSettings
    threads: int
    max_memory: str | None
    work: Path  # for the files of the join's tasks
    runner: Runner | None
    stage: Stage  # times a stage by its name

    def scan(self, features: Features) -> Scan:
        """Read all rows once."""
        chunk_rows, keep_bad = self.join.chunk_rows, self.join.keep_bad
        return scan(features, chunk_rows=chunk_rows, threads=self.threads, keep_bad=keep_bad)


def search_pairs(
    inputs: Inputs, options: config.Dedup, work: Path, runner: Runner, stage: Stage
) -> PairSearch:
    """Find all pairs by the method of filled settings, or all matches by SemDeDup's rule.

    ``runner`` does the tasks of the join, which leave their files in ``work``; ``stage`` times a
    stage by its name.
    """
    features, threshold = inputs.features, options.cosine
    if options.method == "adc" or features is None:
        return search_adc(inputs, options, work, stage)
    settings = JoinSettings(
        threshold=threshold,
        recall=options.recall,
        seed=options.seed or 0,
        keep_bad=options.bad_rows == "keep",
        chunk_rows=options.chunk_rows,
        device="cpu" if options.runner == "ray" else options.device,
        encoder=None if options.encoder is None else Path(options.encoder).expanduser(),
        references_only=options.references_only,
    )
    used = None if options.method == "exact" else runner
    setup = SearchSetup(settings, options.threads, options.max_memory, work, used, stage)
    if options.method == "semdedup":
        setup = setup._replace(runner=Local(options.threads))
        keep, borders = str(options.keep), options.borders
        return search_by_cluster(inputs, features, setup, options.clusters, keep, borders=borders)
    if inputs.references is not None:
        return search_with_references(inputs, features, inputs.references, setup)
    search = PairSearch.of(inputs, features, threshold, find_pairs(features, setup))
    if not inputs.seconds:
        return search
    with stage("also"):
        scans = [setup.scan(second.features) for second in inputs.seconds]
        return match_seconds(search, features, scans, options.threads)


def find_pairs(features: Features, setup: SearchSetup) -> FoundPairs:
    """Find the pairs of some rows; of rows with references, two forests (`spanning_forest`)."""
    settings, runner = setup.join, setup.runner
    reference_rows = settings.reference_rows
    if runner is not None:
        memory = memory_bound(
            setup.max_memory, needed_memory(features, runner.here, reference_rows)
        )
        return join(features, settings, setup.work, runner, memory=memory, stage=setup.stage)
    with setup.stage("read"):
        seen = setup.scan(features)
    with setup.stage("compare"):
        rows = np.flatnonzero(~seen.skipped(features.rows, reference_rows))
        memory, builder = memory_bound(setup.max_memory), ForestBuilder(reference_rows)
        for edges in exact_edges(
            features, rows, settings.threshold, threads=setup.threads, memory=memory,
            reference_rows=reference_rows, references_only=settings.references_only,
        ):  # fmt: skip
            builder.add(edges)
    return seen, builder.forest(), {}


def search_with_references(
    inputs: Inputs, features: Features, references: References, setup: SearchSetup
) -> PairSearch:
    """Search over reference rows and features; return what concerns the features."""
    rows, first, settings, model = references.before(features), references.rows, setup.join, None
    if setup.runner is not None:
        encoder = None if settings.encoder is None else str(settings.encoder)
        same = {name: getattr(settings, name) for name in ("threshold", "recall", "seed")}
        model = references.kept_model(features.rows, **same, encoder=encoder)
        model = model if model is not None and is_readable(model) else None
    settings = dataclasses.replace(settings, reference_rows=first, kept_model=model)
    seen, forest, notes = find_pairs(rows, setup._replace(join=settings))
    if setup.runner is not None:
        notes = {**notes, "model": "fitted" if model is None else "kept"}
    with setup.stage("refer"):
        own, copies, originals, nearest = own_pairs(
            rows, first, forest, (seen.copies, seen.firsts), settings.threshold, setup.threads,
            references_only=settings.references_only, folder=setup.work / "refer",
        )  # fmt: skip
    shards = len(references.features.shards)
    bad = seen.bad[seen.bad >= first] - first
    own_scan = Scan(bad, copies, originals, seen.checksums[shards:])
    search = PairSearch.of(inputs, features, settings.threshold, (own_scan, own, notes))
    return dataclasses.replace(
        search,
        checksums={**search.checksums, "references": seen.checksums[:shards]},
        references_only=settings.references_only,
        nearest=nearest,
    )


def match_seconds(
    search: PairSearch, features: Features, scans: Sequence[Scan], threads: int
) -> PairSearch:
    """Return a search cut down to pairs that match in the second features as well.

    Each group is compared again, exact copies included: their second features may differ.
    ``scans`` are those of the second features: rows that are bad in any match nothing, and copies
    must be copies in all.
    """
    also, bad = search.inputs.also, search.bad
    row = np.union1d(search.copies, search.originals)
    label = np.unique(search.original_of(row), return_inverse=True)[1]
    for seen in scans:
        bad = np.union1d(bad, seen.bad)
        first = replace_rows(row, seen.copies, seen.firsts)
        own = np.unique(first, return_inverse=True)[1]
        label = np.unique(label * len(row) + own, return_inverse=True)[1]
    _, first, place = np.unique(label, return_index=True, return_inverse=True)
    original = row[first[place]]  # the first row that equals it in all features
    copies, originals = row[row != original], original[row != original]
    row, group = components(search.whole_forest)
    use = ~np.isin(row, bad) & ~np.isin(row, copies)
    row, group = row[use], group[use]
    order = np.lexsort((row, group))
    builder = ForestBuilder()
    for edges in pairs_within(features, row[order], group[order], search.threshold, threads, also):
        builder.add(edges)
    checksums = [checksum for seen in scans for checksum in seen.checksums]
    return dataclasses.replace(
        search, forest=builder.forest(), copies=copies, originals=originals, bad=bad,
        checksums={**search.checksums, "also": checksums},
    )  # fmt: skip


def search_by_cluster(
    inputs: Inputs,
    features: Features,
    setup: SearchSetup,
    clusters: int,
    keep: str,
    *,
    borders: bool,
) -> PairSearch:
    """Find the matches of SemDeDup's rule; with ``borders`` count what its clusters separate."""
    settings, threads, stage = setup.join, setup.threads, setup.stage
    with stage("read"):
        seen = setup.scan(features)
    best = search_semdedup(
        features, seen, clusters=clusters, keep=keep, seed=settings.seed, threads=threads,
        stage=stage,
    )  # fmt: skip
    notes: dict[str, Any] = {"clusters": len(best.centroids)}
    if borders:
        with stage("borders"):
            found = find_pairs(features, setup._replace(stage=Clock().stage))
            joined = PairSearch.of(inputs, features, settings.threshold, found)
            notes["borders"] = border_cost(features, best, joined, threads)
    found = seen, join_edges([]), notes
    search = PairSearch.of(inputs, features, settings.threshold, found)
    return dataclasses.replace(search, best=best)


def border_cost(features: Features, best: Best, search: PairSearch, threads: int) -> dict[str, int]:
    """Return what the ``search`` by the join found across borders of clusters.

    ``pairs`` and ``across`` count pairs of distinct rows; ``beside`` the rows that are kept
    although an earlier kept row is their pair; ``star`` what star would remove, ``both`` what both
    remove.
    """
    removed = best.removed(search.threshold)
    pairs, across = 0, 0
    beside = np.zeros(features.rows, bool)
    for edges in all_pairs(features, search.forest, search.threshold, threads):
        pairs += len(edges.a)
        across += int((best.cluster[edges.a] != best.cluster[edges.b]).sum())
        beside[edges.b[~removed[edges.a] & ~removed[edges.b]]] = True
    rank = rank_by("first", 0, None)
    star = choose(search, search.threshold, "star", "first", rank).is_dup
    return {
        "pairs": pairs,
        "across": across,
        "beside": int(beside.sum()),
        "star": int(star.sum()),
        "both": int((star & removed).sum()),
    }


def check_given(features: Features | None, index: str | None, encoder: str | None) -> None:
    """Refuse an index or encoder that is not there, or is of other features, before any work."""
    if index is not None:
        opened = Index(index)
        if features is not None:
            query_encoder(opened, features, encoder)
    elif encoder is not None:
        from snipdedup.encoder.network import Encoder

        network = Encoder.load(encoder, device="cpu")
        if features is not None:
            network.check_width(features, encoder)


def search_adc(inputs: Inputs, options: config.Dedup, work: Path, stage: Stage) -> PairSearch:
    """Find pairs by the adaptive threshold on the ADC distance.

    Without features pairs stay unverified, and an index must be given; with features one is built
    in ``work`` if none is given.
    """
    features, threshold, threads = inputs.features, options.cosine, options.threads
    with stage("index"):
        if options.index is not None or features is None:
            index = Index(str(options.index))
        else:
            given = {"encoder": options.encoder, "bad_rows": options.bad_rows}
            index = build_in(work / "index", features, seed=options.seed, threads=threads, **given)
    seen, pairs, builder = None, [], ForestBuilder()
    if features is not None:
        with stage("read"):
            keep_bad, chunk_rows = options.bad_rows == "keep", options.chunk_rows
            seen = scan(features, chunk_rows=chunk_rows, threads=threads, keep_bad=keep_bad)
            skip, original = seen.skipped(features.rows), np.arange(features.rows)
            original[seen.copies] = seen.firsts
    flags, cut = np.zeros(index.rows, bool), 0
    with stage("search"):
        rule, blocks = candidate_pairs(
            index, features, rule="two_sided" if options.rule == "mutual" else options.rule,
            margin=options.margin, precision=options.precision, threshold=threshold,
            calibration_rows=options.calibration_rows, seed=options.seed or 0, k=options.k,
            nprobe=options.nprobe, encoder=options.encoder, work=work, threads=threads,
        )  # fmt: skip
        for block in blocks:
            flags[block.flagged], cut = True, cut + block.cut
            if features is None:
                edges = make_edges(block.a, block.b, np.zeros(len(block.a), np.float32))
                pairs.append(edges)
                builder.add(spanning_forest(edges))
                continue
            a, b = original[block.a], original[block.b]
            use = (a != b) & ~skip[a] & ~skip[b]
            for edges in verify_pairs(features, a[use], b[use], threshold, threads):
                builder.add(edges)
    notes = {
        "rule": rule.name,
        "margin": float(rule.margin),
        "calibration": rule.calibration,
        "flagged": int(flags.sum()),
        "cut_rows": cut,
    }
    forest = builder.forest()
    if features is not None and seen is not None:
        found = PairSearch.of(inputs, features, threshold, (seen, forest, notes))
        return dataclasses.replace(found, flags=flags)
    none, names_ = np.empty(0, np.int64), [str(entry["name"]) for entry in index.manifest["shards"]]
    return PairSearch(
        names_, index.offsets, threshold, forest, none, none, index.bad_rows(), inputs,
        pairs=unique_edges(join_edges(pairs)), flags=flags, notes=notes,
    )  # fmt: skip


def unique_edges(edges: Edges) -> Edges:
    """Return edges without repeats, ordered by (a, b)."""
    edges = edges.where(order_by(edges.a, edges.b))
    new = np.ones(len(edges.a), bool)
    new[1:] = (np.diff(edges.a) != 0) | (np.diff(edges.b) != 0)
    return edges.where(new)


def build_in(folder: Path, features: Features, **settings: Any) -> Index:
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
    return build(features, folder, config.BuildIndex(features=None, out=str(folder), **settings))
