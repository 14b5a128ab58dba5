"""``snip download``: fetch metadata files and filter them by a mask as they land.

A file's place in the mask is its place in the unfiltered set, whatever part of it is fetched.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from snipdedup import progress, store, web
from snipdedup.errors import SnipError, UsageError
from snipdedup.masks import (
    FILES,
    HOW_TO_PLACE,
    Held,
    Mask,
    check_sizes,
    choose_files,
    file_numbers,
    open_mask,
    place_metadata,
    rows_of,
    stamp,
    summary,
)
from snipdedup.metadata import Metadata, find_metadata, open_metadata, write_kept
from snipdedup.settings import Download
from snipdedup.tables import SUFFIXES, open_table

KIND = "download"
RAW = "raw"  # below the work folder: what is fetched and not yet filtered


@dataclass(frozen=True)
class Item:
    """One file to fetch: a URL or a path, and its number in the whole set where it is known."""

    location: str
    number: int | None

    @property
    def remote(self) -> bool:
        """Whether it is a URL."""
        return web.is_url(self.location)

    @property
    def name(self) -> str:
        """The file's name."""
        return web.name_of(self.location) if self.remote else Path(self.location).name

    @property
    def shown(self) -> str:
        """The location, as messages and manifests may show it."""
        return web.shown(self.location) if self.remote else self.location


def run(options: Download) -> str:
    """Fetch a range of metadata files: ``snip download``."""
    out = Path(options.out).expanduser()
    items = find_items(options.source, options.start, options.end)
    check_names(items)
    named = (options.source, options.is_dup, options.cumulative_sizes)
    local = [Path(n).expanduser() for n in named if n] + [Path(i.location) for i in items]
    store.refuse_output_inside(out, [path for path in local if path.exists()])
    with published(options, out) as mask:
        first_row = None if mask is None else place_items(items, options, mask, out)
        request = {
            "files": [describe_source(item) for item in items],
            "mask": mask and {"rows": mask.rows, "sha256": store.sha256(mask.path)},
            "first_row": first_row,
        }
        if store.claim(out, KIND, request, overwrite=options.overwrite) == "done":
            return f"{out} is finished already: {summary(store.read_manifest(out, KIND)['files'])}"
        described = fetch_all(items, out / store.WORK, mask, first_row or 0)
    parts = [out / store.WORK / FILES / file["name"] for file in described]
    hidden = ("source", "is_dup", "cumulative_sizes")
    settings = {**options.as_dict(), **{name: public(getattr(options, name)) for name in hidden}}
    body = {"settings": settings, "request": request, "files": described}
    store.publish(out, KIND, body, parts)
    return f"{out}: {summary(described)}"


def public(location: str | None) -> str | None:
    """Return a location without what a URL may hide."""
    return web.shown(location) if location and web.is_url(location) else location


def find_items(source: str, start: int | None, end: int | None) -> list[Item]:
    """Return the files that SOURCE and a range of file numbers mean, in order.

    Raises
    ------
    UsageError
        If a template comes without ``--end``.
    SnipError
        If a local file is not there, or it is not certain which ones are meant.
    """
    if "{part" in source:
        if end is None:
            raise UsageError(f"{public(source)} needs file numbers: --start 0 --end 10, say")
        return [Item(expand(source, number), number) for number in range(start or 0, end)]
    if web.is_url(source):
        if end is not None and end != (start or 0) + 1:
            raise UsageError(
                f"{public(source)} is one file; for several put {{part:04d}} where the number is"
            )
        return [Item(source, start if start is not None else end and end - 1)]
    paths = [str(path) for path in find_metadata(source)]
    if start is None and end is None:
        return [Item(path, None) for path in paths]
    numbers = file_numbers(paths)
    start = start or 0
    end = end or (max(numbers) + 1 if numbers else len(paths))
    held = Held(paths, [0] * len(paths))
    if start >= end:
        raise SnipError(f"file {start} is wanted, {public(source)} ends at {end - 1}")
    first = choose_files(held, numbers, None, start, end)
    return [Item(paths[first + n - start], n) for n in range(start, end)]


def expand(template: str, number: int) -> str:
    """Put a file number into a template."""
    try:
        location = template.format(part=number)
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(
            f"{public(template)}: expected a template such as metadata_{{part:04d}}.parquet"
        ) from error
    if web.is_url(location):
        return location
    path = Path(location).expanduser()
    if not path.is_file():
        raise SnipError(f"no such file: {path}")
    return str(path)


def check_names(items: Sequence[Item]) -> None:
    """Refuse files that would have one name, or are no metadata by their names."""
    seen: dict[str, Item] = {}
    for item in items:
        name = Path(item.name)
        if name.suffix.lower() not in SUFFIXES:
            raise SnipError(f"{item.shown}: expected a name that ends in {' or '.join(SUFFIXES)}")
        if name.stem in seen:
            raise SnipError(
                f"{seen[name.stem].shown} and {item.shown} would have one name in the output"
            )
        seen[name.stem] = item


