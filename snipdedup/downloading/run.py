"""``snip download``: fetch files of metadata, and features, and filter them as they land.

A file's place in the mask is its place in the unfiltered set, whatever part of it is fetched.
What is asked is claimed before anything is fetched; a stopped run goes on with the commit, the
mask and the row counts that it began with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import progress
from snipdedup.config import Download
from snipdedup.downloading import presets, published, sources, transfer
from snipdedup.downloading.hub import SCHEME, HubFolder
from snipdedup.downloading.parallel import side_by_side
from snipdedup.downloading.placing import place, published_mask, settled
from snipdedup.downloading.sources import Found
from snipdedup.downloading.transfer import Watch
from snipdedup.errors import SnipError
from snipdedup.features.formats import SUFFIXES as FEATURE_SUFFIXES
from snipdedup.metadata.kept_rows import FILES, feature_rows, write_kept, write_kept_features
from snipdedup.metadata.masks import (
    FileSizes,
    Mask,
    check_sizes,
    describe_kept,
    file_version,
    open_mask,
)
from snipdedup.metadata.tables import SUFFIXES, Metadata, open_table
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.manifest import MANIFEST, is_finished, read_manifest
from snipdedup.storage.urls import (
    Folder,
    Remote,
    TemporaryError,
    is_web,
    redacted,
    scheme_of,
)

KIND = "download"
RAW = "raw"  # below the work folder: what is fetched and not yet filtered
PINNED = "pinned.json"  # in the work folder: what a stopped run began with
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


@locks.released()
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
    held = finished(out)
    kind = held.get("kind", KIND)
    if held and not options.overwrite and not is_ours(held, options, source):
        return published_already(options, source, out, kind)
    state = out_folder.claim(out, kind, request, overwrite=options.overwrite)
    if state == "done":
        return f"{out} is finished already: {said(read_manifest(out, KIND)['files'])}"
    try:
        meant = meant or look(options, source, pinned(out).get("revision"))
        if isinstance(meant, Remote):
            files = published.read(meant, out / locks.WORK / MANIFEST)
        else:
            remember(out, revision=commit_of(meant.folder))
            plan = make_plan(options, source, meant, out)
    except TemporaryError:
        raise  # what came stays
    except SnipError:
        if state == "new":
            out_folder.release(out)
        raise
    if isinstance(meant, Remote):
        return published.fetch(out, meant, files, options.jobs)
    return fetch_set(options, request, plan, out)


def look(options: Download, source: str, commit: str | None = None) -> Found | Remote:
    """Return the files that are meant, or the manifest where it is a whole published folder."""

    def ask() -> Found | Remote:
        if is_folder(source) and wants_all(options):
            return published.manifest_at(source)
        opened = None if is_web(source) else sources.open_folder(source, commit)
        if opened is not None and opened.names is None and wants_all(options):
            manifest = opened.folder.files.get(MANIFEST)
            if manifest is not None:
                return manifest
        return sources.find(source, options.start, options.end, opened)

    meant = transfer.patiently(ask)
    if isinstance(meant, Found):
        check_names(meant.files, SUFFIXES)
    return meant


def is_folder(source: str) -> bool:
    """Tell an http(s) folder, which must be a published one, from a file or a template."""
    last = redacted(source).rpartition("/")[2]
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
    out_folder.refuse_output_inside(out, [path for path in local if path.exists()])


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
        "source": redacted(source),
        "start": options.start,
        "end": options.end,
        "embeddings": options.embeddings or elsewhere is not None,
        "embeddings_source": elsewhere and redacted(elsewhere),
        "mask": options.is_dup and identity(options.is_dup),
        "cumulative_sizes": options.cumulative_sizes and identity(options.cumulative_sizes),
        "files": stamps,
    }


def version_of(file: Remote) -> dict[str, Any]:
    """Return what tells a file from a later one of its name."""
    local = {} if scheme_of(file.url) else file_version(Path(file.url))
    return {"source": file.shown, "size": file.size, **local}


def identity(location: str) -> dict[str, Any]:
    """Return what a request says of a mask or of totals: of a local one what it holds."""
    if scheme_of(location):
        return {"source": redacted(location)}
    path = Path(location).expanduser()
    path = open_mask(path).path if path.is_dir() else path
    if not path.is_file():
        raise SnipError(f"no such file: {path}")
    return {"sha256": atomic.sha256(path)}


def finished(out: Path) -> dict[str, Any]:
    """Return the manifest of the finished folder that is there, nothing without one."""
    found = atomic.load_json(out / MANIFEST) if is_finished(out) else None
    return found if isinstance(found, dict) else {}


def is_ours(held: dict[str, Any], options: Download, source: str) -> bool:
    """Tell a folder that this command made from one that it fetched as it was published."""
    if held.get("kind") != KIND:
        return False
    return not wants_all(options) or held.get("request", {}).get("source") == redacted(source)


def published_already(options: Download, source: str, out: Path, kind: str) -> str:
    """Say that a published folder was fetched before; refuse a folder that is another one."""
    with tempfile.TemporaryDirectory() as scratch:
        meant = look(options, source)
        copy = Path(scratch) / MANIFEST
        if isinstance(meant, Remote) and published.holds(out, published.read(meant, copy), copy):
            return f"{out} is finished already: {kind}, as {redacted(source)}"
    raise SnipError(
        f"{out} holds a finished {kind}, not what {redacted(source)} is now; choose another "
        "folder, or replace it with --overwrite"
    )


def pinned(out: Path) -> dict[str, Any]:
    """Return what a stopped run began with."""
    path = out / locks.WORK / PINNED
    return dict(atomic.load_json(path)) if path.is_file() else {}


def remember(out: Path, **facts: Any) -> None:
    """Add to what a stopped run goes on with."""
    atomic.save_json(out / locks.WORK / PINNED, {**pinned(out), **facts})


def commit_of(folder: Folder | None) -> str | None:
    """Return the commit that a listing is of, None where there is no such thing."""
    return folder.repository.commit if isinstance(folder, HubFolder) else None


def make_plan(options: Download, source: str, found: Found, out: Path) -> Plan:
    """Return what to fetch; the mask is here after it, and where it begins is certain."""
    numbers = [None if found.first is None else found.first + i for i in range(len(found.files))]
    features: Sequence[Remote | None] = [None] * len(found.files)
    if options.embeddings or options.embeddings_source:
        commit = pinned(out).get("features_revision")
        elsewhere = options.embeddings_source
        wanted, folder = sources.find_features(source, found, elsewhere, commit)
        remember(out, features_revision=commit_of(folder))
        check_names(wanted, FEATURE_SUFFIXES)
        features = wanted
    items = list(map(Item, found.files, numbers, features))
    if options.is_dup is None:
        return Plan(items, None, 0)
    work = out / locks.WORK
    mask = published_mask(options.is_dup, options.cumulative_sizes, work)
    mask = settled(mask, found, work, options.jobs)
    begun = pinned(out).get("first_row")
    first_row = place(source, found, mask, work, options.jobs) if begun is None else begun
    remember(out, first_row=first_row)
    return Plan(items, mask, first_row)


def fetch_set(options: Download, request: dict[str, Any], plan: Plan, out: Path) -> str:
    """Fetch and filter the files of a plan; write the manifest."""
    described = list(land_each(plan, out / locks.WORK, options.jobs))
    parts = [part for about in described for part in targets(about, out / locks.WORK)]
    hidden = ("source", "is_dup", "cumulative_sizes", "embeddings_source")
    given = {name: getattr(options, name) for name in hidden}
    shows = {name: value and redacted(value) for name, value in given.items()}
    body = {
        "settings": {**options.as_dict(), **shows},
        "request": request,
        "revision": pinned(out).get("revision"),
        "features_revision": pinned(out).get("features_revision"),
        "mask": plan.mask and {"rows": plan.mask.rows, "sha256": atomic.sha256(plan.mask.path)},
        "first_row": plan.first_row if plan.mask else None,
        "files": described,
    }
    out_folder.publish(out, KIND, body, parts)
    return f"{out}: {said(described)}"


def said(files: Sequence[dict[str, Any]]) -> str:
    """Say in one line what came."""
    features = sum("features" in file for file in files)
    return describe_kept(files) + (f", with features of {features} files" if features else "")


def land_each(plan: Plan, work: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Fetch files side by side, filter them in order; yield what the manifest says of each.

    What a stopped run completed, its notes in the work folder say.
    """
    landed = {item.table.name: landed_before(item, plan, work) for item in plan.items}
    pending = [item for item in plan.items if not landed[item.table.name]]
    coming = [remote for item in pending for remote in (item.table, item.features) if remote]
    row = plan.first_row
    with progress.bar(sum(file.size or 0 for file in coming), "download", "B") as bar:
        watch = Watch(bar)
        arriving = side_by_side(lambda item: bring(item, work, watch), pending, jobs, watch)
        with closing(arriving):
            for item in plan.items:
                about = landed[item.table.name]
                if not about:
                    sent = next(arriving)
                    about = {**sent, **land(item, plan, work, row), "first_row": row}
                    seal_landed(item, about, plan, work)
                    settle(item, plan, work)
                yield about
                row += about["rows"]


