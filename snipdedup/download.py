"""``snip download``: fetch files of metadata, and features, and filter them as they land.

A file's place in the mask is its place in the unfiltered set, whatever part of it is fetched.
What is asked is claimed before anything is fetched; a stopped run goes on with the commit, the
mask and the row counts that it began with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import artefacts, buckets, landing, presets, progress, sources, store, web
from snipdedup.errors import SnipError
from snipdedup.formats import SUFFIXES as FEATURE_SUFFIXES
from snipdedup.hub import SCHEME, HubFolder
from snipdedup.landing import Watch
from snipdedup.masks import (
    FILES,
    HOW_TO_PLACE,
    MASK,
    Held,
    Mask,
    check_sizes,
    open_mask,
    place_metadata,
    rows_of,
    stamp,
    summary,
)
from snipdedup.metadata import Metadata, open_metadata, write_kept
from snipdedup.remote import (
    Folder,
    MissingError,
    Remote,
    TemporaryError,
    beside,
    is_web,
    scheme_of,
    shown,
)
from snipdedup.settings import Download
from snipdedup.sources import Found
from snipdedup.staying import feature_rows, write_staying
from snipdedup.tables import SUFFIXES, open_table
from snipdedup.transfers import side_by_side

KIND = "download"
RAW = "raw"  # below the work folder: what is fetched and not yet filtered
PINNED = "pinned.json"  # in the work folder: what a stopped run began with
PUBLISHED = "published"  # below the work folder: mask, totals, and the manifest beside the mask
IMAGES, TABLES = sources.FEATURES


@dataclass(frozen=True)
class Item:
    """One file of metadata to fetch, its number in the set where known, and its features."""

    table: Remote
    number: int | None
    features: Remote | None = None


@dataclass(frozen=True)
class Plan:
    """What a run fetches, and the row of the mask at which it begins."""

    items: list[Item]
    mask: Mask | None
    first_row: int


def run(options: Download) -> str:
    """Fetch a range of metadata files, or a published folder: ``snip download``."""
    if options.out is None:
        raise SnipError(presets.LAION)
    source = presets.resolve(options.source)
    sources.refuse_unclear(source, options.end)
    out = Path(options.out).expanduser()
    # A hub is asked once the folder is claimed, and then for the commit that the run began with.
    meant = None if scheme_of(source) == SCHEME or is_folder(source) else look(options, source)
    refuse_overlap(options, source, out, meant)
    request = asked(options, source, meant)
    held = held_kind(out)
    if held not in (None, KIND) and not options.overwrite:
        return published_already(options, source, out, str(held))
    state = store.claim(out, held or KIND, request, overwrite=options.overwrite)
    if state == "done":
        return f"{out} is finished already: {said(store.read_manifest(out, KIND)['files'])}"
    try:
        meant = meant or look(options, source, pinned(out).get("revision"))
        if isinstance(meant, Remote):
            published = artefacts.read(meant, out / store.WORK / store.MANIFEST)
        else:
            remember(out, revision=commit_of(meant.folder))
            plan = make_plan(options, source, meant, out)
    except TemporaryError:
        raise  # what came stays
    except SnipError:
        if state == "new":
            store.release(out)
        raise
    if isinstance(meant, Remote):
        return artefacts.fetch(out, meant, published, options.jobs)
    return fetch_set(options, request, plan, out)


def look(options: Download, source: str, commit: str | None = None) -> Found | Remote:
    """Return the files that are meant, or the manifest where it is a whole published folder."""
    if wants_all(options) and sources.PART not in source:
        manifest = landing.patiently(lambda: find_manifest(source, commit))
        if manifest is not None:
            return manifest
    found = landing.patiently(lambda: sources.find(source, options.start, options.end, commit))
    check_names(found.files, SUFFIXES)
    return found


def find_manifest(source: str, commit: str | None) -> Remote | None:
    """Return the manifest of a published folder, None where there is none."""
    if is_web(source):
        return artefacts.manifest_at(source) if is_folder(source) else None
    folder, names = sources.open_folder(source, commit)
    return folder.listing()[0].get(store.MANIFEST) if names is None else None


def is_folder(source: str) -> bool:
    """Tell an http(s) folder, which must be a published one, from a file or a template."""
    last = shown(source).rpartition("/")[2]
    return is_web(source) and sources.PART not in source and not sources.names_files(last)


def wants_all(options: Download) -> bool:
    """Tell whether neither a part nor a filter is asked for: a published folder may be meant."""
    asked = (options.start, options.end, options.is_dup, options.embeddings_source)
    return not options.embeddings and all(value is None for value in asked)


def refuse_overlap(options: Download, source: str, out: Path, meant: Found | Remote | None) -> None:
    """Refuse to write into an input."""
    named = [source, options.is_dup, options.cumulative_sizes, options.embeddings_source]
    named += [file.url for file in meant.files] if isinstance(meant, Found) else []
    local = [Path(name).expanduser() for name in named if name and not scheme_of(name)]
    store.refuse_output_inside(out, [path for path in local if path.exists()])


def check_names(files: Sequence[Remote], suffixes: Sequence[str]) -> None:
    """Refuse files that would have one name, or cannot be what is wanted by their names."""
    seen: dict[str, Remote] = {}
    for file in files:
        name = Path(file.name)
        if name.suffix.lower() not in suffixes:
            raise SnipError(f"{file.shown}: expected a name that ends in {' or '.join(suffixes)}")
        if name.stem in seen:
            raise SnipError(
                f"{seen[name.stem].shown} and {file.shown} would have one name in the output"
            )
        seen[name.stem] = file


def asked(options: Download, source: str, meant: Found | Remote | None) -> dict[str, Any]:
    """Return what the result depends on, as far as it is known before anything is fetched.

    Files that can be looked at must not have changed; what a hub holds is pinned by its commit.
    """
    stamps = None
    if isinstance(meant, Found) and not is_web(source):
        stamps = [version_of(file) for file in meant.files]
    elsewhere = options.embeddings_source
    return {
        "source": shown(source),
        "start": options.start,
        "end": options.end,
        "embeddings": options.embeddings or elsewhere is not None,
        "embeddings_source": elsewhere and shown(elsewhere),
        "mask": options.is_dup and identity(options.is_dup),
        "cumulative_sizes": options.cumulative_sizes and identity(options.cumulative_sizes),
        "files": stamps,
    }


def version_of(file: Remote) -> dict[str, Any]:
    """Return what tells a file from a later one of its name."""
    local = {} if scheme_of(file.url) else stamp(Path(file.url))
    return {"source": file.shown, "size": file.size, **local}


def identity(location: str) -> dict[str, Any]:
    """Return what a request says of a mask or of totals: of a local one what it holds."""
    if scheme_of(location):
        return {"source": shown(location)}
    path = Path(location).expanduser()
    path = open_mask(path).path if path.is_dir() else path
    if not path.is_file():
        raise SnipError(f"no such file: {path}")
    return {"sha256": store.sha256(path)}


def held_kind(out: Path) -> str | None:
    """Return the kind of the finished folder that is there, None without one."""
    path = out / store.MANIFEST
    found = store.load_json(path) if path.is_file() else None
    return found.get("kind") if isinstance(found, dict) else None


def published_already(options: Download, source: str, out: Path, kind: str) -> str:
    """Say that a published folder was fetched before; refuse a folder that is another one."""
    with tempfile.TemporaryDirectory() as scratch:
        meant = look(options, source)
        copy = Path(scratch) / store.MANIFEST
        if isinstance(meant, Remote) and artefacts.holds(out, artefacts.read(meant, copy), copy):
            return f"{out} is finished already: {kind}, as {shown(source)}"
    raise SnipError(
        f"{out} holds a finished {kind}, not what {shown(source)} is now; choose another folder, "
        "or replace it with --overwrite"
    )


def pinned(out: Path) -> dict[str, Any]:
    """Return what a stopped run began with."""
    path = out / store.WORK / PINNED
    return dict(store.load_json(path)) if path.is_file() else {}


def remember(out: Path, **facts: Any) -> None:
    """Add to what a stopped run goes on with."""
    store.save_json(out / store.WORK / PINNED, {**pinned(out), **facts})


def commit_of(folder: Folder | None) -> str | None:
    """Return the commit that a listing is of, None where there is no such thing."""
    return folder.repository.commit if isinstance(folder, HubFolder) else None


def make_plan(options: Download, source: str, found: Found, out: Path) -> Plan:
    """Return what to fetch; the mask is here after it, and where it begins is certain."""
    numbers = [None if found.first is None else found.first + i for i in range(len(found.files))]
    features: Sequence[Remote | None] = [None] * len(found.files)
    if options.embeddings or options.embeddings_source:
        commit = pinned(out).get("revision")
        wanted = sources.find_features(source, found, options.embeddings_source, commit)
        check_names(wanted, FEATURE_SUFFIXES)
        features = wanted
    items = list(map(Item, found.files, numbers, features))
    if options.is_dup is None:
        return Plan(items, None, 0)
    mask = published_mask(options.is_dup, options.cumulative_sizes, out)
    begun = pinned(out).get("first_row")
    first_row = place(options, source, found, mask, out) if begun is None else begun
    remember(out, first_row=first_row)
    return Plan(items, mask, first_row)


def published_mask(spec: str, totals: str | None, out: Path) -> Mask:
    """Open the mask; what is not local is brought into the work folder first."""
    folder = out / store.WORK / PUBLISHED
    mask = Path(spec)
    if scheme_of(spec):
        if not spec.partition("?")[0].endswith(".npy"):
            spec = beside(f"{spec.partition('?')[0].rstrip('/')}/{MASK}", MASK)
        mask = local_copy(sources.one_file(spec), folder / "mask")
        fetch_manifest(spec, folder / "mask")
    if totals is not None and scheme_of(totals):
        totals = str(local_copy(sources.one_file(totals), folder / "totals"))
    return open_mask(mask, totals)


def local_copy(remote: Remote, folder: Path) -> Path:
    """Bring one file into a folder, unless it is there."""
    target = folder / remote.name
    if not target.is_file():
        with progress.bar(remote.size or 0, remote.name, "B") as bar:
            landing.save(remote, target, Watch(bar))
    return target


def fetch_manifest(mask: str, folder: Path) -> None:
    """Fetch the manifest beside a mask, where there is one."""
    target = folder / store.MANIFEST
    try:
        landing.save(sources.one_file(beside(mask, store.MANIFEST)), target)
        store.load_json(target)
    except MissingError:
        return
    except TemporaryError:
        raise
    except SnipError:  # some servers answer every name with a page
        target.unlink(missing_ok=True)


def place(options: Download, source: str, found: Found, mask: Mask, out: Path) -> int:
    """Return the row of the set at which the first file begins; check what is known by now.

    Raises
    ------
    SnipError
        If it is not certain.
    """
    first, count = found.first, len(found.files)
    if not scheme_of(source) and sources.PART not in source:
        metadata = open_metadata(source)
        placed = place_metadata(metadata, mask, first, None if first is None else first + count)
        return placed.offset + int(metadata.offsets[placed.first])
    if first is None:
        rows = mask.rows if is_web(source) else count_rows(found.files, out, options.jobs)
        if rows != mask.rows:  # one URL is compared as it lands
            raise SnipError(
                f"{shown(source)} has {rows:,} rows in {count} files, the mask {mask.rows:,}; they "
                "must be the same set (for some files of it, say which with --start and --end)"
            )
        return 0
    if mask.sizes is not None:
        if first + count > len(mask.sizes):
            raise SnipError(
                f"files {first} to {first + count - 1} are wanted, the mask's set has 0 to "
                f"{len(mask.sizes) - 1}"
            )
        return int(mask.sizes[:first].sum())
    if found.before is None:
        raise SnipError(f"at which row {found.files[0].shown} begins is not known; {HOW_TO_PLACE}")
    return count_rows(found.before, out, options.jobs)


def count_rows(files: Sequence[Remote], out: Path, jobs: int) -> int:
    """Count the rows of files, by their footers where the other side sends parts."""

    def count(file: Remote) -> int:
        try:
            return landing.patiently(lambda: rows_in(file, out), watch)
        except TemporaryError:
            raise
        except SnipError as error:
            raise SnipError(
                f"the mask's place needs the rows of {file.name}: {error}; or {HOW_TO_PLACE}"
            ) from error

    watch = Watch()
    counted = side_by_side(count, files, jobs, watch)
    return sum(progress.track(counted, "rows of earlier files", "files", len(files)))


def rows_in(file: Remote, out: Path) -> int:
    """Return the rows of one file; where parts are not sent, all of it has to come."""
    rows: int | None = None
    if not scheme_of(file.url):
        return open_table(Path(file.url)).rows
    if Path(file.name).suffix.lower() == ".parquet":
        rows = web.parquet_rows(file) if is_web(file.url) else buckets.parquet_rows(file)
    if rows is None:
        copy = out / store.WORK / "counted" / file.name
        landing.save(file, copy)
        rows = open_table(copy).rows
        copy.unlink()
    return rows


def fetch_set(options: Download, request: dict[str, Any], plan: Plan, out: Path) -> str:
    """Fetch and filter the files of a plan; write the manifest."""
    described = list(land_each(plan, out / store.WORK, options.jobs))
    files = out / store.WORK / FILES
    parts = [files / place_of(file["name"], TABLES, plan) for file in described]
    parts += [files / IMAGES / file["features"] for file in described if "features" in file]
    hidden = ("source", "is_dup", "cumulative_sizes", "embeddings_source")
    given = {name: getattr(options, name) for name in hidden}
    shows = {name: value and shown(value) for name, value in given.items()}
    body = {
        "settings": {**options.as_dict(), **shows},
        "request": request,
        "revision": pinned(out).get("revision"),
        "mask": plan.mask and {"rows": plan.mask.rows, "sha256": store.sha256(plan.mask.path)},
        "first_row": plan.first_row if plan.mask else None,
        "files": described,
    }
    store.publish(out, KIND, body, parts)
    return f"{out}: {said(described)}"


def place_of(name: str, folder: str, plan: Plan) -> Path:
    """Return where a file goes below OUT: with features beside them, the tables have a folder."""
    return Path(folder, name) if plan.items[0].features else Path(name)


def said(files: Sequence[dict[str, Any]]) -> str:
    """Say in one line what came."""
    features = sum("features" in file for file in files)
    return summary(files) + (f", with features of {features} files" if features else "")


def land_each(plan: Plan, work: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Fetch files side by side, filter them in order; yield what the manifest says of each.

    What a stopped run completed, its notes in the work folder say.
    """
    notes = [work / RAW / f"{item.table.name}.json" for item in plan.items]
    pending = [item for item, note in zip(plan.items, notes, strict=True) if not note.is_file()]
    coming = [remote for item in pending for remote in (item.table, item.features) if remote]
    row = plan.first_row
    with progress.bar(sum(file.size or 0 for file in coming), "download", "B") as bar:
        watch = Watch(bar)

        def fetch(item: Item) -> dict[str, Any]:
            sent = landing.save(item.table, work / RAW / item.table.name, watch)
            if item.features is not None:
                landing.save(item.features, work / RAW / IMAGES / item.features.name, watch)
            return sent

        arriving = side_by_side(fetch, pending, jobs, watch)
        for item, note in zip(plan.items, notes, strict=True):
            if note.is_file():
                about = store.load_json(note)
            else:
                sent = next(arriving)
                about = {**sent, **land(item, plan, work, row), "first_row": row}
                store.save_json(note, about)
                drop_raw(item, work)
            yield about
            row += about["rows"]


