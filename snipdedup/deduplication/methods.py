"""The search methods: which pairs of rows each of them finds.

The join and brute force find pairs, with references and captions; SemDeDup's rule finds matches
inside clusters; ``adc`` takes candidate pairs of an index, verified where features are given.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import config
from snipdedup.adc.pairs import candidate_pairs
from snipdedup.deduplication.inputs import Inputs, References
from snipdedup.deduplication.pair_search import PairSearch
from snipdedup.deduplication.result import choose
from snipdedup.deduplication.semdedup import search_semdedup
from snipdedup.errors import SnipError
from snipdedup.features.scan import Scan, scan
from snipdedup.features.shards import Features
from snipdedup.groups.keep import rank_by
from snipdedup.groups.members import Best, replace_rows
from snipdedup.groups.pairs import all_pairs, own_pairs, pairs_within
from snipdedup.groups.star import Also
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


def search_pairs(
    inputs: Inputs, options: config.Dedup, work: Path, runner: Runner | None, stage: Stage
) -> PairSearch:
    """Find all pairs by the method of filled settings, or all matches by SemDeDup's rule.

    The tasks of the join leave their files in ``work``; ``runner`` does them, or threads of this
    process. ``stage`` times a stage by its name.
    """
    features, threads, memory = inputs.features, options.threads, options.max_memory
    if options.method == "adc" or features is None:
        return search_adc(features, options, work, stage)
    settings = JoinSettings(
        threshold=options.threshold,
        recall=options.recall,
        seed=options.seed or 0,
        keep_bad=options.bad_rows == "keep",
        chunk_rows=options.chunk_rows,
        device="cpu" if options.runner == "ray" else options.device,
        encoder=None if options.encoder is None else Path(options.encoder).expanduser(),
    )
    if options.method == "semdedup":
        with stage("read"):
            seen = scan_rows(features, settings, threads)
        clusters, keep, seed = options.clusters, str(options.keep), settings.seed
        best = search_semdedup(
            features, seen, clusters=clusters, keep=keep, seed=seed, threads=threads, stage=stage
        )
        notes: dict[str, Any] = {"clusters": len(best.centroids)}
        if options.borders:
            with stage("borders"):
                runner, untimed = Local(threads), Clock().stage
                found = find_pairs(features, settings, threads, memory, work, runner, untimed)
                joined = PairSearch.of(features, settings.threshold, *found)
                notes["borders"] = border_cost(features, best, joined, threads)
        search = PairSearch.of(features, settings.threshold, seen, join_edges([]), notes)
        return dataclasses.replace(search, best=best)
    runner = None if options.method == "exact" else runner or Local(threads)
    if inputs.references is not None:
        settings = dataclasses.replace(settings, references_only=options.references_only)
        return find_beside(
            inputs.references, features, settings, threads, memory, work, runner, stage
        )
    found = find_pairs(features, settings, threads, memory, work, runner, stage)
    search = PairSearch.of(features, settings.threshold, *found)
    if inputs.text is None or inputs.also is None:
        return search
    with stage("captions"):
        texts = scan_rows(inputs.text, settings, threads)
        search = match_captions(search, features, texts, inputs.also, threads)
    return dataclasses.replace(search, text_checksums=texts.checksums)


def scan_rows(features: Features, settings: JoinSettings, threads: int) -> Scan:
    """Read all rows once."""
    chunk_rows, keep_bad = settings.chunk_rows, settings.keep_bad
    return scan(features, chunk_rows=chunk_rows, threads=threads, keep_bad=keep_bad)


def find_pairs(
    features: Features,
    settings: JoinSettings,
    threads: int,
    max_memory: str | None,
    work: Path,
    runner: Runner | None,
    stage: Stage,
) -> tuple[Scan, Edges, dict[str, Any]]:
    """Find the pairs of some rows by the join; without a ``runner`` by brute force.

    Return the scan, the forest (see `forest.spanning_forest`), and figures for the manifest.
    """
    reference_rows = settings.reference_rows
    if runner is not None:
        memory = memory_bound(max_memory, needed_memory(features, runner.here, reference_rows))
        return join(features, settings, work, runner, memory=memory, stage=stage)
    with stage("read"):
        seen = scan_rows(features, settings, threads)
    with stage("compare"):
        rows = np.flatnonzero(~seen.skipped(features.rows, reference_rows))
        builder = ForestBuilder(reference_rows)
        for edges in exact_edges(
            features, rows, settings.threshold, threads=threads, memory=memory_bound(max_memory),
            reference_rows=reference_rows, references_only=settings.references_only,
        ):  # fmt: skip
            builder.add(edges)
    return seen, builder.forest(), {}


def find_beside(
    references: References,
    features: Features,
    settings: JoinSettings,
    threads: int,
    max_memory: str | None,
    work: Path,
    runner: Runner | None,
    stage: Stage,
) -> PairSearch:
    """Search over reference rows and features; return what concerns the features."""
    rows, first, model = references.before(features), references.rows, None
    if runner is not None:
        encoder = None if settings.encoder is None else str(settings.encoder)
        same = {name: getattr(settings, name) for name in ("threshold", "recall", "seed")}
        model = references.kept_model(features.rows, **same, encoder=encoder)
        model = model if model is not None and is_readable(model) else None
    settings = dataclasses.replace(settings, reference_rows=first, kept_model=model)
    seen, forest, notes = find_pairs(rows, settings, threads, max_memory, work, runner, stage)
    if runner is not None:
        notes = {**notes, "model": "fitted" if model is None else "kept"}
    with stage("refer"):
        own, copies, originals, nearest = own_pairs(
            rows, first, forest, (seen.copies, seen.firsts), settings.threshold, threads,
            references_only=settings.references_only, folder=work / "refer",
        )  # fmt: skip
    shards = len(references.features.shards)
    bad = seen.bad[seen.bad >= first] - first
    own_scan = Scan(bad, copies, originals, seen.checksums[shards:])
    return dataclasses.replace(
        PairSearch.of(features, settings.threshold, own_scan, own, notes),
        references=references,
        reference_checksums=seen.checksums[:shards],
        references_only=settings.references_only,
        nearest=nearest,
    )


def match_captions(
    search: PairSearch, features: Features, texts: Scan, also: Also, threads: int
) -> PairSearch:
    """Return a search of images cut down to pairs whose captions match as well.

    Each group of images is compared again, exact copies included: their captions may differ.
    ``texts`` is the scan of the captions: bad rows match nothing, copies must be copies there too.
    """
    bad = np.union1d(search.bad, texts.bad)
    copies, originals = common_copies(search, texts)
    row, group = components(search.whole_forest)
    use = ~np.isin(row, bad) & ~np.isin(row, copies)
    row, group = row[use], group[use]
    order = np.lexsort((row, group))
    builder = ForestBuilder()
    for edges in pairs_within(features, row[order], group[order], search.threshold, threads, also):
        builder.add(edges)
    return dataclasses.replace(
        search, forest=builder.forest(), copies=copies, originals=originals, bad=bad, also=also
    )


def common_copies(search: PairSearch, texts: Scan) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that are copies in image and caption, ascending, and each one's original."""
    row = np.union1d(search.copies, search.originals)
    image = search.original_of(row)
    text = replace_rows(row, texts.copies, texts.firsts)
    order = np.lexsort((row, text, image))
    row, image, text = row[order], image[order], text[order]
    new = np.ones(len(row), bool)
    new[1:] = (image[1:] != image[:-1]) | (text[1:] != text[:-1])
    original = row[new][np.cumsum(new) - 1] if len(row) else row
    order = np.argsort(row[~new])
    return row[~new][order], original[~new][order]


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
    star = choose(search, features, search.threshold, "star", "first", rank).is_dup
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


def search_adc(
    features: Features | None, options: config.Dedup, work: Path, stage: Stage
) -> PairSearch:
    """Find pairs by the adaptive threshold on the ADC distance.

    Without features pairs stay unverified, and an index must be given; with features one is built
    in ``work`` if none is given.
    """
    threshold, threads = options.threshold, options.threads
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
        found = PairSearch.of(features, threshold, seen, forest, notes)
        return dataclasses.replace(found, flags=flags)
    none, names_ = np.empty(0, np.int64), [str(entry["name"]) for entry in index.manifest["shards"]]
    return PairSearch(
        names_, index.offsets, threshold, forest, none, none, index.bad_rows(),
        pairs=unique_edges(join_edges(pairs)), flags=flags, notes=notes,
    )  # fmt: skip


def unique_edges(edges: Edges) -> Edges:
    """Return edges without repeats, ordered by (a, b)."""
    edges = edges.where(np.lexsort((edges.b, edges.a)))
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
