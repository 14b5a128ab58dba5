"""``snip search``: the nearest rows to a row, to vectors or to a text, for a person to look at.

The index proposes by codes, from the visited lists only; raw features, where they are at hand,
decide. torch is loaded only where an encoder or a CLIP model has to make a vector.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import config
from snipdedup.errors import InputError, SnipError, UsageError
from snipdedup.features.cosine import pair_cosine, unit_rows64
from snipdedup.features.formats import load_npz, map_npy
from snipdedup.features.shards import Features, implied_metadata, open_features, request_of
from snipdedup.index.folder import Index, Space, held_encoder, is_descriptors
from snipdedup.index.search import MappedLists
from snipdedup.inspection.clip import text_vector
from snipdedup.storage import atomic, out_folder
from snipdedup.storage.manifest import read_manifest

VECTORS = (".npy", ".npz")
COSINE, ADC = "cosine", "adc_distance"
TEXTS = ("key", "url", "caption")
SHOWN = 60  # characters of a caption or url in the table


@dataclass
class Neighbour:
    """One row that was found; ``score`` is a cosine or an ADC distance."""

    row: int
    shard: str
    shard_row: int
    score: float | None = None
    key: str | None = None
    url: str | None = None
    caption: str | None = None

    def as_dict(self, measure: str) -> dict[str, Any]:
        """Return the neighbour as JSON, its score under the measure's name."""
        values = dataclasses.asdict(self)
        score = values.pop("score")
        return values if score is None else {**values, measure: score}


@dataclass
class Answer:
    """What was found for one query.

    Attributes
    ----------
    query : str
        As a person would call it.
    row : Neighbour or None
        The row asked for, if it was one.
    neighbours : list of Neighbour
        Best first.
    """

    query: str
    row: Neighbour | None
    neighbours: list[Neighbour]


@dataclass
class Answers:
    """All that was found, and how.

    Attributes
    ----------
    measure : str
        ``cosine`` or ``adc_distance``.
    of : str
        What was compared: ``features``, ``descriptors`` or ``codes``.
    note : str
        Why it was not the features, empty if it was.
    """

    measure: str
    of: str
    note: str
    answers: list[Answer] = field(default_factory=list)

    @property
    def how(self) -> str:
        """What the scores are, in words."""
        what = "cosine" if self.measure == COSINE else "squared distance"
        return f"{what} of the {self.of}" + (f": {self.note}" if self.note else "")

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON."""
        queries = [
            {
                "query": answer.query,
                "row": answer.row.as_dict(self.measure) if answer.row else None,
                "neighbours": [found.as_dict(self.measure) for found in answer.neighbours],
            }
            for answer in self.answers
        ]
        return {"measure": self.measure, "of": self.of, "note": self.note, "queries": queries}


@dataclass(frozen=True)
class Raw:
    """Rows to re-rank with: ``features``, or None and why; ``of`` says what they are."""

    features: Features | None
    of: str
    why: str = ""


@dataclass(frozen=True)
class Query:
    """One question: a row, or a vector; ``name`` as a person would call it.

    ``x`` is what the lists are searched with, ``raw`` what features are compared with.
    """

    name: str
    row: int | None
    x: np.ndarray
    raw: np.ndarray | None


def run(options: config.Search) -> str:
    """Find the nearest rows; return a table, or JSON."""
    index = Index(options.index)
    if options.html is not None:
        require_jinja()
    metadata = open_table_of(index, options)
    if options.html is not None:
        refuse_page(Path(options.html).expanduser(), index, metadata, options)
    found = search(index, options)
    if metadata is not None:
        describe_rows(found, metadata)
    said = json.dumps(found.as_dict(), indent=2) if options.json else table(found)
    if options.html is None:
        return said
    from snipdedup.inspection.gallery import page

    path, told = Path(options.html).expanduser(), found.as_dict()
    with atomic.replacing(path) as part:
        text = page(index.folder.name, found.how, told["queries"], found.measure)
        part.write_text(text, encoding="utf-8")
    return said if options.json else f"{said}\nwritten to {path}"


def refuse_page(path: Path, index: Index, metadata: Any, options: config.Search) -> None:
    """Refuse to write the page over what is read, or what is snip's."""
    read = [index.folder, *([] if metadata is None else metadata.inputs())]
    if Path(options.query).suffix.lower() in VECTORS:
        read.append(Path(options.query).expanduser())
    features = raw_features(index, options).features
    out_folder.refuse_output_file(path, [*read, *([] if features is None else features.paths())])


