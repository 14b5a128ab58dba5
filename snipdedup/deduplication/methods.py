"""The search methods: which pairs of rows each of them finds.

The join and brute force find pairs, with references and captions; SemDeDup's rule finds matches
inside clusters; ``adc`` takes candidate pairs of an index, verified where features are given.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
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
from snipdedup.groups.members import Best
from snipdedup.groups.pairs import all_pairs, own_pairs, pairs_within
from snipdedup.groups.star import Also
from snipdedup.index.build import build
from snipdedup.index.folder import Index
from snipdedup.index.search import query_space
from snipdedup.join.brute_force import exact_edges
from snipdedup.join.forest import (
    Edges,
    ForestBuilder,
    components,
    join_edges,
    make_edges,
    spanning_forest,
)
from snipdedup.join.memory import needed_memory
from snipdedup.join.model import is_readable
from snipdedup.join.pipeline import join
from snipdedup.join.tasks import JoinSettings
from snipdedup.join.verify import verify_pairs
from snipdedup.parallel import Stage, memory_bound
from snipdedup.progress import Clock
from snipdedup.runners.local import Local, Runner
from snipdedup.storage import atomic
from snipdedup.storage.out_folder import MANIFEST, read_manifest


@dataclass(frozen=True)
class SearchSettings:
    """What a search is asked for, and how it may compute; the names are those of `Dedup`."""

    method: str
    threshold: float
    recall: float
    seed: int
    keep_bad: bool  # leave out rows that cannot be compared, instead of refusing them
    references_only: bool
    encoder: Path | None
    clusters: int  # of SemDeDup's rule, as are the next two
    keep: str
    borders: bool
    index: str | None  # of the adaptive threshold, as are the next six
    rule: str
    margin: float | None
    precision: float
    calibration_rows: int
    k: int
    nprobe: int
    chunk_rows: int
    threads: int
    max_memory: str | None
    device: str

    def scan(self, features: Features) -> Scan:
        """Read all rows once."""
        return scan(
            features, chunk_rows=self.chunk_rows, threads=self.threads, keep_bad=self.keep_bad
        )


def search_pairs(
    inputs: Inputs, settings: SearchSettings, work: Path, runner: Runner | None, stage: Stage
) -> PairSearch:
    """Find all pairs by the method asked for, or all matches by SemDeDup's rule.

    The tasks of the join leave their files in ``work``; ``runner`` does them, or threads of this
    process. ``stage`` times a stage by its name.
    """
    features = inputs.features
    if settings.method == "adc" or features is None:
        return search_adc(features, settings, work, stage)
    if settings.method == "semdedup":
        return find_matches(features, settings, work, stage)
    if inputs.references is not None:
        return find_beside(inputs.references, features, settings, work, runner, stage)
    found = find_pairs(features, settings, work, runner, stage)
    search = PairSearch.of(features, settings.threshold, *found)
    if inputs.text is None or inputs.also is None:
        return search
    with stage("captions"):
        texts = settings.scan(inputs.text)
        search = match_captions(search, features, texts, inputs.also, settings.threads)
    return dataclasses.replace(search, text_checksums=texts.checksums)


def find_pairs(
    features: Features,
    settings: SearchSettings,
    work: Path,
    runner: Runner | None,
    stage: Stage,
    *,
    reference_rows: int = 0,
    model: Path | None = None,
) -> tuple[Scan, Edges, dict[str, Any]]:
    """Find the pairs of some rows; those among the first ``reference_rows`` are not wanted.

    Return the scan, the forest (see `forest.spanning_forest`), and figures for the manifest.
    """
    references_only = settings.references_only and reference_rows > 0
    if settings.method != "exact":
        runner = runner or Local(settings.threads)
        asked = JoinSettings(
            threshold=settings.threshold,
            recall=settings.recall,
            seed=settings.seed,
            keep_bad=settings.keep_bad,
            chunk_rows=settings.chunk_rows,
            device=settings.device,
            reference_rows=reference_rows,
            references_only=references_only,
            encoder=settings.encoder,
            kept_model=model,
        )
        need = needed_memory(features, runner.here, reference_rows)
        memory = memory_bound(settings.max_memory, need)
        return join(features, asked, work, runner, memory=memory, stage=stage)
    with stage("read"):
        seen = settings.scan(features)
    with stage("compare"):
        rows = np.flatnonzero(~seen.skipped(features.rows, reference_rows))
        builder = ForestBuilder(reference_rows)
        for edges in exact_edges(
            features, rows, settings.threshold, threads=settings.threads,
            memory=memory_bound(settings.max_memory), reference_rows=reference_rows,
            references_only=references_only,
        ):  # fmt: skip
            builder.add(edges)
    return seen, builder.forest(), {}


def find_beside(
    references: References, features: Features, settings: SearchSettings, work: Path,
    runner: Runner | None, stage: Stage,
) -> PairSearch:  # fmt: skip
    """Search over reference rows and features; return what concerns the features."""
    rows, first, model = references.before(features), references.rows, None
    if settings.method == "join":
        encoder = None if settings.encoder is None else str(settings.encoder)
        same = {name: getattr(settings, name) for name in ("threshold", "recall", "seed")}
        model = references.kept_model(features.rows, **same, encoder=encoder)
        model = model if model is not None and is_readable(model) else None
    seen, forest, notes = find_pairs(
        rows, settings, work, runner, stage, reference_rows=first, model=model
    )
    if settings.method == "join":
        notes = {**notes, "model": "fitted" if model is None else "kept"}
    with stage("refer"):
        own, copies, originals, nearest = own_pairs(
            rows, first, forest, (seen.copies, seen.firsts), settings.threshold, settings.threads,
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
    text = row.copy()
    at = np.flatnonzero(np.isin(row, texts.copies))
    text[at] = texts.firsts[np.searchsorted(texts.copies, row[at])]
    order = np.lexsort((row, text, image))
    row, image, text = row[order], image[order], text[order]
    new = np.ones(len(row), bool)
    new[1:] = (image[1:] != image[:-1]) | (text[1:] != text[:-1])
    original = row[new][np.cumsum(new) - 1] if len(row) else row
    order = np.argsort(row[~new])
    return row[~new][order], original[~new][order]


def find_matches(
    features: Features, settings: SearchSettings, work: Path, stage: Stage
) -> PairSearch:
    """Find by SemDeDup's rule, and count what the borders of its clusters cost."""
    with stage("read"):
        seen = settings.scan(features)
    best = search_semdedup(
        features,
        seen,
        clusters=settings.clusters,
        keep=settings.keep,
        seed=settings.seed,
        threads=settings.threads,
        stage=stage,
    )
    notes: dict[str, Any] = {"clusters": len(best.centroids)}
    if settings.borders:
        with stage("borders"):
            notes["borders"] = border_cost(features, best, settings, work)
    search = PairSearch.of(features, settings.threshold, seen, join_edges([]), notes)
    return dataclasses.replace(search, best=best)


