"""``snip search``: the nearest rows to a row, to vectors or to a text, as a table, JSON or a page.

The index proposes rows by their codes, from the visited lists only; raw features decide, where
they can be read. A text becomes a vector by the CLIP model that made the features (extra
``clip``). torch is loaded only for an encoder or a text.
"""

from __future__ import annotations

import dataclasses
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from snipdedup.config import Search
from snipdedup.errors import InputError, SnipError, UsageError
from snipdedup.features.cosine import pair_cosine, unit_rows64
from snipdedup.features.formats import load_npz, map_npy
from snipdedup.features.shards import (
    Features,
    as_array,
    implied_metadata,
    is_one,
    open_features,
    request_of,
    source_name,
)
from snipdedup.features.staging import is_table
from snipdedup.index.folder import Index, held_encoder, is_descriptors, load_encoder
from snipdedup.index.search import MappedLists
from snipdedup.inspection.display import (
    ShownRow,
    fill_texts,
    places_of,
    render_page,
    require,
    terminal_text,
)
from snipdedup.pictures.clip import MODEL, text_vector
from snipdedup.storage.atomic import replacing
from snipdedup.storage.out_folder import read_manifest, refuse_output_file

if TYPE_CHECKING:
    from snipdedup.metadata.gather import RowTexts

COSINE, ADC = "cosine", "adc_distance"
VECTORS = (".npy", ".npz")
TEXTS = ("key", "url", "caption")
TABLE_WIDTH = 60  # characters of a caption or url in the table


@dataclass
class Neighbour(ShownRow):
    """A row and its score, a cosine or an ADC distance; None of the query itself."""

    score: float | None = None


@dataclass
class Answer:
    """The neighbours of one query, the best first; ``row`` is the query if it is a stored row."""

    query: str
    row: Neighbour | None
    neighbours: list[Neighbour]


@dataclass(frozen=True)
class SearchResult:
    """What ``snip search`` found, an answer for each query; ``str()`` is a table."""

    measure: str  # ``cosine`` or ``adc_distance``
    of: str  # what was compared: ``features``, ``descriptors`` or ``codes``
    note: str  # why it was not the features; empty if it was
    answers: list[Answer]
    page: Path | None = None  # the page that was written

    @property
    def how(self) -> str:
        """What the scores are, in words."""
        what = "cosine" if self.measure == COSINE else "squared distance"
        return f"{what} of the {self.of}" + (f": {self.note}" if self.note else "")

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values, a score under the measure's name."""
        found: dict[str, Any] = dataclasses.asdict(self)
        for answer in found["answers"]:
            for near in answer["neighbours"]:
                near[self.measure] = near.pop("score")
            if answer["row"] is not None:
                del answer["row"]["score"]
        names = ("measure", "of", "note")
        return {**{name: found[name] for name in names}, "queries": found["answers"]}

    def __str__(self) -> str:
        lines = []
        for answer in self.answers:
            lines.append(terminal_text(answer.query))
            if (row := answer.row) is not None:
                lines.append(f"  {row.shard}, row {row.shard_row} of it")
                known = [(name, getattr(row, name)) for name in TEXTS]
                lines += [f"  {n} {terminal_text(text, TABLE_WIDTH)}" for n, text in known if text]
                lines.append("")
            score = "cosine" if self.measure == COSINE else "distance"
            lines.append(f"  {'row':>12}  {score:>8}")
            for near in answer.neighbours:
                words = [near.key, near.caption, near.url]
                texts = "  ".join(terminal_text(word, TABLE_WIDTH) for word in words if word)
                lines.append(f"  {near.row:>12}  {near.score:>8.4f}  {texts}".rstrip())
            lines.append("" if answer.neighbours else "  nothing in the lists that were visited")
        lines.append(self.how)
        return "\n".join([*lines, *([f"written to {self.page}"] if self.page else [])])


class Query(NamedTuple):
    """One query."""

    name: str  # as a person would call it
    row: int | None  # the stored row that it is
    x: np.ndarray  # (dim,) float32: what the lists are searched with
    raw: np.ndarray  # (d,) float: what features are compared with, where they are as wide