def require_jinja() -> None:
    """Refuse where jinja2 is not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise SnipError("--html needs jinja2: pip install 'snipdedup-toolkit[report]'") from None


def search(index: Index, options: config.Search) -> Answers:
    """Answer the query, or each vector of a file."""
    lists, raw = MappedLists(index), raw_features(index, options)
    queries = parse_query(index, lists, raw, options)
    comparable = raw.features is not None and all(query.raw is not None for query in queries)
    why = raw.why or ("" if comparable else "the query is not as wide as the features")
    found = Answers(
        COSINE if comparable else ADC, raw.of if comparable else "codes", "" if comparable else why
    )
    for query in queries:
        D, I = lists.nearest(query.x, nprobe=options.nprobe, k=max(options.k, options.rerank) + 1)
        if query.row is not None:
            D, I = D[query.row != I], I[query.row != I]
        if comparable and raw.features is not None and query.raw is not None:
            D, I = rerank(raw.features, query.raw, I)
        near = [
            place(index, int(row), float(score))
            for row, score in zip(I[: options.k], D[: options.k], strict=True)
        ]
        asked = place(index, query.row) if query.row is not None else None
        found.answers.append(Answer(query.name, asked, near))
    return found


def rerank(features: Features, x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines with ``x`` and rows, (n,) each, highest first; even ones by row."""
    if not len(rows):
        return np.empty(0, np.float32), rows
    raw = features.gather(rows)
    dtype = np.result_type(raw, x)
    like = np.broadcast_to(x.astype(dtype), raw.shape)
    cosine = pair_cosine(np.ascontiguousarray(like), raw.astype(dtype, copy=False))
    cosine[np.isnan(cosine)] = -1  # a row that cannot be compared
    order = np.lexsort((rows, -cosine))
    return cosine[order], rows[order]


def parse_query(index: Index, lists: MappedLists, raw: Raw, options: config.Search) -> list[Query]:
    """Return what is asked: a row number, the vectors of a file, or a text.

    Raises
    ------
    SnipError
        If there is no such row or file, or vectors do not fit the index.
    """
    text = options.query
    if not options.text and text.isdecimal():
        return [row_query(index, lists, raw, int(text))]
    if not options.text and Path(text).suffix.lower() in VECTORS:
        vectors, name = read_vectors(Path(text).expanduser(), options.array), text
    else:
        vectors, name = text_vector(text, model_of(index, options), download=options.download), text
        vectors = vectors[None]
    x = search_vectors(index, vectors, name, options.encoder)
    wide = raw.features is not None and raw.features.dim == vectors.shape[1]
    return [
        Query(name if len(x) == 1 else f"{name} [{i}]", None, x[i], vectors[i] if wide else None)
        for i in range(len(x))
    ]


def row_query(index: Index, lists: MappedLists, raw: Raw, row: int) -> Query:
    """Return a stored row as a query; what the lists need is made without torch."""
    if row >= index.rows:
        raise SnipError(
            f"row {row} is not in {index.folder}: it has {index.rows:,} rows, numbered from 0 (a "
            "text of digits only needs --text)"
        )
    if raw.features is None:
        return Query(f"row {row}", row, lists.vector_of(row), None)
    rows = raw.features.read(row, row + 1)
    if not usable(rows).all():
        raise SnipError(f"row {row} is NaN, infinite or zero: it is near to nothing")
    # With an encoder, or where the features are not what was indexed, q(x) stands for x.
    same = held_encoder(index.folder) is None and raw.features.dim == index.dim
    x = plain_vectors(index, rows)[0] if same else lists.vector_of(row)
    return Query(f"row {row}", row, x, rows[0])


