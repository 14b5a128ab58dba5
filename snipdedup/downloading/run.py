"""``snip download``: metadata files and features, filtered by a mask as they arrive; results.

A file's place in the mask is its place in the unfiltered set, whatever part of it is fetched. A
stopped run continues with the commit, the mask and the first row that it began with. A result that
someone published (an encoder, an index, an OUT) is fetched by its manifest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from snipdedup import progress
from snipdedup.config import Download
from snipdedup.downloading import hub, sources
from snipdedup.downloading.fetch_and_filter import (
    DownloadItem,
    DownloadPlan,
    fetch_items,
    open_published_mask,
    place_mask,
)
from snipdedup.downloading.sources import SourceFiles
from snipdedup.downloading.transfer import Monitor, SourceFile, fetch_file, fetch_once
from snipdedup.errors import MissingError, SnipError, TemporaryError
from snipdedup.features.formats import SUFFIXES as FEATURE_SUFFIXES
from snipdedup.metadata.masks import Mask, describe_kept, file_version, open_mask
from snipdedup.metadata.tables import SUFFIXES
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.out_folder import FORMAT, MANIFEST, is_finished, put_in_place, read_manifest
from snipdedup.storage.web import PART, is_web, redacted, scheme_of

KIND = "download"
RESULT = "result"  # in the work folder: a published result
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


@locks.released()
def run(options: Download) -> DownloadResult:
    """Fetch a range of metadata files, or a published folder."""
    if options.out is None:
        raise SnipError(sources.NO_LAION)
    source = sources.resolve_name(options.source, options.end)
    out, start, end = Path(options.out).expanduser(), options.start, options.end
    features, mask, totals = options.embeddings_source, options.is_dup, options.cumulative_sizes
    with_features = options.embeddings or features is not None
    whole = not with_features and all(value is None for value in (start, end, mask))
    # Hubs and published folders are asked once OUT is claimed: a stopped run has its own commit.
    is_late = scheme_of(source) == hub.SCHEME or is_web_folder(source)
    found = None if is_late else find_source(source, start, end, whole)
    inputs = [source, mask, totals, features]
    inputs += [file.url for file in found.files] if isinstance(found, SourceFiles) else []
    local = [Path(name).expanduser() for name in inputs if name and not scheme_of(name)]
    out_folder.refuse_output_inside(out, [path for path in local if path.exists()])
    request = {
        "source": redacted(source),
        "start": start,
        "end": end,
        "embeddings": with_features,
        "embeddings_source": features and redacted(features),
        "mask": mask and mask_identity(mask),
        "cumulative_sizes": totals and mask_identity(totals),
        "files": describe_listed(found),
    }
    earlier = atomic.load_json(out / MANIFEST) if is_finished(out) else {}
    kind = str(earlier.get("kind", KIND))
    made_of = earlier.get("request", {}).get("source")
    is_own = kind == KIND and (not whole or made_of == request["source"])
    if earlier and not options.overwrite and not is_own:
        return confirm_published(source, out, kind, whole)
    state = out_folder.claim(out, kind, request, overwrite=options.overwrite)
    if state == "done":
        return describe_download(out, read_manifest(out, KIND)["files"], " is finished already")
    work = out / locks.WORK
    try:
        if found is None:
            found = find_source(pin_source(source, out, "revision"), start, end, whole)
        if isinstance(found, SourceFile):
            manifest = fetch_manifest(found, work / RESULT / MANIFEST)
        else:
            items = list_items(source, found, out, features, with_features=with_features)
            plan = DownloadPlan(items, *open_placed(mask, totals, found, out, options.jobs), work)
    except TemporaryError:
        raise  # what was fetched is kept
    except SnipError:
        if state == "new":
            out_folder.release(out)
        raise
    if isinstance(found, SourceFile):
        return fetch_result(out, found, manifest, options.jobs)
    return fetch_set(plan, out, {"settings": options.as_dict(), "request": request}, options.jobs)


def find_source(
    source: str, start: int | None, end: int | None, whole: bool
) -> SourceFiles | SourceFile:
    """Return the files of metadata that are meant, or the manifest of a published folder.

    ``whole``: neither a part nor a filter is asked for, so a published folder may be meant.
    """
    if whole and is_web_folder(source):
        head, mark, query = source.partition("?")
        return SourceFile(f"{head.rstrip('/')}/{MANIFEST}{mark}{query}")
    folder = None
    if whole and not is_web(source):
        url, names = sources.split_source(source)
        folder = sources.open_folder(url) if names is None else None
        if folder is not None and MANIFEST in folder.files:
            return folder.files[MANIFEST]
    found = sources.find_source_files(source, start, end, folder)
    check_names(found.files, SUFFIXES)
    return found


def is_web_folder(source: str) -> bool:
    """Tell an http(s) folder, which must be a published one, from a file or a pattern."""
    last = redacted(source).rpartition("/")[2]
    return is_web(source) and PART not in source and not sources.names_files(last)


def check_names(files: Sequence[SourceFile], suffixes: Sequence[str]) -> None:
    """Refuse files that would have one name, or whose names are not those of such files."""
    seen: dict[str, SourceFile] = {}
    for file in files:
        name = Path(file.name)
        if name.suffix.lower() not in suffixes:
            raise SnipError(f"{file.shown}: expected a name that ends in {' or '.join(suffixes)}")
        if name.stem in seen:
            other = seen[name.stem].shown
            raise SnipError(f"{other} and {file.shown} would have one name in the output")
        seen[name.stem] = file


def describe_listed(found: SourceFiles | SourceFile | None) -> list[dict[str, Any]] | None:
    """Return what must not change of files when a run continues; None of a hub's, at a commit."""
    if not isinstance(found, SourceFiles):
        return None
    local = {
        file.url: file_version(Path(file.url)) for file in found.files if not scheme_of(file.url)
    }
    return [
        {"source": file.shown, "size": file.size, **local.get(file.url, {})} for file in found.files
    ]