def run(options: Search) -> SearchResult:
    """Run ``snip search``."""
    index = Index(options.index)
    if options.html is not None:
        require("jinja2", "--html")
    beside, texts = options.features, None
    if beside is None:
        beside = index.manifest.get("features_at")
    source: Any = options.metadata or (
        implied_metadata(beside) if isinstance(beside, str | Path) else None
    )
    if source is not None:
        from snipdedup.metadata.gather import open_row_texts  # pyarrow takes a while

        texts = open_row_texts(index.folder, index.manifest, source)
    options = dataclasses.replace(options, query=query_row(index, texts, options))
    features, of, why = raw_features(index, options)
    page = None if options.html is None else Path(options.html).expanduser()
    if page is not None:
        read = [index.folder, *([] if texts is None else texts.inputs())]
        if isinstance(options.query, str) and options.query.lower().endswith(VECTORS):
            read.append(Path(options.query).expanduser())
        refuse_output_file(page, [*read, *([] if features is None else features.paths())])
    result = dataclasses.replace(search(index, features, of, why, options), page=page)
    if texts is not None:
        shown = [n for a in result.answers for n in (*a.neighbours, *([a.row] if a.row else []))]
        fill_texts(shown, texts, *TEXTS)
    if page is not None:
        with replacing(page) as part:
            text = render_page("search.html.j2", index=index.folder.name, result=result)
            part.write_text(text, encoding="utf-8")
    return result


def query_row(index: Index, texts: RowTexts | None, options: Search) -> Any:
    """Return the row that QUERY is the key of, or QUERY where it is none.

    A text with spaces is no key, unless ``key:`` stands before it.
    """
    query = options.query
    if not isinstance(query, str) or options.text:
        return query
    from snipdedup.metadata.find_keys import KEY, ROW, open_keys, row_number  # as above
    from snipdedup.metadata.gather import RowTexts as Texts

    prefixed, row = query.startswith((ROW, KEY)), row_number(query)
    if row is not None:
        return row
    keys = open_keys(index.folder, index.rows, texts or Texts(None))
    likely = keys.column is not None and not re.search(r"\s", query)
    if not prefixed and (not likely or Path(query).expanduser().is_file()):
        return query
    rows = keys.find([query]) if prefixed else keys.rows_of([query]).get(query, [])
    if len(rows) > 1:
        some = ", ".join(map(str, rows[:20]))
        raise SnipError(f"{len(rows):,} rows have the key {query!r}: give one of {some}")
    return rows[0] if rows else query


def search(
    index: Index, features: Features | None, of: str, why: str, options: Search
) -> SearchResult:
    """Answer each query; features, called ``of``, are rows to compare with, or None and ``why``."""
    lists, shards, answers = MappedLists(index), index.manifest["shards"], []
    queries = parse_query(index, lists, features, options)
    if features is not None and queries[0].raw.shape != (features.dim,):
        features, why = None, "the query is not as wide as the features"
    for name, row, x, raw in queries:
        D, I = lists.nearest(x, nprobe=options.nprobe, k=max(options.k, options.rerank) + 1)
        if row is not None:
            D, I = D[row != I], I[row != I]
        if features is not None:
            D, I = rerank(features, raw, I)
        rows, scores = I[: options.k].tolist(), D[: options.k].tolist()
        places = places_of(shards, rows if row is None else [*rows, row])
        near = [Neighbour(r, **places[r], score=s) for r, s in zip(rows, scores, strict=True)]
        answers.append(Answer(name, None if row is None else Neighbour(row, **places[row]), near))
    measure, of, note = (COSINE, of, "") if features is not None else (ADC, "codes", why)
    return SearchResult(measure, of, note, answers)


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


def raw_features(index: Index, options: Search) -> tuple[Features | None, str, str]:
    """Return the features that were indexed, ``features`` or ``descriptors``, and why if None.

    They are those given, or lie where the manifest says.
    """
    if not options.rerank:
        return None, "", "--rerank 0"
    settings, given = index.manifest["settings"], options.features is not None
    source = options.features if given else index.manifest.get("features_at")
    if source is None:
        return None, "", "it is not known where the features lie; name them with --features"
    how = {
        name: (given and getattr(options, name)) or settings.get(name)
        for name in ("parts", "array", "column")
    }
    if given and "{part" not in str(source):
        how["parts"] = options.parts
    try:
        features = open_features(source, **how)
    except SnipError as error:
        if given:
            raise
        return None, "", f"the features are not where they were ({error})"
    if given:
        index.refuse_other_rows(
            features, "--features" if source_name(source) is None else f"--features {source}"
        )
    else:
        now, then = request_of(features), index.manifest["request"]
        if any(now[name] != then.get(name) for name in now):
            return None, "", f"{source} changed since; if the rows are the same, give --features"
    return (
        features,
        "descriptors"
        if is_descriptors(source if isinstance(source, str | Path) else None)
        else "features",
        "",
    )


