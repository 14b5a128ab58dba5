"""What SOURCE means: which files, in which order, with which numbers, and their features.

A file's number is its place in the whole set. Where names hold numbers, the two must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

from snipdedup.downloading import hub
from snipdedup.downloading.transfer import SourceFile
from snipdedup.errors import MissingError, SnipError, UsageError
from snipdedup.features import formats
from snipdedup.features.shards import natural_sort
from snipdedup.metadata import tables
from snipdedup.metadata.masks import choose_files, file_numbers
from snipdedup.metadata.tables import find_metadata
from snipdedup.storage.listing import FEATURES, METADATA, list_folder
from snipdedup.storage.out_folder import MANIFEST
from snipdedup.storage.web import PART, expand_parts, is_web, redacted, scheme_of

USE_PART = "for several put {part:04d} in the number's place"
NAME_FEATURES = "say where they are with --embeddings_source"
SETS = {
    "datacomp_small": "hf://datasets/mlfoundations/datacomp_small",
    "datacomp_1b": "hf://datasets/mlfoundations/datacomp_1b",
    "relaion2B-en-research-safe": "hf://datasets/laion/relaion2B-en-research-safe",
}
LAION = ("laion2b-en", "laion2b-en-vit-h-14-embeddings")
NO_LAION = (
    "laion2B-en and its embeddings are disabled on the hub and cannot be fetched any more. Open, "
    "with CLIP features: snip download datacomp_small OUT --embeddings (12.8 M rows), or "
    "datacomp_1b; gated by a form: relaion2B-en-research-safe (2.1 G rows, without features). If "
    "you hold a copy of the metadata of laion2b-en-vit-h-14-embeddings, upstream's published mask "
    "works on it by position: fetch https://huggingface.co/datasets/fraisdufour/snip-dedup/resolve/"
    "main/is_dup_mlp_1024_128_gelu_snn_2layer_notext.npy, then snip filter METADATA --is_dup "
    "is_dup_mlp_1024_128_gelu_snn_2layer_notext.npy --out OUT [--start 0 --end 10]. It does not "
    "fit Re-LAION by position: join by url, snip filter RELAION --is_dup MASK --on url --keys "
    "METADATA"
)


@dataclass(frozen=True)
class Folder:
    """A folder that can be listed: its URL, its files by name, the names of its folders."""

    url: str
    files: dict[str, SourceFile]
    folders: list[str]

    def parent(self) -> Folder | None:
        """Return the folder that it lies in, None at the top."""
        if scheme_of(self.url) == hub.SCHEME and not hub.parse_address(self.url).path:
            return None
        head = self.url.rpartition("/")[0]
        return None if not head or head[-1] in "/:" else open_folder(head)

    def file(self, name: str) -> SourceFile:
        """Return the file of a name, or refuse a folder without it."""
        if name not in self.files:
            raise MissingError(f"{self.url} has no {name}; check the name or the file numbers")
        return self.files[name]


@dataclass(frozen=True)
class SourceFiles:
    """The metadata files that are meant."""

    files: list[SourceFile]
    first: int | None  # number of the first one in the whole set, if known
    before: list[SourceFile] | None  # files 0 to `first` of the set, if known
    folder: Folder | None  # where they lie, if that can be listed


def resolve_name(source: str, end: int | None = None) -> str:
    """Return the URL of a set that is known by name; any other source as it is.

    A source that cannot be understood is refused; nothing is requested.
    """
    if not Path(source).expanduser().exists():  # else a folder of that name is what is meant
        name = source.removeprefix("hf://datasets/laion/").lower()
        if name in LAION:
            raise SnipError(NO_LAION)
        source = next((url for known, url in SETS.items() if known.lower() == name), source)
    if PART in source:
        expand_parts(source, [0])
        if end is None:
            raise UsageError(f"{redacted(source)} needs file numbers: --start 0 --end 10, say")
    if scheme_of(source) == hub.SCHEME:
        hub.parse_address(source)
    return source


def open_folder(url: str) -> Folder:
    """List a folder of a hub (at a pinned commit), of a store, or of this machine."""
    url = url.rstrip("/")
    if scheme_of(url) == hub.SCHEME:
        return Folder(url, *hub.list_repository(url))
    if not scheme_of(url):
        url = str(Path(url).expanduser().absolute())
    sizes, folders = list_folder(url) or ({}, [])
    if not sizes and not folders:
        raise MissingError(f"{redacted(url)}: no such folder, or it is empty; check the URL")
    files = {name: SourceFile(f"{url}/{name}", size) for name, size in sizes.items()}
    return Folder(url, files, folders)


def names_files(last: str) -> bool:
    """Tell whether the last part of a location is a file, a glob or a pattern, not a folder."""
    suffixes = (*tables.SUFFIXES, *formats.SUFFIXES)
    return PART in last or has_magic(last) or last.lower().endswith(suffixes)


def split_source(source: str) -> tuple[str, str | None]:
    """Return the folder of a source that can be listed, and the file, glob or pattern in it."""
    if scheme_of(source) == hub.SCHEME:
        place = hub.parse_address(source)
        if not place.path:
            return source, None
        source = str(place)  # the revision before the path
    if scheme_of(source):
        head, _, last = source.rstrip("/").rpartition("/")
        return (head, last) if names_files(last) else (source, None)
    path = Path(source).expanduser().absolute()
    return (str(path), None) if path.is_dir() else (str(path.parent), path.name)


def find_source_files(
    source: str, start: int | None, end: int | None, folder: Folder | None = None
) -> SourceFiles:
    """Return the metadata files that SOURCE and a range of file numbers mean, in order.

    ``folder`` is the source itself, if it has been listed already.
    """
    if PART in source and end is not None:
        return find_parts(source, start or 0, end)
    if is_web(source):
        if end is not None and end != (start or 0) + 1:
            raise UsageError(f"{redacted(source)} is one file; {USE_PART}")
        first = start if start is not None else end and end - 1
        return SourceFiles([SourceFile(source)], first, [] if first == 0 else None, None)
    if scheme_of(source):
        url, pattern = split_source(source)
        folder, files = find_listed(folder or open_folder(url), pattern)
    else:
        paths = find_metadata(source)
        files = [SourceFile(str(path), path.stat().st_size) for path in paths]
        folder = folder or open_folder(str(paths[0].parent))
    if start is None and end is None:
        return SourceFiles(files, None, [], folder)
    start = start or 0
    first, last = choose_files([(file.shown, 0) for file in files], None, start, end)
    return SourceFiles(files[first:last], start, files[:first] if first == start else None, folder)


def find_parts(pattern: str, first: int, end: int) -> SourceFiles:
    """Return the files of a ``{part:04d}`` pattern."""
    if is_web(pattern):
        files = [SourceFile(location) for location in expand_parts(pattern, range(end))]
        return SourceFiles(files[first:], first, files[:first], None)
    head, names = split_source(pattern)
    if PART in head:
        raise UsageError(f"{redacted(pattern)}: {{part}} may be in the file's name only")
    folder, expanded = open_folder(head), expand_parts(names or "", range(end))
    before = [folder.files[name] for name in expanded[:first] if name in folder.files]
    files = [folder.file(name) for name in expanded[first:]]
    return SourceFiles(files, first, before if len(before) == first else None, folder)


def find_listed(folder: Folder, names: str | None) -> tuple[Folder, list[SourceFile]]:
    """Return the metadata files of a folder, or of the one folder in it that has such files."""
    found = pick_files(folder.files, names, tables.SUFFIXES)
    if found:
        return folder, found
    if names is not None:
        raise MissingError(f"{folder.url}: has no file {names}")
    inner = [METADATA] if METADATA in folder.folders else folder.folders
    choices = [
        (child, files)
        for child in [open_folder(f"{folder.url}/{name}") for name in inner]
        if (files := pick_files(child.files, None, tables.SUFFIXES))
    ]
    if len(choices) == 1:
        return choices[0]
    several = ", ".join(child.url.rpartition("/")[2] for child, _ in choices)
    raise SnipError(
        f"{folder.url}: expected metadata (*.parquet, *.csv), found "
        + (f"several folders with such: {several}; name the folder" if several else "none")
    )


def pick_files(
    files: dict[str, SourceFile], names: str | None, suffixes: Sequence[str]
) -> list[SourceFile]:
    """Return the files that a name or glob means, else those of the first type that occurs."""
    for suffix in suffixes:
        chosen = [
            Path(name)
            for name in files
            if name.lower().endswith(suffix)
            and not name.startswith(".")
            and (names is None or fnmatchcase(name, names) or name == names)
        ]
        if chosen:
            return [files[path.name] for path in natural_sort(chosen)]
    return []


def find_mask(location: str, name: str) -> tuple[SourceFile, SourceFile | None]:
    """Return the ``.npy`` that a URL names, or the file ``name`` of its folder; and the manifest.

    Of other stores than a hub the manifest may not exist.
    """
    if scheme_of(location) != hub.SCHEME:
        bare = location.partition("?")[0].rstrip("/")
        file = SourceFile(location if bare.endswith(".npy") else f"{bare}/{name}")
        return file, SourceFile(f"{file.url.partition('?')[0].rpartition('/')[0]}/{MANIFEST}")
    url, last = split_source(hub.pin(location))
    folder = open_folder(url)
    return folder.file(last or name), folder.files.get(MANIFEST)


def find_features(source: str, found: SourceFiles, location: str | None) -> list[SourceFile]:
    """Return the features of each metadata file, from a folder or pattern ``location``.

    Without it they are where LAION, clip-retrieval and DataComp put them: in ``img_emb/`` beside
    ``metadata/``, or beside the metadata under the same names.
    """
    if location is None and found.folder is not None:
        return features_beside(found, found.folder)
    location = location or guess_features(source)
    if PART in location:
        if found.first is None:
            raise UsageError("--embeddings_source with {part} needs --start and --end")
        return find_parts(location, found.first, found.first + len(found.files)).files
    if is_web(location):
        if len(found.files) > 1:
            raise UsageError(f"{redacted(location)} is one file; {USE_PART}")
        return [SourceFile(location)]
    url, names = split_source(location)
    folder = open_folder(url)
    return match_features(found, pick_files(folder.files, names, formats.SUFFIXES), folder.url)


def guess_features(source: str) -> str:
    """Return where the features of an http(s) source should be, by LAION's or DataComp's names."""
    head, slash, query = source.partition("?")
    stem = head.rpartition(".")[0]
    guess = stem.replace(METADATA, FEATURES) + ".npy" if METADATA in stem else stem + ".npz"
    return guess + slash + query


def features_beside(found: SourceFiles, folder: Folder) -> list[SourceFile]:
    """Return the features that lie beside listed metadata."""
    for suffix in (".npz", ".npy"):
        same = {file.name: Path(file.name).stem + suffix for file in found.files}
        lacking = [name for name, other in same.items() if other not in folder.files]
        if not lacking:
            return [folder.files[other] for other in same.values()]
        if len(lacking) < len(same):
            text = f"{folder.url}: {lacking[0]} has no features beside it"
            raise MissingError(f"{text}; {NAME_FEATURES}")
    for place in (folder, folder.parent()):
        if place is not None and FEATURES in place.folders:
            inner = open_folder(f"{place.url}/{FEATURES}")
            return match_features(found, pick_files(inner.files, None, formats.SUFFIXES), inner.url)
    raise SnipError(f"{folder.url}: no features beside the metadata; {NAME_FEATURES}")


def match_features(found: SourceFiles, features: list[SourceFile], where: str) -> list[SourceFile]:
    """Return the features of each metadata file, by the numbers in the names or by position."""
    names = [file.name for file in found.files]
    ours, theirs = file_numbers(names), file_numbers([file.name for file in features])
    if ours is not None and theirs is not None:
        by_number = dict(zip(theirs, features, strict=True))
        if all(number in by_number for number in ours):
            return [by_number[number] for number in ours]
    elif len(features) == len(names):
        return features
    ends = " .. ".join(dict.fromkeys([names[0], names[-1]]))
    raise MissingError(
        f"{where}: which of its {len(features)} files of features belong to {ends} is not "
        f"certain; {NAME_FEATURES}"
    )
