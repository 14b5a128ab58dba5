"""``snip eval``: what short descriptors and codes cost on one's own features, against brute force.

Some rows are queries, others train a SNIP and an MSE encoder and the PCA; the queries and their
copies are kept from training. Then all rows are indexed by each contender, at each code size, and
what is found is compared with the exact neighbours, duplicates and partners in text.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup import config, progress
from snipdedup.adc.threshold import choose_margin, flag_curve, scores
from snipdedup.errors import SnipError
from snipdedup.evaluation.presentation import draw_picture, eval_page, eval_summary
from snipdedup.features.cosine import unit_rows
from snipdedup.features.hashing import row_hashes
from snipdedup.features.nearest import nearest, nearest_vectors
from snipdedup.features.origin import usual_threshold
from snipdedup.features.scan import refuse_bad
from snipdedup.features.shards import Features, open_features, plan_blocks, request_of
from snipdedup.index import quantizer
from snipdedup.index.kmeans import Vectors, kmeans
from snipdedup.parallel import cores, library_threads, ordered_map
from snipdedup.statistics import (
    average_precision,
    partner_ranks,
    proportion_interval,
    recall,
    sample_rows,
)
from snipdedup.storage import atomic, locks, out_folder

RECALL_AT = (1, 10, 100)
RULES = ("global", "ratio", "difference")
PRECISIONS = (0.81, 0.91, 0.95)
CURVE = [percent / 100 for percent in range(50, 100)]  # precisions that the picture shows
FLAG_K = 16  # neighbours looked at for a flag
OPQ_ROWS, OPQ_ROUNDS = 16_384, 10  # more rows or rounds do not move recall, and take minutes
GALLERY = 16_384  # pictures that a text is to find its own among
BLOCK_ROWS = 4096  # rows turned into vectors at a time
RESULT, PAGE, PICTURE = "eval.json", "eval.md", "curves.png"
NOT_IN_REQUEST = {"features", "text_features", "out", "overwrite", "threads"}
LEAST_LEARNT = 256  # rows to learn from: as many as an 8-bit code has values


@dataclass(frozen=True)
class Evaluation:
    """What ``snip eval`` measured; `str` of it is the summary.

    ``results`` is what ``eval.json`` holds: ``neighbours``, ``budget``, ``flags`` and ``text`` are
    tables, lists of one dict a measurement.
    """

    folder: Path  # with eval.json, eval.md and, where it was asked for, curves.png
    results: dict[str, Any]
    summary: str

    def __str__(self) -> str:
        return self.summary


class Contender(NamedTuple):
    """One way to make unit vectors of rows.

    ``vectors`` returns it for a code of so many bytes, or for no code (None); None where that is
    not worth a look.
    """

    name: str
    vectors: Callable[[int | None], Vectors | None]


class Task(NamedTuple):
    """What each contender is judged on."""

    features: Features
    queries: np.ndarray  # (q,) int64: rows of the set that are queries
    raw: np.ndarray  # (q, d): what they hold
    I: np.ndarray  # (q, k) int64: their exact neighbours
    duplicated: np.ndarray  # (q,) bool: another row is at or above the threshold
    sample: np.ndarray  # (n, d): rows that quantisers are trained on
    nlist: int
    sizes: list[int]  # of codes, in bytes
    nprobes: list[int]
    flag_nprobe: int
    seed: int
    threads: int


class IndexedRows:
    """An IVFPQ of all rows in memory: what an index of that code size would find."""

    def __init__(self, quantiser: quantizer.Quantiser) -> None:
        self.quantiser, self.ivfpq = quantiser, quantiser.ivfpq
        self.ivfpq.use_precomputed_table = 0
        self.ivfpq.precompute_table()  # without it, many lists take minutes

    def add(self, x: np.ndarray) -> None:
        """Take vectors of the rows that come next, (n, dim) float32."""
        self.ivfpq.add(np.ascontiguousarray(x))

    def search(self, x: np.ndarray, k: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ADC distances D and rows I of the ``k`` nearest codes, (n, k) each."""
        self.ivfpq.nprobe = min(nprobe, self.quantiser.nlist)
        return self.ivfpq.search(np.ascontiguousarray(x), k)

    def nearest_of_all(
        self, x: np.ndarray, queries: np.ndarray, k: int, threads: int
    ) -> np.ndarray:
        """Return the rows with the nearest codes, (q, k), of all lists, without the own rows.

        Codes are decoded, which is faster.
        """
        self.ivfpq.make_direct_map()

        def decode(span: tuple[int, int]) -> np.ndarray:
            return self.ivfpq.reconstruct_n(span[0], span[1] - span[0])

        return nearest_vectors(x, decode, self.ivfpq.ntotal, k, threads, own=queries)[1]


