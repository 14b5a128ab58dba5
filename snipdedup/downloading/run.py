"""``snip download``: metadata files and features, filtered by a mask as they arrive.

A file's place in the mask is its place in the unfiltered set, whatever part of it is fetched. A
stopped run continues with the commit, the mask and the first row that it began with.
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
from snipdedup.downloading import hub, published, sources
from snipdedup.downloading.mask_rows import open_published_mask, place_mask
from snipdedup.downloading.sources import SourceFiles
from snipdedup.downloading.transfer import Monitor, SourceFile, fetch_file
from snipdedup.errors import SnipError, TemporaryError
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
from snipdedup.storage.listing import FEATURES, METADATA
from snipdedup.storage.manifest import MANIFEST, is_finished, read_manifest
from snipdedup.storage.remote import with_retries
from snipdedup.storage.urls import PART, is_web, redacted, scheme_of

KIND = "download"
ARRIVED = "arrived"  # below the work folder: fetched, not yet filtered
DONE = "done"  # below the work folder: one note for each file that is complete
PINNED = "pinned.json"  # in the work folder: what a stopped run began with


@dataclass(frozen=True)
class DownloadResult:
    """What ``snip download`` wrote."""

    out: Path
    kind: str  # "download", or that of a published result: "index", "encoder", "dedup"
    files: int  # of metadata, or of the published result
    rows: int  # of these files before and after the mask; 0 for a published result
    kept: int
    text: str  # the summary that the command prints

    def __str__(self) -> str:
        """Return the summary."""
        return self.text


@dataclass(frozen=True)
class Item:
    """One file of metadata to fetch, its number in the set if known, and its features."""

    table: SourceFile
    number: int | None
    features: SourceFile | None = None

    def place(self, folder: Path, suffix: str | None = None) -> list[tuple[SourceFile, Path]]:
        """Return its files, and where they lie in a folder that is laid out as OUT is."""
        name = self.table.name if suffix is None else Path(self.table.name).stem + suffix
        if self.features is None:
            return [(self.table, folder / name)]
        features = folder / FEATURES / self.features.name
        return [(self.table, folder / METADATA / name), (self.features, features)]


@dataclass(frozen=True)
class Plan:
    """What a run fetches, and the row of the mask at which it begins."""

    items: list[Item]
    mask: Mask | None
    first_row: int

    def outputs(self, item: Item, work: Path) -> list[Path]:
        """Return where the files of an item lie when they are complete."""
        suffix = None if self.mask is None else ".parquet"
        return [path for _, path in item.place(work / FILES, suffix)]


@locks.released()
def run(options: Download) -> DownloadResult:
    """Fetch a range of metadata files, or a published folder."""
    if options.out is None:
        raise SnipError(sources.NO_LAION)
    source = sources.resolve_name(options.source)
    sources.check_source(source, options.end)
    out = Path(options.out).expanduser()
    # Hubs and published folders are asked once OUT is claimed: a stopped run has its own commit.
    is_late = scheme_of(source) == hub.SCHEME or is_web_folder(source)
    found = None if is_late else find_source(options, source)
    refuse_overlap(options, source, out, found)
    request = request_of(options, source, found)
    earlier = atomic.load_json(out / MANIFEST) if is_finished(out) else None
    kind = earlier.get("kind", KIND) if isinstance(earlier, dict) else KIND
    if earlier and not options.overwrite and not is_own_download(earlier, options, source):
        return confirm_published(options, source, out, kind)
    state = out_folder.claim(out, kind, request, overwrite=options.overwrite)
    if state == "done":
        return describe(out, read_manifest(out, KIND)["files"], " is finished already")
    try:
        if found is None:
            found = find_source(options, pin_source(source, out, "revision"))
        if isinstance(found, SourceFile):
            manifest = published.fetch_manifest(found, out / locks.WORK / MANIFEST)
        else:
            plan = make_plan(options, source, found, out)
    except TemporaryError:
        raise  # what came stays
    except SnipError:
        if state == "new":
            out_folder.release(out)
        raise
    if isinstance(found, SourceFile):
        text = published.fetch_result(out, found, manifest, options.jobs)
        return DownloadResult(out, manifest["kind"], len(manifest["outputs"]), 0, 0, text)
    return fetch_set(options, request, plan, out)


def find_source(options: Download, source: str) -> SourceFiles | SourceFile:
    """Return the files of metadata that are meant, or the manifest of a whole published folder."""

    def find() -> SourceFiles | SourceFile:
        folder = None
        if wants_all(options):
            if is_web_folder(source):
                return published.manifest_in(source)
            url, names = ("", "") if is_web(source) else sources.split_source(source)
            folder = sources.open_folder(url) if names is None else None
            if folder is not None and MANIFEST in folder.files:
                return folder.files[MANIFEST]
        return sources.find_files(source, options.start, options.end, folder)

    found = with_retries(find)
    if isinstance(found, SourceFiles):
        check_names(found.files, SUFFIXES)
    return found


def is_web_folder(source: str) -> bool:
    """Tell an http(s) folder, which must be a published one, from a file or a pattern."""
    last = redacted(source).rpartition("/")[2]
    return is_web(source) and PART not in source and not sources.names_files(last)


def wants_all(options: Download) -> bool:
    """Tell whether neither a part nor a filter is asked for: a published folder may be meant."""
    asked = (options.start, options.end, options.is_dup, options.embeddings_source)
    return not options.embeddings and all(value is None for value in asked)


def refuse_overlap(
    options: Download, source: str, out: Path, found: SourceFiles | SourceFile | None
) -> None:
    """Refuse to write into an input."""
    named = [source, options.is_dup, options.cumulative_sizes, options.embeddings_source]
    named += [file.url for file in found.files] if isinstance(found, SourceFiles) else []
    local = [Path(name).expanduser() for name in named if name and not scheme_of(name)]
    out_folder.refuse_output_inside(out, [path for path in local if path.exists()])


def check_names(files: Sequence[SourceFile], suffixes: Sequence[str]) -> None:
    """Refuse files that would have one name, or whose names are not those of such files."""
    seen: dict[str, SourceFile] = {}
    for file in files:
        name = Path(file.name)
        if name.suffix.lower() not in suffixes:
            raise SnipError(f"{file.shown}: expected a name that ends in {' or '.join(suffixes)}")
        if name.stem in seen:
            raise SnipError(
                f"{seen[name.stem].shown} and {file.shown} would have one name in the output"
            )
        seen[name.stem] = file


def request_of(
    options: Download, source: str, found: SourceFiles | SourceFile | None
) -> dict[str, Any]:
    """Return what the result depends on, as far as it is known before anything is fetched.

    Listed files must not have changed when a run continues; what a hub holds is pinned by its
    commit.
    """
    files = None
    if isinstance(found, SourceFiles) and not is_web(source):
        files = [
            {
                "source": file.shown,
                "size": file.size,
                **({} if scheme_of(file.url) else file_version(Path(file.url))),
            }
            for file in found.files
        ]
    features = options.embeddings_source
    return {
        "source": redacted(source),
        "start": options.start,
        "end": options.end,
        "embeddings": options.embeddings or features is not None,
        "embeddings_source": features and redacted(features),
        "mask": options.is_dup and identity(options.is_dup),
        "cumulative_sizes": options.cumulative_sizes and identity(options.cumulative_sizes),
        "files": files,
    }


def identity(location: str) -> dict[str, Any]:
    """Return what a request holds of a mask or of totals: of a local file its checksum."""
    if scheme_of(location):
        return {"source": redacted(location)}
    path = Path(location).expanduser()
    path = open_mask(path).path if path.is_dir() else path
    if not path.is_file():
        raise SnipError(f"no such file: {path}")
    return {"sha256": atomic.sha256(path)}


def is_own_download(earlier: dict[str, Any], options: Download, source: str) -> bool:
    """Tell a folder that this command made from one that it fetched as it was published."""
    if earlier.get("kind") != KIND:
        return False
    return not wants_all(options) or earlier.get("request", {}).get("source") == redacted(source)


def confirm_published(options: Download, source: str, out: Path, kind: str) -> DownloadResult:
    """Return that a published folder was fetched before; refuse a folder that is another one."""
    pinned = hub.pin(source) if scheme_of(source) == hub.SCHEME else source
    found = find_source(options, pinned)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / MANIFEST
        if isinstance(found, SourceFile):
            manifest = published.fetch_manifest(found, copy)
            if published.is_complete_copy(out, manifest, copy):
                text = f"{out} is finished already: {kind}, as {redacted(source)}"
                return DownloadResult(out, kind, len(manifest["outputs"]), 0, 0, text)
    raise SnipError(
        f"{out} holds a finished {kind}, not what {redacted(source)} is now; choose another "
        "folder, or replace it with --overwrite"
    )


def read_pins(out: Path) -> dict[str, Any]:
    """Return what a stopped run began with: commits, the first row."""
    path = out / locks.WORK / PINNED
    return dict(atomic.load_json(path)) if path.is_file() else {}


def add_pin(out: Path, name: str, value: Any) -> None:
    """Note what a stopped run has to continue with."""
    atomic.save_json(out / locks.WORK / PINNED, {**read_pins(out), name: value})


def pin_source(source: str, out: Path, name: str) -> str:
    """Return a hub's address at the commit that the run began with; other locations as they are."""
    if scheme_of(source) != hub.SCHEME:
        return source
    source = with_retries(lambda: hub.pin(source, read_pins(out).get(name)))
    add_pin(out, name, hub.parse(source).revision)
    return source