def land(item: Item, plan: Plan, work: Path, row: int) -> dict[str, Any]:
    """Check one file whose first row is ``row`` of the set, and its features; filter them."""
    raw = work / RAW / item.table.name
    try:
        table = open_table(raw)
    except SnipError as error:
        raw.unlink(missing_ok=True)
        raise SnipError(f"{item.table.shown}: what came is no metadata: {error}") from error
    about = {"source": item.table.shown, "number": item.number, "rows": table.rows}
    stay = None
    if plan.mask is not None:
        alone = item.number is None and len(plan.items) == 1
        stay = staying(item, table.rows, plan.mask, row, alone=alone)
    about |= land_features(item, table.rows, stay, work)
    folder = (work / FILES / place_of(raw.name, TABLES, plan)).parent
    if stay is None or plan.mask is None:
        folder.mkdir(parents=True, exist_ok=True)
        target = raw.replace(folder / raw.name)
        return {"name": target.name, **about, "kept": table.rows}
    (target,) = write_kept(Metadata([table]), plan.mask.is_dup, folder, offset=row)
    return {"name": target.name, **about, "kept": rows_of(target)}


def land_features(item: Item, rows: int, stay: np.ndarray | None, work: Path) -> dict[str, Any]:
    """Check the features of one file against its rows; filter them."""
    if item.features is None:
        return {}
    raw = work / RAW / IMAGES / item.features.name
    try:
        found = feature_rows(raw)
    except SnipError as error:
        raw.unlink(missing_ok=True)
        raise SnipError(f"{item.features.shown}: what came is no features: {error}") from error
    if found != rows:
        raise SnipError(
            f"{item.features.shown} has {found:,} rows, its metadata {item.table.shown} {rows:,}; "
            "they do not belong together"
        )
    target = work / FILES / IMAGES / raw.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if stay is None:
        raw.replace(target)
    else:
        write_staying(raw, target, stay)
    return {"features": raw.name, "features_source": item.features.shown}


def drop_raw(item: Item, work: Path) -> None:
    """Remove what was fetched and is filtered now."""
    (work / RAW / item.table.name).unlink(missing_ok=True)
    if item.features is not None:
        (work / RAW / IMAGES / item.features.name).unlink(missing_ok=True)


def staying(item: Item, rows: int, mask: Mask, row: int, *, alone: bool) -> np.ndarray:
    """Return which rows of a file stay, (rows,) bool; refuse a file that is not the mask's.

    ``alone``: it is all of the set.
    """
    file = item.table
    if item.number is not None and mask.sizes is not None and item.number < len(mask.sizes):
        check_sizes(Held([file.shown], [rows]), mask.sizes, item.number)
    if alone and rows != mask.rows:
        raise SnipError(
            f"{file.shown} has {rows:,} rows, the mask {mask.rows:,}; they must be the same set "
            "(for one file of it, say which with --start)"
        )
    if row + rows > mask.rows:
        raise SnipError(
            f"{file.shown} is rows {row:,} to {row + rows:,} of its set, the mask has "
            f"{mask.rows:,}; they do not belong to the same set"
        )
    return ~np.asarray(mask.is_dup[row : row + rows])