def mask_identity(location: str) -> dict[str, Any]:
    """Return what a request holds of a mask or of totals: of a local file its checksum."""
    if scheme_of(location):
        return {"source": redacted(location)}
    path = Path(location).expanduser()
    path = open_mask(path).path if path.is_dir() else path
    if not path.is_file():
        raise SnipError(f"no such file: {path}")
    return {"sha256": atomic.sha256(path)}


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
    source = hub.pin(source, read_pins(out).get(name))
    add_pin(out, name, hub.parse_address(source).revision)
    return source


def list_items(
    source: str, found: SourceFiles, out: Path, location: str | None, *, with_features: bool
) -> list[DownloadItem]:
    """Return the files to fetch, with their features where these are asked for."""
    numbers = [None if found.first is None else found.first + i for i in range(len(found.files))]
    if not with_features:
        return list(map(DownloadItem, found.files, numbers))
    if location is not None:
        location = pin_source(location, out, "features_revision")
    elif "revision" in read_pins(out):
        add_pin(out, "features_revision", read_pins(out)["revision"])
    features = sources.find_features(source, found, location)
    check_names(features, FEATURE_SUFFIXES)
    return list(map(DownloadItem, found.files, numbers, features))


def open_placed(
    mask: str | None, totals: str | None, found: SourceFiles, out: Path, jobs: int
) -> tuple[Mask | None, int]:
    """Return the mask, if there is one, and the row of the first file in it, once it is certain."""
    if mask is None:
        return None, 0
    opened = open_published_mask(mask, totals, out / locks.WORK)
    first_row = read_pins(out).get("first_row", -1)
    if first_row < 0 or len(opened.meanings) > 1:
        opened, first_row = place_mask(found, opened, out / locks.WORK, jobs)
        add_pin(out, "first_row", first_row)
    return opened, first_row


def fetch_set(plan: DownloadPlan, out: Path, body: dict[str, Any], jobs: int) -> DownloadResult:
    """Fetch and filter the files of a plan; write the manifest, which begins with ``body``."""
    pins, described = read_pins(out), list(fetch_items(plan, jobs))
    body |= {
        "revision": pins.get("revision"),
        "features_revision": pins.get("features_revision"),
        "mask": plan.mask and {"rows": plan.mask.rows, "sha256": atomic.sha256(plan.mask.path)},
        "first_row": plan.first_row if plan.mask else None,
        "files": described,
    }
    outputs = [path for item in plan.items for path in plan.outputs(item)]
    out_folder.publish(out, KIND, body, outputs)
    return describe_download(out, described)


