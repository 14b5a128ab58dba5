"""What short descriptors and codes cost on one's own features, against brute force.

Some rows are queries, others train a SNIP and an MSE encoder and the PCA; the queries and their
copies are kept from training. Then all rows are indexed by each contender, at each code size, and
what is found is compared with the exact neighbours, duplicates and partners in text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from snipdedup import config, progress
from snipdedup.adc.threshold import choose_margin, flag_curve, scores
from snipdedup.errors import SnipError
from snipdedup.evaluation.neighbours import (
    Codes,
    Neighbours,
    Vectors,
    average_precision,
    encoded,
    flat_neighbours,
    opq,
    partner_ranks,
    recall,
    sample_rows,
    true_neighbours,
)
from snipdedup.evaluation.tables import eval_page, eval_summary
from snipdedup.features.cosine import pair_cosine, unit_rows
from snipdedup.features.hashing import row_hashes
from snipdedup.features.scan import refuse_bad
from snipdedup.features.shards import Features, open_features, request_of
from snipdedup.index.kmeans import kmeans
from snipdedup.index.quantizer import (
    ITERATIONS,
    LEAST_SAMPLE,
    POINTS_A_LIST,
    default_nlist,
    train_quantiser,
)
from snipdedup.parallel import cores, library_threads
from snipdedup.statistics import proportion_interval
from snipdedup.storage import atomic, locks, out_folder

if TYPE_CHECKING:
    from snipdedup.encoder.network import Encoder

RECALL_AT = (1, 10, 100)
RULES = ("global", "ratio", "difference")
PRECISIONS = (0.81, 0.91, 0.95)
CURVE = [percent / 100 for percent in range(50, 100)]  # precisions that the picture shows
FLAG_K = 16  # neighbours looked at for a flag
OPQ_ROWS, OPQ_ROUNDS = 16_384, 10  # more rows or rounds do not move recall, and take minutes
GALLERY = 16_384  # pictures that a text is to find its own among
RESULT, PAGE, PICTURE = "eval.json", "eval.md", "curves.png"
HOW = {"features", "text_features", "out", "overwrite", "threads"}
LEAST_LEARNT = 256  # rows to learn from: as many as an 8-bit code has values


@dataclass(frozen=True)
class Contender:
    """One way to make vectors of rows.

    Attributes
    ----------
    name : str
    uncoded : function or None
        Rows to unit vectors; None where only codes are worth a look.
    coded : function of int
        The same for a code of so many bytes.
    """

    name: str
    uncoded: Vectors | None
    coded: Callable[[int], Vectors]


@locks.released()
def run(options: config.Eval) -> str:
    """Measure, write the table, the JSON and the picture; return the summary."""
    if options.picture:
        from snipdedup.evaluation.plots import need_matplotlib

        need_matplotlib()
    features, texts = open_inputs(options)
    out = Path(options.out).expanduser()
    given = [*features.inputs(), *(texts.inputs() if texts else [])]
    out_folder.refuse_output_inside(out, given)
    kept = {k: v for k, v in options.as_dict().items() if k not in HOW}
    request = {**kept, **request_of(features), "texts": request_of(texts) if texts else None}
    if out_folder.claim(out, "eval", request, overwrite=options.overwrite) == "done":
        return f"{out} is finished already with these settings; --overwrite makes it anew"
    try:
        body = evaluate(features, texts, options)
        for source in (features, texts):
            if source is not None:
                source.refuse_changed()
        files = write(out / locks.WORK / out_folder.FILES, body, options.picture)
        out_folder.publish(out, "eval", {"command": "eval", "request": request}, files)
    finally:
        out_folder.release(out)
    return f"{eval_summary(body)}\nwritten to {options.out}"


def write(out: Path, body: dict[str, Any], picture: bool) -> list[Path]:
    """Write the result in its forms; return the files."""
    files = [out / RESULT, out / PAGE]
    atomic.save_json(files[0], body)
    with atomic.replacing(files[1]) as part:
        part.write_text(eval_page(body), encoding="utf-8")
    if picture:
        from snipdedup.evaluation.plots import draw

        files.append(out / PICTURE)
        with atomic.replacing(files[-1]) as part:
            draw(body, part)
    return files


def open_inputs(options: config.Eval) -> tuple[Features, Features | None]:
    """Open features and texts, which must match row for row."""
    kinds = {"parts": options.parts, "array": options.array, "column": options.column}
    features = open_features(options.features, **kinds)
    if options.nlist > features.rows:
        raise SnipError(
            f"--nlist {options.nlist}: there are only {features.rows:,} rows; give fewer lists, or "
            "leave it away to have them chosen"
        )
    if options.text_features is None:
        return features, None
    from snipdedup.encoder.training import open_texts

    return features, open_texts(options.text_features, features)


def evaluate(features: Features, texts: Features | None, options: config.Eval) -> dict[str, Any]:
    """Return everything that was measured, as JSON values.

    Parameters
    ----------
    features : Features
        Streamed a few times; never held.
    texts : Features or None
        Row for row.
    options : settings.Eval
    """
    threads, clock = cores(options.threads), progress.Clock()
    rng = np.random.default_rng(options.seed)
    queries = sample_rows(features.rows, min(options.queries, features.rows // 4), rng)
    learn = learnable(features, queries, options.train_rows, rng)
    if len(learn) < LEAST_LEARNT:
        raise SnipError(
            f"{len(learn):,} rows are left to learn from, besides {len(queries):,} queries and "
            f"copies of these; eval needs {LEAST_LEARNT} at least: give more rows, or fewer "
            "--queries"
        )
    with clock.stage("train"):
        contenders = make_contenders(features, texts, learn, options)
    with clock.stage("truth"):
        truth = true_neighbours(features, queries, max(RECALL_AT), threads)
    judge = Judge(features, truth, options)
    for contender in contenders:
        with clock.stage(f"judge {contender.name}"):
            judge.contender(contender)
    body: dict[str, Any] = {
        "rows": features.rows,
        "dim": features.dim,
        "queries": len(queries),
        "learned_rows": len(learn),
        "duplicates": int(judge.duplicates.sum()),
        "settings": {k: v for k, v in options.as_dict().items() if k not in HOW},
        "nlist": judge.nlist,
        "neighbours": judge.neighbours,
        "budget": budget(judge.neighbours, options.nprobes()),
        "flags": judge.flags,
    }
    if texts is not None:
        with clock.stage("text"):
            body["text"] = judge_text(features, texts, queries, contenders, rng)
    return {**body, "seconds": {name: round(s, 2) for name, s in clock.seconds.items()}}


def learnable(
    features: Features, queries: np.ndarray, wanted: int, rng: np.random.Generator
) -> np.ndarray:
    """Return rows to train on, ascending: no query, and no copy of one."""
    rows = sample_rows(features.rows, wanted + len(queries), rng)
    rows = rows[~np.isin(rows, queries)]
    taken = row_hashes(features.gather(queries))
    kept = rows[~np.isin(row_hashes(features.gather(rows)), taken)]
    return kept[np.sort(rng.permutation(len(kept))[:wanted])]


def make_contenders(
    features: Features, texts: Features | None, learn: np.ndarray, options: config.Eval
) -> list[Contender]:
    """Return raw features, PCA, MSE, SNIP, and OPQ of raw features."""
    from snipdedup.encoder.network import Encoder

    raw = features.gather(learn)
    refuse_bad(features, learn, raw)
    beside = None if texts is None else texts.gather(learn)
    snip = (
        Encoder.load(Path(options.encoder).expanduser())
        if options.encoder
        else learnt(raw, beside, options, "snip")
    )
    dim = snip.dim
    if snip.dim_in != features.dim:
        raise SnipError(
            f"--encoder {options.encoder} expects rows {snip.dim_in} wide, the features are "
            f"{features.dim} wide; use the encoder of this model's features"
        )
    mse = learnt(raw, beside, options, "mse", dim)
    return contenders_of(raw, beside, snip, mse, options.seed)


def learnt(
    raw: np.ndarray, texts: np.ndarray | None, options: config.Eval, loss: str, dim: int = 0
) -> Any:
    """Return an encoder trained with the defaults of ``snip train``."""
    from snipdedup.encoder import training

    return training.train_encoder(
        raw,
        text_features=texts,
        loss=loss,
        dim=dim or min(options.dim, raw.shape[1]),
        steps=options.steps,
        threads=options.threads,
        seed=options.seed,
    )[0]


def contenders_of(
    raw: np.ndarray, texts: np.ndarray | None, snip: Encoder, mse: Encoder, seed: int
) -> list[Contender]:
    """Return the five contenders from rows to learn from and two encoders."""
    from snipdedup.encoder.directions import principal_directions

    directions = principal_directions(raw, snip.dim, texts).numpy()
    few = np.random.default_rng(seed).permutation(len(raw))[:OPQ_ROWS]
    sample = unit_rows(raw[np.sort(few)])

    def pca(rows: np.ndarray) -> np.ndarray:
        return unit_rows(unit_rows(rows) @ directions.T)

    def rotated(m: int) -> Vectors:
        if sample.shape[1] % m:
            return unit_rows  # such a code is left out
        rotation = opq(sample, m, OPQ_ROUNDS)
        return lambda rows: unit_rows(rows) @ rotation.T

    return [
        Contender("raw", unit_rows, lambda m: unit_rows),
        Contender("opq", None, rotated),
        Contender("pca", pca, lambda m: pca),
        Contender("mse", mse.encode, by_size(mse)),
        Contender("snip", snip.encode, by_size(snip)),
    ]


def by_size(encoder: Encoder) -> Callable[[int], Vectors]:
    """Return what makes the vectors for a code size, the same for the same width."""
    made: dict[int, Vectors] = {}

    def coded(m: int) -> Vectors:
        fitting = encoder.for_codes(m)
        return made.setdefault(fitting.dim, fitting.encode)

    return coded


class Judge:
    """Holds the truth, and collects what contenders keep of it.

    Attributes
    ----------
    neighbours, flags : list of dict
        One entry a measurement.
    duplicates : (q,) bool
        Which queries have another row at or above the threshold.
    nlist : int
    """

    def __init__(self, features: Features, truth: Neighbours, options: config.Eval) -> None:
        self.features, self.truth, self.options = features, truth, options
        self.threads = cores(options.threads)
        self.neighbours: list[dict[str, Any]] = []
        self.flags: list[dict[str, Any]] = []
        self.raw = features.gather(truth.queries)
        cosine = pair_cosine(self.raw, features.gather(truth.I[:, 0]))
        self.duplicates = cosine >= np.float32(options.threshold)
        wanted = max(POINTS_A_LIST * default_nlist(features.rows, features.rows), LEAST_SAMPLE)
        picked = sample_rows(features.rows, wanted, np.random.default_rng(options.seed))
        self.sample = features.gather(picked)
        self.nlist = options.nlist or default_nlist(features.rows, len(picked))
        self.fitted: tuple[Vectors, np.ndarray, np.ndarray] | None = None

    def contender(self, contender: Contender) -> None:
        """Judge one contender, without codes and at each code size."""
        most = max(RECALL_AT)
        if contender.uncoded is not None:
            found = flat_neighbours(
                self.features, self.truth.queries, most, contender.uncoded, self.threads
            )
            self.note(contender.name, None, None, found)
        for m in self.options.sizes():
            vectors = contender.coded(m)
            x = vectors(self.raw)
            if x.shape[1] % m:
                continue  # as faiss would refuse it
            codes = self.coded(vectors, m)
            with library_threads(self.threads):
                for nprobe in self.options.nprobes():
                    found = codes.neighbours(x, self.truth.queries, most, nprobe)
                    self.note(contender.name, m, nprobe, found)
                self.flagged(contender.name, m, codes, x)
            found = codes.every(x, self.truth.queries, most, self.threads)
            self.note(contender.name, m, self.nlist, found)

    def coded(self, vectors: Vectors, m: int) -> Codes:
        """Return an index of all rows in memory, its quantisers trained on a sample of them."""
        sample, centroids = self.fit(vectors)
        codes = Codes(
            train_quantiser(
                sample,
                nlist=self.nlist,
                m=m,
                nbits=8,
                seed=self.options.seed,
                threads=self.threads,
                centroids=centroids,
            )
        )
        for x in encoded(self.features, vectors, self.threads):
            codes.add(x)
        return codes

    def fit(self, vectors: Vectors) -> tuple[np.ndarray, np.ndarray]:
        """Return the sample's vectors and their coarse centroids, which code sizes share."""
        if self.fitted is None or self.fitted[0] is not vectors:
            sample = vectors(self.sample)
            seed, threads = self.options.seed, self.threads
            self.fitted = (
                vectors,
                sample,
                kmeans(sample, self.nlist, iterations=ITERATIONS, seed=seed, threads=threads),
            )
        return self.fitted[1:]

    def note(self, name: str, m: int | None, nprobe: int | None, found: Neighbours) -> None:
        """Write down the recall of one setting."""
        self.neighbours.append(
            {
                "contender": name,
                "bytes": m,
                "nprobe": nprobe,
                "recall": {str(k): round(recall(found, self.truth, k), 4) for k in RECALL_AT},
            }
        )

    def flagged(self, name: str, m: int, codes: Codes, x: np.ndarray) -> None:
        """Judge duplicate flags by the three rules."""
        D, I = codes.search(x, FLAG_K, self.options.flag_nprobe)
        D[(I < 0) | (self.truth.queries[:, None] == I)] = np.inf
        own = codes.own_errors(x)
        for rule in RULES:
            subtracted = np.zeros_like(own) if rule == "global" else own
            best = scores(D, subtracted, "ratio" if rule == "ratio" else "difference").min(axis=1)
            self.flags.append(
                {
                    "contender": name,
                    "bytes": m,
                    "rule": rule,
                    "average_precision": round(average_precision(-best, self.duplicates), 4),
                    "at": flag_points(best, self.duplicates, PRECISIONS),
                    "curve": flag_points(best, self.duplicates, CURVE),
                }
            )