def read_vectors(path: Path, array: str | None) -> np.ndarray:
    """Return the vectors of a ``.npy`` or ``.npz`` file, (n, d); a single one may be 1-D."""
    if not path.is_file():
        raise SnipError(f"no such file: {path} (a text that ends like a file needs --text)")
    try:
        packed = zipfile.is_zipfile(path)
        found = load_npz(path, [array] if array else None) if packed else {"": map_npy(path)}
    except (OSError, InputError) as error:
        raise SnipError(f"{path}: cannot be read as vectors: {error}") from error
    if len(found) != 1:
        raise SnipError(f"{path} holds {', '.join(found) or 'none'}; choose one with --array")
    (held,) = found.values()
    vectors = np.array(held, held.dtype.newbyteorder("="), order="C")
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not len(vectors) or vectors.dtype.kind != "f":
        raise SnipError(
            f"{path}: expected vectors, (n, d) of floats, found {vectors.shape} of {vectors.dtype}"
        )
    bad = np.flatnonzero(~usable(vectors))
    if len(bad):
        raise SnipError(f"{path} row {bad[0]}: NaN, infinite or zero; it is near to nothing")
    return vectors


def usable(rows: np.ndarray) -> np.ndarray:
    """Return which rows can be compared, (n,) bool: `cosine.bad_rows` without torch."""
    return np.asarray(np.isfinite(rows).all(axis=1) & rows.any(axis=1))


def plain_vectors(index: Index, rows: np.ndarray) -> np.ndarray:
    """Return rows as an index without an encoder takes them, (n, dim) float32."""
    as_stored = bool(index.manifest["request"]["as_stored"])
    return (rows if as_stored else unit_rows64(rows)).astype(np.float32)


def search_vectors(index: Index, vectors: np.ndarray, name: str, encoder: str | None) -> np.ndarray:
    """Return what the lists are searched with: descriptors where the index holds such."""
    held, width = held_encoder(index.folder), vectors.shape[1]
    given = held or (Path(encoder).expanduser() if encoder is not None else None)
    if given is not None and width == read_manifest(given, "encoder")["encoder"]["dim_in"]:
        space = Space.encoded(given).of_width(index.dim)
        if space.dim == index.dim:
            return space.vectors(vectors)
    if width != index.dim:
        expected = f"{index.dim} wide"
        if given is not None:
            expected += f", or {read_manifest(given, 'encoder')['encoder']['dim_in']} for "
            expected += f"the encoder {given}"
        raise SnipError(
            f"{name}: vectors {width} wide, {index.folder} expects {expected}; use features of the "
            "model that was indexed (--encoder, if it holds descriptors)"
        )
    return vectors.astype(np.float32) if held else plain_vectors(index, vectors)


def model_of(index: Index, options: config.Search) -> str:
    """Return the CLIP model to make a text's vector with: the flag's, or a manifest's."""
    held = held_encoder(index.folder)
    manifests = [index.manifest, read_manifest(held, "encoder") if held else {}]
    named = [manifest.get("settings", {}).get("model") for manifest in manifests]
    model = options.model or next((name for name in named if name), None)
    if model is None:
        raise UsageError(
            f"{options.query!r} is no row and no .npy or .npz file; to search by text, name the "
            "CLIP model that made the features: --model ViT-B-32/laion2b_s34b_b79k, say"
        )
    return str(model)


