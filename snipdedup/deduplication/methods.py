"""The search methods: which pairs of rows each of them finds.

The join and brute force find pairs, with references and captions; SemDeDup's rule finds matches
inside clusters. Method ``adc`` is in `adc_method`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.deduplication.inputs import Inputs
from snipdedup.deduplication.pair_search import PairSearch
from snipdedup.deduplication.references import References, own_pairs
from snipdedup.deduplication.result import choose
from snipdedup.deduplication.semdedup import search_semdedup
from snipdedup.features.scan import Scan, scan
from snipdedup.features.shards import Features
from snipdedup.groups.keep import rank_by
from snipdedup.groups.members import Best
from snipdedup.groups.pairs import all_pairs, pairs_within
from snipdedup.groups.star import Also
from snipdedup.join.brute_force import exact_edges
from snipdedup.join.forest import Edges, ForestBuilder, components, join_edges
from snipdedup.join.memory import needed_memory
from snipdedup.join.model import is_readable
from snipdedup.join.pipeline import join
from snipdedup.join.tasks import JoinSettings
from snipdedup.parallel import Stage, memory_bound
from snipdedup.progress import Clock
from snipdedup.runners.base import Runner
from snipdedup.runners.local import Local


@dataclass(frozen=True)
class SearchSettings:
    """What a search is asked for, and how it may compute.

    ``clusters``, ``keep`` and ``borders`` are for SemDeDup's rule.
    """

    method: str
    threshold: float
    recall: float
    seed: int
    keep_bad: bool
    references_only: bool
    encoder: Path | None
    clusters: int
    keep: str
    borders: bool
    chunk_rows: int
    threads: int
    max_memory: str | None
    device: str

    def scan(self, features: Features) -> Scan:
        """Read all rows once."""
        return scan(
            features, chunk_rows=self.chunk_rows, threads=self.threads, keep_bad=self.keep_bad
        )


def search_features(
    inputs: Inputs, features: Features, settings: SearchSettings, work: Path, runner: Runner | None,
    stage: Stage,
) -> PairSearch:  # fmt: skip
    """Find all pairs by the join or by brute force, or all matches by SemDeDup's rule.

    The tasks of the join leave their files in ``work``; ``runner`` does them, or threads of this
    process. ``stage`` times a stage by its name.
    """
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
    joins = settings.method == "join"
    if joins:
        model = references.kept_model(
            features.rows,
            threshold=settings.threshold,
            recall=settings.recall,
            seed=settings.seed,
            encoder=None if settings.encoder is None else str(settings.encoder),
        )
        model = model if model is not None and is_readable(model) else None
    seen, forest, notes = find_pairs(
        rows, settings, work, runner, stage, reference_rows=first, model=model
    )
    if joins:
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
