"""``snip search``: the nearest rows to a row, to vectors or to a text, as a table, JSON or a page.

The index proposes rows by their codes, from the visited lists only; raw features decide, where
they can be read.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.config import Search
from snipdedup.errors import SnipError
from snipdedup.features.cosine import pair_cosine
from snipdedup.features.shards import Features, implied_metadata, open_features, request_of
from snipdedup.index.folder import Index, is_descriptors
from snipdedup.index.search import MappedLists
from snipdedup.inspection.display import page_text, place_of, safe_link, terminal_text
from snipdedup.inspection.report_page import TEMPLATES, content_hash, render_template, require_jinja
from snipdedup.inspection.search_query import VECTORS, parse_query
from snipdedup.storage.atomic import replacing
from snipdedup.storage.out_folder import refuse_output_file

COSINE, ADC = "cosine", "adc_distance"
TEXTS = ("key", "url", "caption")
TABLE_WIDTH = 60  # characters of a caption or url in the table
PAGE_WIDTHS = {"key": 120, "caption": 600, "url": 600, "query": 200}


@dataclass
class Neighbour:
    """A row, where it lies, its score (a cosine or an ADC distance), and its texts if known."""

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
    """The neighbours of one query, the best first; ``row`` is the query if it is a stored row."""

    query: str
    row: Neighbour | None
    neighbours: list[Neighbour]


@dataclass
class SearchResult:
    """What ``snip search`` found.

    Attributes
    ----------
    measure : str
        ``cosine`` or ``adc_distance``.
    of : str
        What was compared: ``features``, ``descriptors`` or ``codes``.
    note : str
        Why it was not the features; empty if it was.
    answers : list of Answer
        One for each query.
    page : Path or None
        The page that was written.
    as_json : bool
        ``str()`` is JSON, not a table.
    """

    measure: str
    of: str
    note: str
    answers: list[Answer] = field(default_factory=list)
    page: Path | None = None
    as_json: bool = False

    @property
    def how(self) -> str:
        """What the scores are, in words."""
        what = "cosine" if self.measure == COSINE else "squared distance"
        return f"{what} of the {self.of}" + (f": {self.note}" if self.note else "")

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        queries = [
            {
                "query": answer.query,
                "row": answer.row.as_dict(self.measure) if answer.row else None,
                "neighbours": [near.as_dict(self.measure) for near in answer.neighbours],
            }
            for answer in self.answers
        ]
        return {"measure": self.measure, "of": self.of, "note": self.note, "queries": queries}

    def __str__(self) -> str:
        if self.as_json:
            return json.dumps(self.as_dict(), indent=2)
        lines = []
        for answer in self.answers:
            lines.append(terminal_text(answer.query))
            if answer.row is not None:
                row = answer.row
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
        if self.page is not None:
            lines.append(f"written to {self.page}")
        return "\n".join(lines)


def run(options: Search) -> SearchResult:
    """Run ``snip search``."""
    index = Index(options.index)
    if options.html is not None:
        require_jinja("--html")
    metadata = open_table_of(index, options)
    features, of, why = raw_features(index, options)
    page = None if options.html is None else Path(options.html).expanduser()
    if page is not None:
        read = [index.folder, *([] if metadata is None else metadata.inputs())]
        if isinstance(options.query, str) and Path(options.query).suffix.lower() in VECTORS:
            read.append(Path(options.query).expanduser())
        refuse_output_file(page, [*read, *([] if features is None else features.paths())])
    result = search(index, features, of, why, options)
    if metadata is not None:
        describe_rows(result, metadata)
    if page is not None:
        with replacing(page) as part:
            part.write_text(render_page(index.folder.name, result), encoding="utf-8")
    return dataclasses.replace(result, page=page, as_json=options.json)


def search(
    index: Index, features: Features | None, of: str, why: str, options: Search
) -> SearchResult:
    """Answer the query, or each vector of a file.

    ``features`` are rows to compare with, or None and ``why``; ``of`` says what they are.
    """
    lists = MappedLists(index)
    queries = parse_query(index, lists, features, options)
    if features is not None and any(query.raw is None for query in queries):
        features, why = None, "the query is not as wide as the features"
    result = SearchResult(COSINE, of, "") if features else SearchResult(ADC, "codes", why)
    shards, offsets = index.manifest["shards"], index.offsets
    for query in queries:
        D, I = lists.nearest(query.x, nprobe=options.nprobe, k=max(options.k, options.rerank) + 1)
        if query.row is not None:
            D, I = D[query.row != I], I[query.row != I]
        if features is not None and query.raw is not None:
            D, I = rerank(features, query.raw, I)
        near = [
            Neighbour(row, **place_of(shards, offsets, row), score=score)
            for row, score in zip(I[: options.k].tolist(), D[: options.k].tolist(), strict=True)
        ]
        own = None
        if query.row is not None:
            own = Neighbour(query.row, **place_of(shards, offsets, query.row))
        result.answers.append(Answer(query.name, own, near))
    return result


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
    """Return the features that were indexed: those given, or where the manifest says they lie.

    Returns
    -------
    features : Features or None
    of : str
        ``features`` or ``descriptors``.
    why : str
        Why there are none.

    Raises
    ------
    SnipError
        If those given are not there, or not as many rows as the index.
    """
    if not options.rerank:
        return None, "", "--rerank 0"
    settings, given = index.manifest["settings"], options.features is not None
    source = options.features or index.manifest.get("features_at")
    if source is None:
        return None, "", "it is not known where the features lie; name them with --features"
    how = {name: settings.get(name) for name in ("parts", "array", "column")}
    if given:
        how = {name: getattr(options, name) or value for name, value in how.items()}
        if "{part" not in str(source):
            how["parts"] = options.parts
    try:
        features = open_features(source, **how)
    except SnipError as error:
        if given:
            raise
        return None, "", f"the features are not where they were ({error})"
    of = "descriptors" if is_descriptors(source) else "features"
    if given:
        index.refuse_other_rows(features, f"--features {source}")
        return features, of, ""
    now, then = request_of(features), index.manifest["request"]
    if any(now[name] != then.get(name) for name in now):
        return None, "", f"{source} changed since; if the rows are the same, give --features"
    return features, of, ""


def open_table_of(index: Index, options: Search) -> Any:
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


def describe_rows(result: SearchResult, metadata: Any) -> None:
    """Fill in key, url and caption of every row shown."""
    from snipdedup.metadata.tables import KEY_COLUMNS
    from snipdedup.metadata.texts import CAPTIONS, URLS, RowTexts

    texts = RowTexts(metadata)
    shown = [n for a in result.answers for n in (*a.neighbours, *([a.row] if a.row else []))]
    rows = np.array([neighbour.row for neighbour in shown], np.int64)
    for name, wanted in zip(TEXTS, (KEY_COLUMNS, URLS, CAPTIONS), strict=True):
        values = texts.read(texts.find(wanted=wanted), rows)
        for neighbour in shown:
            setattr(neighbour, name, values.get(neighbour.row))


def render_page(index: str, result: SearchResult) -> str:
    """Return the page of neighbours as tiles; it loads nothing."""
    styles = (TEMPLATES / "report.css").read_text("utf-8")
    return render_template(
        "search.html.j2",
        policy=f"default-src 'none'; style-src {content_hash(styles)}; base-uri 'none'; "
        "form-action 'none'",
        styles=styles,
        index=index,
        how=result.how,
        answers=[
            {
                "query": page_text(answer.query, PAGE_WIDTHS["query"]),
                "row": tile(answer.row) if answer.row else None,
                "neighbours": [tile(near) for near in answer.neighbours],
            }
            for answer in result.answers
        ],
    )


def tile(row: Neighbour) -> dict[str, str]:
    """Return a row as the template takes it: texts cut, and a link only where it is safe."""
    texts = {name: page_text(getattr(row, name) or "", PAGE_WIDTHS[name]) for name in TEXTS}
    return {
        **texts,
        "row": f"{row.row:,}",
        "shard": row.shard,
        "shard_row": f"{row.shard_row:,}",
        "link": safe_link(row.url or ""),
        "score": "" if row.score is None else f"{row.score:.4f}",
    }