def landed_before(item: Item, plan: Plan, work: Path) -> dict[str, Any]:
    """Return what a stopped run noted of a file that it completed, nothing of any other."""
    note = work / RAW / f"{item.table.name}.json"
    if not note.is_file():
        return {}
    settle(item, plan, work)  # it may have been stopped before or within that
    if not atomic.is_done(note, work / FILES):
        return {}
    return {
        key: said for key, said in atomic.load_json(note).items() if key not in ("files", "seal")
    }


def seal_landed(item: Item, about: dict[str, Any], plan: Plan, work: Path) -> None:
    """Note that a file is complete: what the manifest says of it, and what its bytes are."""
    there = targets(about, work)
    here = there
    if plan.mask is None:  # they are put in their places after the note
        here = [path for path, _ in raws(item, work)]
    names = [path.relative_to(work / FILES).as_posix() for path in there]
    lying = dict(zip(names, here, strict=True))
    atomic.write_done_file(work / RAW / f"{item.table.name}.json", lying, about)


def raws(item: Item, work: Path) -> list[tuple[Path, Remote]]:
    """Return where a file and its features land, and what they are."""
    found = [(work / RAW / item.table.name, item.table)]
    if item.features is not None:
        found.append((work / RAW / IMAGES / item.features.name, item.features))
    return found