def drop_own(I: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return ``I`` without each query's own row, or without the last where that is not there."""
    own = queries[:, None] == I
    own[~own.any(axis=1), -1] = True
    return I[~own].reshape(len(I), I.shape[1] - 1)


@locks.released()
def run(options: config.Eval) -> Evaluation:
    """Measure, and write the tables, the JSON and the picture."""
    if options.picture and importlib.util.find_spec("matplotlib") is None:
        raise SnipError(
            "the picture needs matplotlib: pip install 'snipdedup-toolkit[plot]', or leave it out "
            "with --nopicture"
        )
    if options.threshold is None:
        options = dataclasses.replace(options, threshold=usual_threshold(options.features)[0])
    features = open_features(options.features, **options.some("parts", "array", "column"))
    texts = None
    quantizer.check_nlist(options.nlist, features.rows)
    if options.text_features is not None:
        from snipdedup.encoder.training import open_texts

        texts = open_texts(options.text_features, features)
    out = Path(options.out).expanduser()
    sources = [features] if texts is None else [features, texts]
    out_folder.refuse_output_inside(out, [path for one in sources for path in one.inputs()])
    settings = {k: v for k, v in options.as_dict().items() if k not in NOT_IN_REQUEST}
    request = {**settings, **request_of(features), "texts": request_of(texts) if texts else None}
    if out_folder.claim(out, "eval", request, overwrite=options.overwrite) == "done":
        again = f"{out} is finished already with these settings; --overwrite makes it anew"
        return Evaluation(out, atomic.load_json(out / RESULT), again)
    try:
        results = {**evaluate(features, texts, options), "settings": settings}
        for source in sources:
            source.refuse_changed()
        folder = out / locks.WORK / out_folder.FILES
        files = [folder / RESULT, folder / PAGE]
        atomic.save_json(files[0], results)
        with atomic.replacing(files[1]) as part:
            part.write_text(eval_page(results), encoding="utf-8")
        if options.picture:
            files.append(folder / PICTURE)
            with atomic.replacing(files[2]) as part:
                draw_picture(results, part)
        out_folder.publish(out, "eval", {"command": "eval", "request": request}, files)
    finally:
        out_folder.release(out)
    return Evaluation(out, results, f"{eval_summary(results)}\nwritten to {options.out}")


def evaluate(features: Features, texts: Features | None, options: config.Eval) -> dict[str, Any]:
    """Return everything that was measured, as JSON values; features are read in blocks."""
    threads, seed, nprobes = cores(options.threads), options.seed, options.numbers("nprobe")
    clock, rng = progress.Clock(), np.random.default_rng(seed)
    asked = sample_rows(features.rows, min(options.queries, features.rows // 4), rng)
    learn = learnable(features, asked, options.train_rows, rng)
    with clock.stage("train"):
        contenders = make_contenders(
            features, texts, learn, options.encoder, options.dim, options.steps, threads, seed
        )
    with clock.stage("truth"):
        raw = features.gather(asked)
        D, I = nearest(raw, features, max(RECALL_AT), threads, own=asked)
    wanted = quantizer.default_sample(features.rows, None)
    picked = sample_rows(features.rows, wanted, np.random.default_rng(seed))
    nlist = options.nlist or quantizer.default_nlist(features.rows, len(picked))
    task = Task(
        features, asked, raw, I, D[:, 0] >= np.float32(options.threshold), features.gather(picked),
        nlist, options.numbers("code_bytes"), nprobes, options.flag_nprobe, seed, threads,
    )  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {"neighbours": [], "flags": []}
    for contender in contenders:
        with clock.stage(f"judge {contender.name}"):
            for table, line in judge(contender, task):
                found[table].append({"contender": contender.name, **line})
    results: dict[str, Any] = {
        "rows": features.rows,
        "dim": features.dim,
        "queries": len(asked),
        "learned_rows": len(learn),
        "duplicates": int(task.duplicated.sum()),
        "nlist": nlist,
        "neighbours": found["neighbours"],
        "budget": budget(found["neighbours"], nprobes),
        "flags": found["flags"],
    }
    if texts is not None:
        with clock.stage("text"):
            results["text"] = judge_text(features, texts, asked, contenders, rng)
    return {**results, "seconds": {name: round(s, 2) for name, s in clock.seconds.items()}}


def learnable(
    features: Features, queries: np.ndarray, wanted: int, rng: np.random.Generator
) -> np.ndarray:
    """Return rows to train on, ascending: no query, and no copy of one."""
    rows = sample_rows(features.rows, wanted + len(queries), rng)
    rows = rows[~np.isin(rows, queries)]
    query_hashes = row_hashes(features.gather(queries))
    kept = rows[~np.isin(row_hashes(features.gather(rows)), query_hashes)]
    learn = kept[np.sort(rng.permutation(len(kept))[:wanted])]
    if len(learn) < min(LEAST_LEARNT, wanted):
        raise SnipError(
            f"{len(learn):,} rows are left to learn from, besides {len(queries):,} queries and "
            f"copies of these; eval needs {LEAST_LEARNT} at least: give more rows, or fewer "
            "--queries"
        )
    return learn


def make_contenders(
    features: Features, texts: Features | None, learn: np.ndarray,
    encoder: str | None, dim: int, steps: int, threads: int, seed: int,
) -> list[Contender]:  # fmt: skip
    """Return raw features, OPQ of raw features, PCA, MSE and SNIP, trained on rows ``learn``."""
    from snipdedup.encoder.network import Encoder, opq_rotation, principal_directions
    from snipdedup.encoder.training import train_encoder

    raw = features.gather(learn)
    refuse_bad(features, learn, raw)
    beside = None if texts is None else texts.gather(learn)
    train = partial(
        train_encoder, raw, text_features=beside, steps=steps, threads=threads, seed=seed
    )
    if encoder:
        snip = Encoder.load(Path(encoder).expanduser())
        snip.check_width(features, encoder)
    else:
        snip = train(loss="snip", dim=min(dim, raw.shape[1]))[0]
    mse = train(loss="mse", dim=snip.dim)[0]
    directions = principal_directions(raw, snip.dim, beside).numpy()
    few = np.random.default_rng(seed).permutation(len(raw))[:OPQ_ROWS]
    sample = unit_rows(raw[np.sort(few)])

    def pca(rows: np.ndarray) -> np.ndarray:
        return unit_rows(unit_rows(rows) @ directions.T)

    def rotated(m: int | None) -> Vectors | None:
        if m is None or sample.shape[1] % m:
            return None
        rotation = opq_rotation(sample, m, OPQ_ROUNDS, 2 * OPQ_ROUNDS)
        return lambda rows: unit_rows(rows) @ rotation.T

    @cache
    def encode_to(network: Encoder, width: int) -> Vectors:
        return network.of_width(width).encode

    def encoded(network: Encoder, m: int | None) -> Vectors:
        return encode_to(network, network.dim if m is None else network.for_codes(m).dim)

    return [
        Contender("raw", lambda m: unit_rows),
        Contender("opq", rotated),
        Contender("pca", lambda m: pca),
        Contender("mse", partial(encoded, mse)),
        Contender("snip", partial(encoded, snip)),
    ]


def judge(contender: Contender, task: Task) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield lines of two tables: ``neighbours``, their recall, and ``flags`` of duplicates."""
    features, threads, most, trained = task.features, task.threads, max(RECALL_AT), None

    def neighbours(m: int | None, nprobe: int | None, I: np.ndarray) -> tuple[str, dict[str, Any]]:
        at = {str(k): round(recall(I, task.I, k), 4) for k in RECALL_AT}
        return "neighbours", {"bytes": m, "nprobe": nprobe, "recall": at}

    for m in [None, *task.sizes]:
        vectors = contender.vectors(m)
        if vectors is None:
            continue

        def load(span: tuple[int, int], vectors: Vectors = vectors) -> np.ndarray:
            return vectors(features.read(*span))

        x = vectors(task.raw)
        if m is None:
            I = nearest_vectors(x, load, features.rows, most, threads, task.queries)[1]
            yield neighbours(None, None, I)
            continue
        if x.shape[1] % m:
            continue  # as faiss would refuse it
        if trained is None or trained[0] is not vectors:  # code sizes share coarse centroids
            y, seed = vectors(task.sample), task.seed
            centroids = kmeans(
                y, task.nlist, iterations=quantizer.ITERATIONS, seed=seed, threads=threads
            )
            trained = vectors, y, centroids
        quantiser = quantizer.train_quantiser(
            trained[1], nlist=task.nlist, m=m, nbits=8, seed=task.seed, threads=threads,
            centroids=trained[2],
        )  # fmt: skip
        indexed = IndexedRows(quantiser)
        for block in ordered_map(load, plan_blocks(features.rows, BLOCK_ROWS), threads):
            indexed.add(block)
        with library_threads(threads):
            for nprobe in task.nprobes:
                I = indexed.search(x, most + 1, nprobe)[1]
                yield neighbours(m, nprobe, drop_own(I, task.queries))
            for line in judge_flags(indexed, x, task):
                yield "flags", {"bytes": m, **line}
        I = indexed.nearest_of_all(x, task.queries, most, threads)
        yield neighbours(m, task.nlist, I)


def judge_flags(indexed: IndexedRows, x: np.ndarray, task: Task) -> list[dict[str, Any]]:
    """Return how well each rule flags queries that have a duplicate."""
    D, I = indexed.search(x, FLAG_K, task.flag_nprobe)
    D[(I < 0) | (task.queries[:, None] == I)] = np.inf
    own = indexed.quantiser.own_code(x)[2]
    flags = []
    for rule in RULES:
        subtracted = np.zeros_like(own) if rule == "global" else own
        best = scores(D, subtracted, "ratio" if rule == "ratio" else "difference").min(axis=1)
        flags.append(
            {
                "rule": rule,
                "average_precision": round(average_precision(-best, task.duplicated), 4),
                "at": flag_points(best, task.duplicated, PRECISIONS),
                "curve": flag_points(best, task.duplicated, CURVE),
            }
        )
    return flags


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
            point |= {"margin": float(margin[at]), "precision": float(right[at] / flagged[at])}
            point["recall"] = float(right[at] / max(truth.sum(), 1)) if good else 0.0
        points.append(point)
    return points


def budget(measured: list[dict[str, Any]], nprobes: list[int]) -> list[dict[str, Any]]:
    """Return where recall@10 is lost: by the encoder, by the code, by lists not visited.

    The nprobe shown is the one in the middle, the larger of two.
    """
    at = {(e["contender"], e["bytes"], e["nprobe"]): e["recall"]["10"] for e in measured}
    lines, nprobe = [], sorted(nprobes)[len(nprobes) // 2]
    for name, m in dict.fromkeys((e["contender"], e["bytes"]) for e in measured if e["bytes"]):
        uncoded = at.get((name, None, None), 1.0)
        visited = {n: v for (c, b, n), v in at.items() if (c, b) == (name, m)}
        every, shown = visited[max(visited)], visited[nprobe]
        lines.append(
            {
                "contender": name,
                "bytes": m,
                "nprobe": nprobe,
                "encoder": round(1 - uncoded, 4),
                "code": round(uncoded - every, 4),
                "probes": round(every - shown, 4),
                "recall": shown,
            }
        )
    return lines


def judge_text(
    features: Features, texts: Features, queries: np.ndarray,
    contenders: list[Contender], rng: np.random.Generator,
) -> list[dict[str, Any]]:  # fmt: skip
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
        if (vectors := contender.vectors(None)) is None:
            continue
        x, t = vectors(pictures), vectors(words)
        for direction, of, among, item in (
            ("text to image", t, x, same_picture),
            ("image to text", x, t, same_text),
        ):
            ranks = partner_ranks(of[at] @ among.T, item[at], item)
            line = {"contender": contender.name, "direction": direction, "among": len(gallery)}
            for k in (1, 10):
                hits = ranks < k
                low, high = proportion_interval(int(hits.sum()), len(hits))
                shares = {"recall": hits.mean(), "low": low, "high": high}  # of 95 %
                line[str(k)] = {name: round(float(share), 4) for name, share in shares.items()}
            found.append(line)
    return found