def parse_query(
    index: Index, lists: MappedLists, features: Features | None, options: Search
) -> list[Query]:
    """Return what is asked: a row number, the vectors of a file or an array, or a text."""
    query, named = options.query, isinstance(options.query, str)
    if isinstance(query, int | np.integer) or (named and query.isdecimal() and not options.text):
        return [row_query(index, lists, features, int(query))]
    name = query if named else "QUERY"
    if not named:
        vectors = checked_vectors(as_vectors(query, options.column), name)
    elif query.lower().endswith(VECTORS) and not options.text:
        vectors = read_vectors(Path(query).expanduser(), options.array)
    else:
        model = clip_model(index, query, options.model)
        vectors = text_vector(query, model, download=options.download)[None]
    return [
        Query(name if len(vectors) == 1 else f"{name} [{i}]", None, x, vectors[i])
        for i, x in enumerate(search_vectors(index, vectors, name, options.encoder))
    ]


def as_vectors(query: Any, column: str | None) -> np.ndarray:
    """Return the vectors of a table; an array, one vector too, as numpy's; lists of numbers."""
    if is_table(query):
        rows = open_features(query, column=column)
        return rows.read(0, rows.rows)
    return as_array(query) if is_one(query) else np.asarray(query)


def row_query(index: Index, lists: MappedLists, features: Features | None, row: int) -> Query:
    """Return a stored row as a query; torch is not loaded."""
    if not 0 <= row < index.rows:
        raise SnipError(
            f"row {row} is not in {index.folder}: it has {index.rows:,} rows, numbered from 0 (a "
            "text of digits only needs --text)"
        )
    if features is None:
        x = lists.vector_of(row)
        return Query(f"row {row}", row, x, x)
    rows = features.read(row, row + 1)
    if not usable(rows).all():
        raise SnipError(f"row {row} is NaN, infinite or zero: it is near to nothing")
    # With an encoder, or where the features are not what was indexed, q(x) stands for x.
    same = held_encoder(index.folder) is None and features.dim == index.dim
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
    (vectors,) = found.values()
    return checked_vectors(vectors, str(path))


def checked_vectors(given: np.ndarray, name: str) -> np.ndarray:
    """Return vectors, (n, d) of this machine's floats; refuse what is none, or near to nothing."""
    vectors = np.array(given, given.dtype.newbyteorder("="), order="C")
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not len(vectors) or vectors.dtype.kind != "f":
        raise SnipError(
            f"{name}: expected vectors, (n, d) of floats, found {vectors.shape} of {vectors.dtype}"
        )
    bad = np.flatnonzero(~usable(vectors))
    if len(bad):
        raise SnipError(f"{name} row {bad[0]}: NaN, infinite or zero; it is near to nothing")
    return vectors


def usable(rows: np.ndarray) -> np.ndarray:
    """Return which rows can be compared, (n,) bool: `cosine.bad_rows` without torch."""
    return np.asarray(np.isfinite(rows).all(axis=1) & rows.any(axis=1))


def plain_vectors(index: Index, rows: np.ndarray) -> np.ndarray:
    """Return rows as an index without an encoder takes them, (n, dim) float32."""
    return (rows if index.as_stored else unit_rows64(rows)).astype(np.float32)


def search_vectors(index: Index, vectors: np.ndarray, name: str, encoder: str | None) -> np.ndarray:
    """Return what the lists are searched with: descriptors where the index holds such."""
    held, width = held_encoder(index.folder), vectors.shape[1]
    given = held or (Path(encoder).expanduser() if encoder is not None else None)
    takes = None if given is None else read_manifest(given, "encoder")["encoder"]["dim_in"]
    if given is not None and width == takes:
        found = load_encoder(given, index.dim)
        if found.dim == index.dim:
            return found.encode(vectors)
    if width != index.dim:
        also = "" if given is None else f", or {takes} for the encoder {given}"
        raise SnipError(
            f"{name}: vectors {width} wide, {index.folder} expects {index.dim} wide{also}; use "
            "features of the model that was indexed (--encoder, if it holds descriptors)"
        )
    return vectors.astype(np.float32) if held else plain_vectors(index, vectors)


def clip_model(index: Index, text: str, given: str | None) -> str:
    """Return the CLIP model to make a text's vector with: the one given, or a manifest's."""
    held = held_encoder(index.folder)
    manifests = [index.manifest, read_manifest(held, "encoder") if held else {}]
    named = [given, *(manifest.get("settings", {}).get("model") for manifest in manifests)]
    model = next((str(name) for name in named if name), None)
    if model is None:
        raise UsageError(
            f"{text!r} is no row, no key and no .npy or .npz file; to search by text, name the "
            f"CLIP model that made the features, such as --model {MODEL}"
        )
    if not all(model.partition("/")[::2]):
        raise UsageError(f"--model must be ARCHITECTURE/WEIGHTS, such as {MODEL}, found {model!r}")
    return model