def raw_features(index: Index, options: config.Search) -> Raw:
    """Return the features that were indexed: those given, or where the manifest says they lie.

    Raises
    ------
    SnipError
        If those given are not there, or not as many rows as the index.
    """
    if not options.rerank:
        return Raw(None, "", "--rerank 0")
    held = index.manifest["settings"]
    source = options.features or index.manifest.get("features_at")
    if source is None:
        return Raw(None, "", "it is not known where the features lie; name them with --features")
    how = {name: getattr(options, name) or held.get(name) for name in ("parts", "array", "column")}
    if options.features is None:
        how = {name: held.get(name) for name in how}
    elif "{part" not in options.features:
        how["parts"] = options.parts
    try:
        features = open_features(source, **how)
    except SnipError as error:
        if options.features is not None:
            raise
        return Raw(None, "", f"the features are not where they were ({error})")
    of = "descriptors" if is_descriptors(source) else "features"
    if options.features is not None:
        refuse_other_rows(index, features, source)
        return Raw(features, of)
    now, then = request_of(features), index.manifest["request"]
    if any(now[name] != then.get(name) for name in now):
        return Raw(None, "", f"{source} changed since; if the rows are the same, give --features")
    return Raw(features, of)


def refuse_other_rows(index: Index, features: Features, source: str) -> None:
    """Refuse features with other rows than the index, shard by shard."""
    indexed = [shard["rows"] for shard in index.manifest["shards"]]
    given = [shard.rows for shard in features.shards]
    if indexed != given:
        raise SnipError(
            f"--features {source}: {sum(given):,} rows of {len(given)} shards, {index.folder} "
            f"holds {sum(indexed):,} rows of {len(indexed)}; give the features that were indexed"
        )


def place(index: Index, row: int, score: float | None = None) -> Neighbour:
    """Return a row with its shard and its place in it."""
    number = int(np.searchsorted(index.offsets, row, side="right")) - 1
    shard = index.manifest["shards"][number]
    return Neighbour(row, str(shard["name"]), int(row - index.offsets[number]), score)


def open_table_of(index: Index, options: config.Search) -> Any:
    """Return the metadata: given, or beside a folder of features; None if there is none."""
    source: Any = options.metadata
    if source is None:
        beside = options.features or index.manifest.get("features_at")
        source = implied_metadata(beside) if beside is not None else None
    if source is None:
        return None
    from snipdedup.metadata.tables import open_metadata  # pyarrow takes a while too

    metadata = open_metadata(source)
    shards = index.manifest["shards"]
    metadata.check_rows([(str(shard["name"]), int(shard["rows"])) for shard in shards])
    return metadata


def describe_rows(found: Answers, metadata: Any) -> None:
    """Fill in key, url and caption of every row shown."""
    from snipdedup.metadata.tables import KEY_COLUMNS
    from snipdedup.metadata.texts import CAPTIONS, URLS, RowTexts

    texts = RowTexts(metadata)
    shown = [n for a in found.answers for n in (*a.neighbours, *([a.row] if a.row else []))]
    rows = np.array([neighbour.row for neighbour in shown], np.int64)
    for name, wanted in zip(TEXTS, (KEY_COLUMNS, URLS, CAPTIONS), strict=True):
        values = texts.read(texts.find(wanted=wanted), rows)
        for neighbour in shown:
            setattr(neighbour, name, values.get(neighbour.row))


def table(found: Answers) -> str:
    """Return the answers as a person reads them."""
    lines = []
    for answer in found.answers:
        lines += [printable(answer.query), *about(answer.row)] + [""] * bool(answer.row)
        lines.append(f"  {'row':>12}  {'cosine' if found.measure == COSINE else 'distance':>8}")
        for near in answer.neighbours:
            words = [near.key, near.caption, near.url]
            texts = "  ".join(cut(printable(word)) for word in words if word)
            lines.append(f"  {near.row:>12}  {near.score:>8.4f}  {texts}".rstrip())
        lines.append("" if answer.neighbours else "  nothing in the lists that were visited")
    return "\n".join([*lines, found.how])


def about(row: Neighbour | None) -> list[str]:
    """Return what is known of the row that was asked for."""
    if row is None:
        return []
    known = [f"{name} {cut(printable(v))}" for name in TEXTS if (v := getattr(row, name))]
    return [f"  {row.shard}, row {row.shard_row} of it", *(f"  {text}" for text in known)]


def printable(text: str) -> str:
    """Return a text without what could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def cut(text: str) -> str:
    """Return a text short enough for a table."""
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