def targets(about: dict[str, Any], work: Path) -> list[Path]:
    """Return where a file of metadata, and its features, lie once they are complete."""
    folder = work / FILES
    if "features" not in about:
        return [folder / about["name"]]
    return [folder / TABLES / about["name"], folder / IMAGES / about["features"]]


def bring(item: Item, work: Path, watch: Watch) -> dict[str, Any]:
    """Fetch what is not here yet of one file and its features."""
    told = []
    for raw, remote in raws(item, work):
        whole = raw.with_name(f"{raw.name}.whole.json")
        if atomic.is_done(whole, raw.parent):  # and not yet filtered when the run was stopped
            watch.at(raw, raw.stat().st_size)
            told.append({"size": raw.stat().st_size, "etag": None})
        else:
            told.append(transfer.save(remote, raw, watch))
            atomic.write_done_file(whole, [raw], {})
    return told[0]


def land(item: Item, plan: Plan, work: Path, row: int) -> dict[str, Any]:
    """Check one file whose first row is ``row`` of the set, and its features; filter them."""
    raw = work / RAW / item.table.name
    try:
        table = open_table(raw)
    except SnipError as error:
        raw.unlink(missing_ok=True)
        raise SnipError(f"{item.table.shown}: what came is no metadata: {error}") from error
    about = {"name": raw.name, "source": item.table.shown, "number": item.number}
    about |= {"rows": table.rows, "kept": table.rows, **check_features(item, table.rows, work)}
    if plan.mask is None:
        return about
    about["name"] = f"{raw.stem}.parquet"
    stay = staying(item, table.rows, plan, row)
    tables, *features = targets(about, work)
    write_kept(Metadata([table]), ~stay, tables.parent)
    for target in features:
        write_kept_features(work / RAW / IMAGES / target.name, target, ~stay)
    return {**about, "kept": int(np.count_nonzero(stay))}


def check_features(item: Item, rows: int, work: Path) -> dict[str, Any]:
    """Return what the manifest says of a file's features; refuse any that are not its own."""
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
    return {"features": raw.name, "features_source": item.features.shown}


def settle(item: Item, plan: Plan, work: Path) -> None:
    """Put what is not filtered in its place; remove what was."""
    names = {"name": item.table.name}
    if item.features is not None:
        names["features"] = item.features.name
    for (raw, _), target in zip(raws(item, work), targets(names, work), strict=True):
        if plan.mask is not None:
            raw.unlink(missing_ok=True)
        elif raw.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            raw.replace(target)


def staying(item: Item, rows: int, plan: Plan, row: int) -> np.ndarray:
    """Return which rows of a file stay, (rows,) bool; refuse a file that is not the mask's."""
    file, mask = item.table, plan.mask
    if mask is None:
        return np.ones(rows, bool)
    if item.number is not None and mask.sizes is not None and item.number < len(mask.sizes):
        check_sizes(FileSizes([file.shown], [rows]), mask.sizes, item.number)
    if item.number is None and len(plan.items) == 1 and rows != mask.rows:
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
