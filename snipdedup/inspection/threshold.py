"""``snip threshold``: what each threshold would do to features of unknown origin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.config import Threshold
from snipdedup.deduplication.inputs import open_metadata_of
from snipdedup.errors import SnipError
from snipdedup.evaluation.similarities import BINS, CUTS, Similarities, compare, find_valley
from snipdedup.features.cosine import bad_rows
from snipdedup.features.origin import origin_of
from snipdedup.features.shards import Features, open_features
from snipdedup.inspection import display
from snipdedup.parallel import cores
from snipdedup.statistics import sample_rows
from snipdedup.storage.atomic import replacing
from snipdedup.storage.out_folder import refuse_output_file

TABLE = (*(n / 20 for n in range(6, 20)), 0.97, 0.98, 0.99)  # thresholds of the table, at most
QUANTILES = {"5 %": 5, "median": 50, "95 %": 95, "99.9 %": 99.9}


@dataclass(frozen=True)
class ThresholdAdvice:
    """What ``snip threshold`` found; shares are of rows or pairs."""

    rows: int
    pool: int  # rows that the sample was compared with
    sample: int
    quantiles: dict[str, dict[str, float]]  # of cosines, by kind of pair
    levels: list[dict[str, float]]  # of each threshold, see `Similarities.at`
    valley: float | None
    suggestion: float | None
    reason: str
    page: Path | None = None  # the page that was written

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows: {self.sample:,} drawn, each compared with {self.pool:,}"]
        lines += ["", "  cosines of" + "".join(f"{name:>10}" for name in QUANTILES)]
        for kind, values in self.quantiles.items():
            lines.append(
                f"  {kind:<18}".ljust(12) + "".join(f"{v:>10.3f}" for v in values.values())
            )
        lines[2] = "  cosines of        " + "".join(f"{name:>10}" for name in QUANTILES)
        labelled = "f1" in self.levels[0] if self.levels else False
        head = "  threshold   random pairs   rows with a match   would go"
        lines += ["", head + "           precision   recall      F1   right" * labelled]
        for one in self.levels:
            mark = "*" if one["threshold"] == self.suggestion else " "
            text = f"{mark} {one['threshold']:>9.3f}   {one['random']:>12.2e}   "
            text += f"{one['matched']:>17.1%}   {one['removed']:>8.1%} ± {one['error']:<4.1%}"
            names = ("precision", "recall", "f1", "right") if labelled else ()
            lines.append(text + "  ".join(["", *(f"{one[name]:>8.3f}" for name in names)]).rstrip())
        found = "none" if self.suggestion is None else f"{self.suggestion:.3f}"
        lines += ["", f"suggested threshold: {found}", f"  {self.reason}"]
        return "\n".join(lines + ([f"written to {self.page}"] if self.page else []))

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {**vars(self), "page": None if self.page is None else str(self.page)}


def run(options: Threshold) -> ThresholdAdvice:
    """Run ``snip threshold``."""
    if options.html is not None:
        display.require("jinja2", "--html")
    features = open_features(options.features, **options.some("parts", "array", "column"))
    page = None if options.html is None else Path(options.html).expanduser()
    if page is not None:
        refuse_output_file(page, features.inputs())
    rng = np.random.default_rng(options.seed)
    pool = sample_rows(features.rows, options.pool, rng)
    sample = pool[sample_rows(len(pool), options.sample, rng)]
    sample = sample[~bad_rows(features.gather(sample))]
    if len(sample) < 2:
        raise SnipError(f"expected two rows or more that can be compared, found {len(sample)}")
    labels = None
    if options.same is not None:
        labels = read_labels(options.metadata, options.same, options.features, features, pool)
    found = compare(features, pool, sample, cores(options.threads), labels)
    if found.same is not None and not found.same.any():
        raise SnipError(
            f"--same {options.same}: no row of the sample shares its value with another"
        )
    advice = advise(found, features.rows, len(pool), origin_of(options.features))
    if page is None:
        return advice
    advice = ThresholdAdvice(**{**vars(advice), "page": page})
    text = display.render_page(
        "threshold.html.j2", advice=advice, charts=charts(found), title=page.stem
    )
    with replacing(page) as part:
        part.write_text(text, encoding="utf-8")
    return advice


def read_labels(
    metadata: str | None, column: str, source: Any, features: Features, rows: np.ndarray
) -> np.ndarray:
    """Return a number for each of some ascending rows, (n,) int64, by their values in a column.

    Rows without a value have -1.
    """
    table = open_metadata_of(metadata, source, features, None)
    if table is None:
        raise SnipError("--same names a column of the metadata: give --metadata too")
    texts = table.take(table.require_column(column, [column], "--same"), rows).combine_chunks()
    return np.asarray(texts.dictionary_encode().indices.fill_null(-1).to_numpy(), np.int64)


def advise(found: Similarities, rows: int, pool: int, origin: Any) -> ThresholdAdvice:
    """Choose: by labels, else by the valley of nearest neighbours' cosines, else not at all."""
    kinds = by_kind(found)
    quantiles = {kind: quantiles_of(counts) for kind, counts in kinds.items()}
    valley, chance = find_valley(found.nearest()), quantiles["random pairs"]["99.9 %"]
    if found.same is not None:
        best = found.best()
        suggestion: float | None = best["threshold"]
        reason = (
            f"best F1 over pairs, {best['f1']:.3f}: at it, {best['precision']:.1%} of the pairs "
            f"have one label, and {best['recall']:.1%} of the pairs with one label are found"
        )
    elif valley is not None:
        suggestion = valley
        reason = (
            "nearest neighbours are of two kinds: few have this cosine, more have a lower or a "
            "higher one; look at pairs on both sides before you trust it"
        )
    else:
        suggestion = None
        reason = (
            "nearest neighbours are of one kind: their cosines have no valley, so they alone do "
            f"not tell. One random pair in 1,000 reaches {chance:.3f}. Search at a low threshold, "
            "look at pairs (snip report), or judge some (snip audit --sheet): docs/threshold.md"
        )
    if origin is not None:
        reason += f"; usual for {origin.model}: {origin.threshold:g}"
    usual = quantiles["random pairs"]["95 %"]  # below it, a threshold is not worth a line
    shown = {t for t in TABLE if t >= usual} | ({suggestion} if suggestion is not None else set())
    levels = [found.at(t) for t in sorted(shown)]
    return ThresholdAdvice(
        rows, pool, len(found.counts), quantiles, levels, valley, suggestion, reason
    )


def by_kind(found: Similarities) -> dict[str, np.ndarray]:
    """Return how many pairs of each kind lie in each bin, (BINS,) int64 each."""
    kinds = {
        "random pairs": found.counts.sum(axis=0, dtype=np.int64),
        "nearest neighbours": np.bincount(found.nearest(), minlength=BINS),
    }
    if found.same is not None:
        kinds["same label"] = found.same.sum(axis=0, dtype=np.int64)
    return kinds


def quantiles_of(counts: np.ndarray) -> dict[str, float]:
    """Return some quantiles of cosines that are counted in bins."""
    part = np.cumsum(counts) / max(int(counts.sum()), 1)
    return {name: float(CUTS[np.searchsorted(part, q / 100)]) for name, q in QUANTILES.items()}


def charts(found: Similarities) -> dict[str, Any]:
    """Return a histogram of each kind of pairs, all on one axis."""
    kinds = by_kind(found)
    start = min(int(np.flatnonzero(counts)[0]) for counts in kinds.values())
    start = min(start, BINS - 2)
    return {
        kind: display.bar_chart(display.similarity_bars(CUTS[start:], counts[start:]))
        for kind, counts in kinds.items()
    }