def border_cost(
    features: Features, best: Best, settings: SearchSettings, work: Path
) -> dict[str, int]:
    """Return what the join finds across borders of clusters.

    ``pairs`` and ``across`` count pairs of distinct rows; ``beside`` the rows that are kept
    although an earlier kept row is their pair; ``star`` what star would remove, ``both`` what both
    remove.
    """
    found = find_pairs(features, settings, work, None, Clock().stage)
    search = PairSearch.of(features, settings.threshold, *found)
    removed = best.removed(settings.threshold)
    pairs, across = 0, 0
    beside = np.zeros(features.rows, bool)
    for edges in all_pairs(features, search.forest, settings.threshold, settings.threads):
        pairs += len(edges.a)
        across += int((best.cluster[edges.a] != best.cluster[edges.b]).sum())
        beside[edges.b[~removed[edges.a] & ~removed[edges.b]]] = True
    rank = rank_by("first", 0, None)
    star = choose(search, features, settings.threshold, "star", "first", rank).is_dup
    return {
        "pairs": pairs,
        "across": across,
        "beside": int(beside.sum()),
        "star": int(star.sum()),
        "both": int((star & removed).sum()),
    }


def check_given(features: Features | None, settings: SearchSettings) -> None:
    """Refuse an index or encoder that is not there, or is of other features, before any work."""
    if settings.index is not None:
        index = Index(settings.index)
        if features is not None:
            query_space(index, features, settings.encoder)
    elif settings.encoder is not None:
        from snipdedup.encoder.network import Encoder

        encoder = Encoder.load(settings.encoder, device="cpu")
        if features is not None:
            encoder.check_width(features, str(settings.encoder))


def search_adc(
    features: Features | None, settings: SearchSettings, work: Path, stage: Stage
) -> PairSearch:
    """Find pairs by the adaptive threshold on the ADC distance.

    Without features pairs stay unverified, and an index must be given; with features one is built
    in ``work`` if none is given.
    """
    with stage("index"):
        if settings.index is not None or features is None:
            index = Index(str(settings.index))
        else:
            index = build_in(work / "index", features, settings)
    seen, pairs, builder = None, [], ForestBuilder()
    if features is not None:
        with stage("read"):
            seen = settings.scan(features)
            skip, original = seen.skipped(features.rows), np.arange(features.rows)
            original[seen.copies] = seen.firsts
    flags, cut = np.zeros(index.rows, bool), 0
    with stage("search"):
        names = ("rule", "margin", "precision", "threshold", "calibration_rows", "seed", "k")
        asked = {name: getattr(settings, name) for name in (*names, "nprobe", "encoder", "threads")}
        rule, blocks = candidate_pairs(index, features, **asked, work=work)
        for block in blocks:
            flags[block.flagged], cut = True, cut + block.cut
            if features is None:
                edges = make_edges(block.a, block.b, np.zeros(len(block.a), np.float32))
                pairs.append(edges)
                builder.add(spanning_forest(edges))
                continue
            a, b = original[block.a], original[block.b]
            use = (a != b) & ~skip[a] & ~skip[b]
            for edges in verify_pairs(
                features, a[use], b[use], settings.threshold, settings.threads
            ):
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
        found = PairSearch.of(features, settings.threshold, seen, forest, notes)
        return dataclasses.replace(found, flags=flags)
    none, names_ = np.empty(0, np.int64), [str(entry["name"]) for entry in index.manifest["shards"]]
    return PairSearch(
        names_, index.offsets, settings.threshold, forest, none, none, index.bad_rows(),
        pairs=unique_edges(join_edges(pairs)), flags=flags, notes=notes,
    )  # fmt: skip


def unique_edges(edges: Edges) -> Edges:
    """Return edges without repeats, ordered by (a, b)."""
    edges = edges.where(np.lexsort((edges.b, edges.a)))
    new = np.ones(len(edges.a), bool)
    new[1:] = (np.diff(edges.a) != 0) | (np.diff(edges.b) != 0)
    return edges.where(new)


def build_in(folder: Path, features: Features, settings: SearchSettings) -> Index:
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
    options = config.Index(
        features=None,
        out=str(folder),
        encoder=None if settings.encoder is None else str(settings.encoder),
        threads=settings.threads,
        seed=settings.seed,
        bad_rows="keep" if settings.keep_bad else "refuse",
    )
    return build(features, folder, options)