@contextmanager
def published(options: Download, out: Path) -> Iterator[Mask | None]:
    """Yield the mask, None without one; fetched files are gone after the block."""
    if options.is_dup is None:
        yield None
        return
    totals = options.cumulative_sizes
    if not (web.is_url(options.is_dup) or (totals and web.is_url(totals))):
        yield open_mask(options.is_dup, totals)
        return
    with scratch(out) as folder:
        mask = local_copy(options.is_dup, folder / "mask")
        if web.is_url(options.is_dup):
            fetch_manifest(options.is_dup, mask.parent)
        yield open_mask(mask, totals and local_copy(totals, folder / "totals"))


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """Yield a folder on the disk of ``out`` (masks are large) that is gone after the block."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def local_copy(location: str, folder: Path) -> Path:
    """Return a path as it is; fetch a URL into ``folder``."""
    if not web.is_url(location):
        return Path(location)
    target = folder / web.name_of(location)
    web.save(location, target)
    return target


def fetch_manifest(mask_url: str, folder: Path) -> None:
    """Fetch the manifest beside a mask, where there is one."""
    try:
        web.save(urljoin(mask_url, store.MANIFEST), folder / store.MANIFEST)
        store.load_json(folder / store.MANIFEST)
    except web.MissingError:
        return
    except SnipError:  # some servers answer every name with a page
        (folder / store.MANIFEST).unlink(missing_ok=True)


def place_items(items: Sequence[Item], options: Download, mask: Mask, out: Path) -> int:
    """Return the row of the set at which the first file begins; check what is known by now.

    Raises
    ------
    SnipError
        If it is not certain.
    """
    if not (web.is_url(options.source) or "{part" in options.source):
        metadata = open_metadata(options.source)
        number = items[0].number
        end = None if number is None else number + len(items)
        place = place_metadata(metadata, mask, number, end)
        return place.offset + int(metadata.offsets[place.first])
    first, count = items[0].number, len(items)
    if first is None:
        return 0  # one file without a number is the whole set; its rows are checked as it lands
    if mask.sizes is not None:
        if first + count > len(mask.sizes):
            raise SnipError(
                f"files {first} to {first + count - 1} are wanted, the mask's set has 0 to "
                f"{len(mask.sizes) - 1}"
            )
        return int(mask.sizes[:first].sum())
    if "{part" not in options.source:
        raise SnipError(f"at which row {items[0].shown} begins is not known; {HOW_TO_PLACE}")
    return rows_before(options.source, first, out)


def rows_before(template: str, first: int, out: Path) -> int:
    """Count the rows of files 0 to ``first``, by their footers where the server sends ranges."""
    rows = 0
    for number in progress.track(range(first), "rows of earlier files", "files", first):
        try:
            rows += count_rows(expand(template, number), out)
        except SnipError as error:
            raise SnipError(
                f"the mask's place needs the rows of file {number}: {error}; or {HOW_TO_PLACE}"
            ) from error
    return rows


def count_rows(location: str, out: Path) -> int:
    """Return the rows of one file; a server that sends no ranges has to send all of it."""
    if not web.is_url(location):
        return open_table(Path(location)).rows
    name = Path(web.name_of(location))
    rows = web.parquet_rows(location) if name.suffix.lower() == ".parquet" else None
    if rows is not None:
        return rows
    with scratch(out) as folder:
        web.save(location, folder / name)
        return open_table(folder / name).rows


def describe_source(item: Item) -> dict[str, Any]:
    """Return what a request says of a file: a local one must not have changed."""
    found: dict[str, Any] = {"source": item.shown, "number": item.number}
    return found if item.remote else {**found, **stamp(Path(item.location))}


def fetch_all(
    items: Sequence[Item], work: Path, mask: Mask | None, first_row: int
) -> list[dict[str, Any]]:
    """Fetch and filter files one after another; return what the manifest says of each.

    What a stopped run completed, its notes in the work folder say.
    """
    described = []
    row = first_row
    for item in progress.track(items, "download", "files", len(items)):
        note = work / RAW / f"{item.name}.json"
        about = store.load_json(note) if note.is_file() else {}
        if not about or not (work / FILES / about["name"]).is_file():
            about = {**fetch_one(item, work, mask, row), "first_row": row}
            store.save_json(note, about)
        described.append(about)
        row += about["rows"]
    return described


def fetch_one(item: Item, work: Path, mask: Mask | None, row: int) -> dict[str, Any]:
    """Fetch one file whose first row is ``row`` of the set, check it, filter it."""
    raw = work / RAW / item.name
    if item.remote:
        sent = web.save(item.location, raw)
    else:
        with store.replacing(raw) as part:
            shutil.copyfile(item.location, part)
        sent = {"size": raw.stat().st_size, "etag": None}
    try:
        table = open_table(raw)
    except SnipError as error:
        raise SnipError(f"{item.shown}: what came is no metadata: {error}") from error
    about = {"source": item.shown, "number": item.number, **sent, "rows": table.rows}
    if mask is None:
        (work / FILES).mkdir(parents=True, exist_ok=True)
        target = raw.replace(work / FILES / item.name)
        return {"name": target.name, **about, "kept": table.rows}
    check_place(item, table.rows, mask, row)
    (target,) = write_kept(Metadata([table]), mask.is_dup, work / FILES, offset=row)
    raw.unlink()
    return {"name": target.name, **about, "kept": rows_of(target)}


def check_place(item: Item, rows: int, mask: Mask, row: int) -> None:
    """Refuse a file whose rows are not those that the mask has for it."""
    if item.number is not None and mask.sizes is not None and item.number < len(mask.sizes):
        check_sizes(Held([item.shown], [rows]), mask.sizes, item.number)
    if item.number is None and item.remote and rows != mask.rows:
        raise SnipError(
            f"{item.shown} has {rows:,} rows, the mask {mask.rows:,}; they must be the same set "
            "(for one file of it, say which with --start)"
        )
    if row + rows > mask.rows:
        raise SnipError(
            f"{item.shown} is rows {row:,} to {row + rows:,} of its set, the mask has "
            f"{mask.rows:,}; they do not belong to the same set"
        )