def make_plan(options: Download, source: str, found: SourceFiles, out: Path) -> Plan:
    """Return what to fetch; the mask is here after it, and it is certain where it begins."""
    numbers = [None if found.first is None else found.first + i for i in range(len(found.files))]
    features: Sequence[SourceFile | None] = [None] * len(found.files)
    if options.embeddings or options.embeddings_source:
        elsewhere = options.embeddings_source
        if elsewhere is not None:
            elsewhere = pin_source(elsewhere, out, "features_revision")
        elif "revision" in read_pins(out):
            add_pin(out, "features_revision", read_pins(out)["revision"])
        wanted = with_retries(lambda: sources.find_features(source, found, elsewhere))
        check_names(wanted, FEATURE_SUFFIXES)
        features = wanted
    items = list(map(Item, found.files, numbers, features))
    if options.is_dup is None:
        return Plan(items, None, 0)
    work = out / locks.WORK
    mask = open_published_mask(options.is_dup, options.cumulative_sizes, work)
    first_row = read_pins(out).get("first_row")
    if first_row is None or mask.other_sizes is not None:
        mask, first_row = place_mask(source, found, mask, work, options.jobs)
        add_pin(out, "first_row", first_row)
    return Plan(items, mask, first_row)


def fetch_set(options: Download, request: dict[str, Any], plan: Plan, out: Path) -> DownloadResult:
    """Fetch and filter the files of a plan; write the manifest."""
    work, pins = out / locks.WORK, read_pins(out)
    described = list(fetch_items(plan, work, options.jobs))
    hidden = ("source", "is_dup", "cumulative_sizes", "embeddings_source")
    given = {name: getattr(options, name) for name in hidden}
    shown = {name: value and redacted(value) for name, value in given.items()}
    body = {
        "settings": {**options.as_dict(), **shown},
        "request": request,
        "revision": pins.get("revision"),
        "features_revision": pins.get("features_revision"),
        "mask": plan.mask and {"rows": plan.mask.rows, "sha256": atomic.sha256(plan.mask.path)},
        "first_row": plan.first_row if plan.mask else None,
        "files": described,
    }
    outputs = [path for item in plan.items for path in plan.outputs(item, work)]
    out_folder.publish(out, KIND, body, outputs)
    return describe(out, described)


