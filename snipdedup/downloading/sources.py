"""What SOURCE means: which files, in which order, under which numbers, and their features.

A file's number is its place in the whole set. Where names hold numbers, the two must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

from snipdedup.downloading.hub import SCHEME, HubFolder, Repository, parse
from snipdedup.errors import SnipError, UsageError
from snipdedup.features import formats
from snipdedup.features.shards import natural_sort
from snipdedup.metadata import tables
from snipdedup.metadata.masks import FileSizes, choose_files, file_numbers
from snipdedup.metadata.tables import find_metadata
from snipdedup.storage.buckets import BucketFolder, LocalFolder
from snipdedup.storage.manifest import MANIFEST
from snipdedup.storage.urls import (
    Folder,
    MissingError,
    Remote,
    beside,
    is_web,
    name_of,
    redacted,
    scheme_of,
)

PART = "{part"
FEATURES = ("img_emb", "metadata")  # folders side by side: features, and the table
NAME_FEATURES = "say where they are with --embeddings_source"


@dataclass(frozen=True)
class Found:
    """The metadata files that are meant.

    Attributes
    ----------
    files : list of Remote
    first : int or None
        Number of the first one in the whole set; None where it is not known.
    before : list of Remote or None
        Files 0 to ``first`` of the set, None where they are not known.
    folder : Folder or None
        Where they lie, where that can be listed.
    """

    files: list[Remote]
    first: int | None
    before: list[Remote] | None
    folder: Folder | None


class Opened(NamedTuple):
    """The folder of a source, and which files of it are meant: a name, glob or template."""

    folder: Folder
    names: str | None


def open_folder(source: str, commit: str | None = None) -> Opened:
    """Return the folder of a source that can be listed."""
    if scheme_of(source) == SCHEME:
        place = parse(source)
        head, _, last = place.path.rpartition("/")
        repository = Repository(place, commit)
        if names_files(last):
            return Opened(HubFolder(repository, head), last)
        return Opened(HubFolder(repository, place.path), None)
    if scheme_of(source):
        head, _, last = source.rstrip("/").rpartition("/")
        if names_files(last):
            return Opened(BucketFolder(head), last)
        return Opened(BucketFolder(source), None)
    path = Path(source).expanduser()
    if path.is_dir():
        return Opened(LocalFolder(path), None)
    return Opened(LocalFolder(path.parent), path.name)


def names_files(last: str) -> bool:
    """Tell whether the last part of a location is a file, a glob or a template, not a folder."""
    suffixes = (*tables.SUFFIXES, *formats.SUFFIXES)
    return PART in last or has_magic(last) or last.lower().endswith(suffixes)


def refuse_unclear(source: str, end: int | None) -> None:
    """Raise UsageError for a source that cannot be understood; nothing is asked of anyone."""
    if PART in source:
        expand(source, 0)
        if end is None:
            raise UsageError(f"{redacted(source)} needs file numbers: --start 0 --end 10, say")
    if scheme_of(source) == SCHEME:
        parse(source)


def find(source: str, start: int | None, end: int | None, opened: Opened | None) -> Found:
    """Return the metadata files that SOURCE and a range of file numbers mean, in order.

    ``opened`` is its folder; None of an http(s) source, which cannot be listed.

    Raises
    ------
    SnipError
        If a file is not there, or it is not certain which ones are meant.
    """
    if PART in source and end is not None:
        return find_parts(source, start or 0, end, opened)
    if opened is None:
        return find_one(source, start, end)
    folder, names = opened
    if isinstance(folder, LocalFolder):
        files = [Remote(str(path), size=path.stat().st_size) for path in find_metadata(source)]
    else:
        folder, files = metadata_files(folder, names)
    return choose(files, start, end, folder, source)


def file_in(location: str, name: str) -> tuple[Remote, Remote | None]:
    """Return the ``.npy`` that a location names, or the file ``name`` of the folder it names.

    Returns
    -------
    file : Remote
    manifest : Remote or None
        That beside it, if there is one; of http(s) and other stores it may be missing.
    """
    if scheme_of(location) != SCHEME:
        bare = location.partition("?")[0].rstrip("/")
        file = Remote(location if bare.endswith(".npy") else f"{bare}/{name}")
        return file, Remote(beside(file.url, MANIFEST))
    place = parse(location)
    head, _, last = place.path.rpartition("/")
    head, last = (head, last) if last.endswith(".npy") else (place.path, name)
    folder = HubFolder(Repository(place), head)
    if last not in folder.files:
        raise MissingError(f"{folder.shown} has no {last}")
    return folder.files[last], folder.files.get(MANIFEST)


def find_parts(source: str, first: int, end: int, opened: Opened | None) -> Found:
    """Return the files of a template."""
    locations = [expand(source, number) for number in range(end)]
    before = locations[:first]
    files = [Remote(location) for location in locations]
    folder = opened.folder if opened else None
    if isinstance(folder, LocalFolder):
        missing = [file.url for file in files[first:] if not Path(file.url).is_file()]
        if missing:
            raise SnipError(f"no such file: {missing[0]}")
        folder = LocalFolder(Path(locations[first]).parent)
    elif folder is not None:
        if PART in source.rpartition("/")[0]:
            raise UsageError(f"{redacted(source)}: {{part}} may be in the file's name only")
        files = [folder.files.get(file.name, file) for file in files]
        refuse_missing(folder, files[first:])
        before = [place for place in before if name_of(place) in folder.files]
    known = len(before) == first
    return Found(files[first:], first, files[:first] if known else None, folder)


def refuse_missing(folder: Folder, files: Sequence[Remote]) -> None:
    """Refuse files that a listing does not have."""
    for file in files:
        if file.name not in folder.files:
            raise MissingError(f"{folder.shown} has no {file.name}; check the file numbers")


def find_one(source: str, start: int | None, end: int | None) -> Found:
    """Return the one file of an http(s) URL."""
    if end is not None and end != (start or 0) + 1:
        raise UsageError(
            f"{redacted(source)} is one file; for several put {{part:04d}} where the number is"
        )
    first = start if start is not None else end and end - 1
    return Found([Remote(source)], first, [] if first == 0 else None, None)


def choose(
    files: list[Remote], start: int | None, end: int | None, folder: Folder, source: str
) -> Found:
    """Return a range of the files of a listing; all of them without one."""
    if start is None and end is None:
        return Found(files, None, [], folder)
    names = [file.name for file in files]
    numbers = file_numbers(names)
    start = start or 0
    end = end or (max(numbers) + 1 if numbers else len(files))
    if start >= end:
        raise SnipError(f"file {start} is wanted, {redacted(source)} ends at {end - 1}")
    first = choose_files(FileSizes(names, [0] * len(names)), numbers, None, start, end)
    chosen = files[first : first + end - start]
    before = files[:first] if first == start else None
    return Found(chosen, start, before, folder)


def expand(template: str, number: int) -> str:
    """Put a file number into a template."""
    try:
        location = template.format(part=number)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{redacted(template)}: expected a template such as metadata_{{part:04d}}.parquet"
        ) from error
    return location if scheme_of(location) else str(Path(location).expanduser())


def metadata_files(folder: Folder, names: str | None) -> tuple[Folder, list[Remote]]:
    """Return the metadata files of a folder, or of the one folder in it that has such files."""
    files, folders = folder.files, folder.folders
    found = pick(files, names, tables.SUFFIXES)
    if found or names is not None:
        if not found:
            raise MissingError(f"{folder.shown}: has no file {names}")
        return folder, found
    inner = ["metadata"] if "metadata" in folders else folders
    choices = {name: pick(folder.child(name).files, None, tables.SUFFIXES) for name in inner}
    choices = {name: chosen for name, chosen in choices.items() if chosen}
    if len(choices) != 1:
        where = f"several folders with such: {', '.join(choices)}" if choices else "none"
        raise SnipError(
            f"{folder.shown}: expected metadata (*.parquet, *.csv), found {where}; name the folder"
        )
    name, found = choices.popitem()
    return folder.child(name), found


def pick(files: dict[str, Remote], names: str | None, suffixes: Sequence[str]) -> list[Remote]:
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


def find_features(
    source: str, found: Found, elsewhere: str | None, commit: str | None
) -> tuple[list[Remote], Folder | None]:
    """Return the features of each metadata file, and their folder where that can be listed.

    Parameters
    ----------
    source : str
        Where the metadata came from.
    found : Found
    elsewhere : str, optional
        Folder or template of the features; without it they are looked for where LAION,
        clip-retrieval and DataComp put them: ``img_emb/`` beside ``metadata/``, or files of the
        same name beside the metadata.
    commit : str, optional
        Of ``elsewhere``, if that is a hub.
    """
    if elsewhere is None and found.folder is not None:
        return features_beside(found, found.folder)
    elsewhere = elsewhere or guess_template(source)
    opened = None if is_web(elsewhere) else open_folder(elsewhere, commit)
    if PART in elsewhere:
        if found.first is None:
            raise UsageError("--embeddings_source with {part} needs --start and --end")
        end = found.first + len(found.files)
        parts = find_parts(elsewhere, found.first, end, opened)
        return parts.files, parts.folder
    if opened is None:
        if len(found.files) > 1:
            raise UsageError(
                f"{redacted(elsewhere)} is one file; put {{part:04d}} where the number is"
            )
        return [Remote(elsewhere)], None
    return match(found, pick(opened.folder.files, opened.names, formats.SUFFIXES), opened.folder)


def guess_template(source: str) -> str:
    """Return where the features of an http(s) source should be, by LAION's or DataComp's names."""
    head, slash, query = source.partition("?")
    stem = head.rpartition(".")[0]
    guess = stem.replace("metadata", "img_emb") + ".npy" if "metadata" in stem else stem + ".npz"
    return guess + slash + query


def features_beside(found: Found, folder: Folder) -> tuple[list[Remote], Folder]:
    """Return the features that lie beside listed metadata, and their folder."""
    for suffix in (".npz", ".npy"):
        same = {file.name: Path(file.name).stem + suffix for file in found.files}
        lacking = [name for name, other in same.items() if other not in folder.files]
        if not lacking:
            return [folder.files[other] for other in same.values()], folder
        if len(lacking) < len(same):
            raise MissingError(
                f"{folder.shown}: {lacking[0]} has no features beside it; {NAME_FEATURES}"
            )
    for place in (folder, folder.parent()):
        if place is not None and FEATURES[0] in place.folders:
            inner = place.child(FEATURES[0])
            return match(found, pick(inner.files, None, formats.SUFFIXES), inner)
    raise SnipError(f"{folder.shown}: no features beside the metadata; {NAME_FEATURES}")


def match(found: Found, features: list[Remote], folder: Folder) -> tuple[list[Remote], Folder]:
    """Return the features of each metadata file, by the numbers in the names or by position."""
    names = [file.name for file in found.files]
    ours, theirs = file_numbers(names), file_numbers([file.name for file in features])
    if ours is not None and theirs is not None:
        by_number = dict(zip(theirs, features, strict=True))
        if all(number in by_number for number in ours):
            return [by_number[number] for number in ours], folder
    elif len(features) == len(names):
        return features, folder
    raise MissingError(
        f"{folder.shown}: which of its {len(features)} files of features belong to {names[0]} .. "
        f"{names[-1]} is not certain; {NAME_FEATURES}"
    )