def flag_points(
    best: np.ndarray, truth: np.ndarray, precisions: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the margin of highest recall at each wanted precision, and what it reaches."""
    margin, right, flagged = flag_curve(best, truth)
    points = []
    for wanted in precisions:
        point = {"wanted": wanted, "margin": 0.0, "precision": None, "recall": 0.0}
        if len(margin):
            at, good = choose_margin(right / flagged, wanted)
            recall_there = float(right[at] / max(truth.sum(), 1))
            point |= {"margin": float(margin[at]), "precision": float(right[at] / flagged[at])}
            point["recall"] = recall_there if good else 0.0
        points.append(point)
    return points


def budget(measured: list[dict[str, Any]], nprobes: list[int]) -> list[dict[str, Any]]:
    """Return where recall@10 is lost: by the encoder, by the code, by lists not visited."""
    at = {(e["contender"], e["bytes"], e["nprobe"]): e["recall"]["10"] for e in measured}
    lines = []
    for name, m in dict.fromkeys((e["contender"], e["bytes"]) for e in measured if e["bytes"]):
        uncoded = at.get((name, None, None), 1.0)
        visited = {n: v for (c, b, n), v in at.items() if (c, b) == (name, m)}
        every, usual = visited[max(visited)], visited[default_nprobe(nprobes)]
        lines.append(
            {
                "contender": name,
                "bytes": m,
                "nprobe": default_nprobe(nprobes),
                "encoder": round(1 - uncoded, 4),
                "code": round(uncoded - every, 4),
                "probes": round(every - usual, 4),
                "recall": usual,
            }
        )
    return lines


def default_nprobe(nprobes: list[int]) -> int:
    """Return the nprobe that tables show: the one in the middle, the larger of two."""
    return sorted(nprobes)[len(nprobes) // 2]


def judge_text(
    features: Features,
    texts: Features,
    queries: np.ndarray,
    contenders: list[Contender],
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Return how often texts find their picture and pictures their text, of rows not trained on.

    Both are looked for among the queries and other random rows, `GALLERY` in all.
    """
    gallery = np.union1d(queries, sample_rows(features.rows, GALLERY - len(queries), rng))
    at = np.searchsorted(gallery, queries)
    pictures, words = features.gather(gallery), texts.gather(gallery)
    refuse_bad(texts, gallery, words)
    same_picture, same_text = (
        np.unique(row_hashes(rows), return_inverse=True)[1] for rows in (pictures, words)
    )
    found = []
    for contender in contenders:
        if contender.uncoded is None:
            continue
        x, t = contender.uncoded(pictures), contender.uncoded(words)
        for direction, of, among, item in (
            ("text to image", t, x, same_picture),
            ("image to text", x, t, same_text),
        ):
            ranks = partner_ranks(of[at] @ among.T, item[at], item)
            found.append(
                {
                    "contender": contender.name,
                    "direction": direction,
                    "among": len(gallery),
                    **{str(k): share(ranks < k) for k in (1, 10)},
                }
            )
    return found


def share(hits: np.ndarray) -> dict[str, float]:
    """Return a share with the interval that so few queries leave."""
    low, high = proportion_interval(int(hits.sum()), len(hits))
    return {"recall": round(float(hits.mean()), 4), "low": round(low, 4), "high": round(high, 4)}