def describe(out: Path, files: Sequence[dict[str, Any]], note: str = "") -> DownloadResult:
    """Return the result of a download from what its manifest says of the files."""
    rows, kept = (sum(file[name] for file in files) for name in ("rows", "kept"))
    features = sum("features" in file for file in files)
    text = f"{out}{note}: {describe_kept(files)}"
    text += f", with features of {features} files" if features else ""
    return DownloadResult(out, KIND, len(files), rows, kept, text)


def fetch_items(plan: Plan, work: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Fetch files several at a time, filter them in order; yield their entries of the manifest."""
    done = {item.table.name: read_done(item, plan, work) for item in plan.items}
    pending = [item for item in plan.items if not done[item.table.name]]
    arrived = work / (FILES if plan.mask is None else ARRIVED)
    total = sum(file.size or 0 for item in pending for file, _ in item.place(arrived))
    row = plan.first_row
    with progress.bar(total, "download", "B") as bar:
        monitor = Monitor(bar)
        fetched = monitor.map(lambda item: fetch_item(item, arrived, monitor), pending, jobs)
        with closing(fetched):
            for item in plan.items:
                about = done[item.table.name]
                if not about:
                    sizes = next(fetched)
                    paths = [path for _, path in item.place(arrived)]
                    about = {**sizes, **check_item(item, paths), "first_row": row}
                    if plan.mask is not None:
                        about |= filter_item(item, paths, plan, work, row)
                    outputs = plan.outputs(item, work)
                    named = {path.relative_to(work / FILES).as_posix(): path for path in outputs}
                    atomic.write_done_file(done_note(item, work), named, about)
                    for path in set(paths) - set(outputs):
                        path.unlink()
                yield about
                row += about["rows"]


def done_note(item: Item, work: Path) -> Path:
    """Return where it is noted that the files of an item are complete."""
    return work / DONE / f"{item.table.name}.json"


def read_done(item: Item, plan: Plan, work: Path) -> dict[str, Any]:
    """Return the entry of a file that a stopped run completed, else nothing."""
    note = done_note(item, work)
    if not note.is_file():
        return {}
    if not atomic.is_done(note, work / FILES):  # damaged since then
        for path in plan.outputs(item, work):
            path.unlink(missing_ok=True)
        return {}
    about = atomic.load_json(note)
    return {name: value for name, value in about.items() if name not in ("files", "seal")}


def fetch_item(item: Item, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Fetch what is missing of one file and its features; return size and version of the file."""
    described = []
    for file, path in item.place(folder):
        if path.is_file():  # complete when the run was stopped
            monitor.report(path, path.stat().st_size)
            described.append({"size": path.stat().st_size, "etag": None})
        else:
            described.append(fetch_file(file, path, monitor))
    return described[0]


def check_item(item: Item, paths: Sequence[Path]) -> dict[str, Any]:
    """Return the manifest's entry of one file and its features; refuse what is not such files."""
    table, *features = paths
    rows = count_arrived(item.table, table, "metadata")
    about = {"name": table.name, "source": item.table.shown, "number": item.number}
    about |= {"rows": rows, "kept": rows}
    if item.features is None:
        return about
    found = count_arrived(item.features, features[0], "features")
    if found != rows:
        raise SnipError(
            f"{item.features.shown} has {found:,} rows, its metadata {item.table.shown} {rows:,}; "
            "they do not belong together"
        )
    return {**about, "features": features[0].name, "features_source": item.features.shown}


def count_arrived(file: SourceFile, path: Path, what: str) -> int:
    """Return the rows of a file that was fetched; remove one that is not what it should be."""
    try:
        return open_table(path).rows if what == "metadata" else feature_rows(path)
    except SnipError as error:
        path.unlink(missing_ok=True)
        raise SnipError(f"{file.shown}: expected {what}, found another file: {error}") from error


def filter_item(
    item: Item, paths: Sequence[Path], plan: Plan, work: Path, row: int
) -> dict[str, Any]:
    """Write the kept rows of one file, whose first row is ``row`` of the set, and its features."""
    table = open_table(paths[0])
    keep = kept_rows(item, table.rows, plan, row)
    outputs = plan.outputs(item, work)
    write_kept(Metadata([table]), ~keep, outputs[0].parent)
    for path, output in zip(paths[1:], outputs[1:], strict=True):
        write_kept_features(path, output, ~keep)
    return {"name": outputs[0].name, "kept": int(np.count_nonzero(keep))}


def kept_rows(item: Item, rows: int, plan: Plan, row: int) -> np.ndarray:
    """Return which rows of a file are kept, (rows,) bool; refuse a file that is not the mask's."""
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