def describe_download(out: Path, files: Sequence[dict[str, Any]], note: str = "") -> DownloadResult:
    """Return the result of a download from what its manifest says of the files."""
    rows, kept = (sum(file[name] for file in files) for name in ("rows", "kept"))
    features = sum("features" in file for file in files)
    text = f"{out}{note}: {describe_kept(rows, kept, len(files))}"
    text += f", with features of {features} files" if features else ""
    return DownloadResult(out, KIND, len(files), rows, kept, text)


def fetch_manifest(manifest: SourceFile, target: Path) -> dict[str, Any]:
    """Fetch the manifest of a published folder to ``target``, check that it is one, return it."""
    try:
        fetch_file(manifest, target)
    except MissingError:
        expected = "a pattern with {part:04d}, a metadata file, or a folder that snip wrote"
        raise MissingError(f"{manifest.shown}: there is none; expected {expected}") from None
    found = atomic.load_json(target)
    if not isinstance(found, dict) or "kind" not in found or "outputs" not in found:
        raise SnipError(f"{manifest.shown}: expected a manifest of snip, found other JSON")
    if found.get("format", 0) > FORMAT:
        upgrade = "upgrade with: pip install -U snipdedup-toolkit"
        raise SnipError(f"{manifest.shown}: written by a newer snipdedup; {upgrade}")
    output_files(found, manifest)
    return found


def output_files(manifest: dict[str, Any], source: SourceFile) -> dict[str, SourceFile]:
    """Return the files that a manifest names, by their path below the folder.

    Paths that lead out of the folder are refused: anyone may have written a manifest.
    """
    web, files = is_web(source.url), {}
    base, mark, query = source.url.partition("?") if web else (source.url, "", "")
    for name, output in manifest["outputs"].items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or "\\" in name or {"..", "."} & set(parts):
            raise SnipError(f"{source.shown} names {name!r}, which is not in the folder")
        if not isinstance(output, dict) or not {"size", "sha256"} <= set(output):
            raise SnipError(f"{source.shown}: expected size and sha256 of {name!r}, found {output}")
        files[name] = SourceFile(
            f"{base.removesuffix(MANIFEST)}{quote(name) if web else name}{mark}{query}",
            size=int(output["size"]),
            sha256=str(output["sha256"]),
            token=source.token,
        )
    return files


def fetch_result(
    out: Path, source: SourceFile, manifest: dict[str, Any], jobs: int
) -> DownloadResult:
    """Fetch a published folder to ``out``, which is claimed and has its manifest in `RESULT`.

    Every file is checked by its SHA-256. The manifest comes last, byte for byte, so that the folder
    is what its author made.
    """
    work, files = out / locks.WORK / RESULT, output_files(manifest, source)
    wanted = {
        name: file
        for name, file in files.items()
        if not ((out / name).is_file() and atomic.sha256(out / name) == file.sha256)
    }
    total, kind = sum(file.size or 0 for file in wanted.values()), manifest["kind"]
    with progress.bar(total, f"fetch {kind}", "B") as bar:
        monitor = Monitor(bar)
        tasks = [(file, work / name) for name, file in wanted.items()]
        for _ in monitor.map(lambda task: fetch_once(*task, monitor), tasks, jobs):
            pass
    put_in_place(out, work)
    size = sum(file.size or 0 for file in files.values())
    text = f"{out}: {kind}, {len(files)} files, {size:,} bytes, each proved by sha256"
    return DownloadResult(out, kind, len(files), 0, 0, text)


def confirm_published(source: str, out: Path, kind: str, whole: bool) -> DownloadResult:
    """Return that a published folder was fetched before; refuse a folder that is another one."""
    pinned = hub.pin(source) if whole and scheme_of(source) == hub.SCHEME else source
    found = find_source(pinned, None, None, whole) if whole else None
    if isinstance(found, SourceFile):
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / MANIFEST
            outputs = fetch_manifest(found, copy)["outputs"]
            same = (out / MANIFEST).read_bytes() == copy.read_bytes()
        sizes = {out / name: output["size"] for name, output in outputs.items()}
        if same and all(path.is_file() and path.stat().st_size == sizes[path] for path in sizes):
            text = f"{out} is finished already: {kind}, as {redacted(source)}"
            return DownloadResult(out, kind, len(outputs), 0, 0, text)
    raise SnipError(
        f"{out} holds a finished {kind}, not what {redacted(source)} is now; choose another "
        "folder, or replace it with --overwrite"
    )
