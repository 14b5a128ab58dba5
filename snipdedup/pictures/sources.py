"""What IMAGES means: a folder, a glob, tars, parquet files of bytes, a list of paths; its shards.

Shards, rows and keys depend on names, never on how many processes there are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from snipdedup.errors import SnipError, UsageError
from snipdedup.features.formats import identity_of
from snipdedup.features.shards import natural_key, part_numbers
from snipdedup.metadata.tables import stream_parquet
from snipdedup.pictures.items import (
    SUFFIXES,
    TEXTS,
    VIDEOS,
    FileShard,
    ParquetShard,
    Shard,
    TarShard,
    clean,
    image_column,
    suffix_of,
)
from snipdedup.storage.listing import find_files, is_folder
from snipdedup.storage.remote import (
    RemotePath,
    absolute_location,
    filesystem,
    is_remote,
    map_requests,
    path_of,
    store_errors,
)
from snipdedup.storage.web import redacted, scheme_of

NONE = "no picture found"
TAR, PARQUET, LIST = ".tar", ".parquet", ".txt"


@dataclass(frozen=True)
class Pictures:
    """The shards of IMAGES."""

    shards: Sequence[Shard]
    inputs: Sequence[Path]  # files and folders that were named, into which nothing is written
    total: int  # pictures; of tars an estimate
    left_out: dict[str, int]  # files that are no pictures, by suffix
    stamp: str  # a hash of names, sizes and dates of all files

    def request(self) -> dict[str, Any]:
        """Return what tells these pictures from others; see `out_folder.claim`."""
        return {"shards": len(self.shards), "files": self.stamp}


def find_pictures(
    spec: Any, shard_rows: int, *, parts: str | None = None, column: str | None = None
) -> Pictures:
    """Find the pictures that IMAGES means: see the page on pictures.

    ``spec`` is a text, as typed, or a sequence of paths. ``column`` is that of parquet files.
    """
    words = [spec] if isinstance(spec, str | Path) else list(spec)
    if len(words) == 1 and "," in str(words[0]) and not exists(str(words[0])):
        words = [word.strip() for word in str(words[0]).split(",") if word.strip()]
    if not words:
        raise UsageError("IMAGES is empty; give a folder, a glob, tars, parquet files or a list")
    roots: list[Path] = []
    files: list[tuple[str, Path]] = []  # the path that a key is made of, and the file
    for word in map(str, words):
        if not scheme_of(word):
            roots += [path for path in [path_of(word)] if path.exists()]
        files += files_of(word, parts)
    if len(words) > 1:
        files = below_common_folder([path for _, path in files])
    named = ", ".join(redacted(str(word)) for word in words)
    is_whole = len(words) > 1 or suffix_of(named) == LIST or len(files) == 1
    return shards_of(files, shard_rows, column, roots, named, takes_all=is_whole)


def exists(location: str) -> bool:
    """Tell whether a path of this machine is there, whatever letters it has."""
    return not scheme_of(location) and os.path.lexists(path_of(location))


def files_of(word: str, parts: str | None) -> list[tuple[str, Path]]:
    """Return the files that a folder, glob, pattern, list or file means."""
    if is_folder(word):
        found = files_below(word)
        return sorted(found, key=lambda file: natural_key(file[0]))
    numbers = part_numbers(word, parts)
    if suffix_of(redacted(word)) == LIST and numbers is None:
        return listed_files(path_of(word))
    paths = find_files(word, numbers, SUFFIXES, NONE)
    if numbers is None:
        paths = sorted(paths, key=lambda path: natural_key(str(path)))
    if len(paths) > 1:  # texts beside pictures that a glob matches, too
        paths = [path for path in paths if suffix_of(path.name) not in TEXTS]
    return below_common_folder(paths)


def files_below(folder: str) -> list[tuple[str, Path]]:
    """Return all files below a folder, and their paths in it; hidden ones are left out."""
    if scheme_of(folder):
        with store_errors(folder):
            system, top = filesystem(folder)
            names = [name for name in system.find(top) if "/." not in name]
        return [(n.removeprefix(f"{top.rstrip('/')}/"), RemotePath(system.unstrip_protocol(n)))
                for n in names]  # fmt: skip
    root, found = path_of(folder), []

    def refuse(error: OSError) -> None:
        raise SnipError(f"{error.filename}: a folder that cannot be listed: {error.strerror}")

    for above, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "."]
        inside = Path(above).relative_to(root)
        found += [
            ((inside / name).as_posix(), Path(above, name)) for name in names if name[0] != "."
        ]
    return found


def listed_files(path: Path) -> list[tuple[str, Path]]:
    """Return the files of a list, one path or URL a line, in its order."""
    try:
        with path.open("rb") as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SnipError(f"{path}: expected a list of paths in UTF-8: {error}") from error
    found = [path_of(line.strip()) for line in lines if line.strip()]
    if not found:
        raise SnipError(f"{path}: expected a list, one path or URL a line, found nothing")
    return below_common_folder(found)


def below_common_folder(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return each file with its path below the folder that all have in common."""
    parts = [absolute_location(path).split("/") for path in paths]
    folders = [names[:-1] for names in parts]
    ends = zip(min(folders), max(folders), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    return [("/".join(names[common:]), path) for names, path in zip(parts, paths, strict=True)]


def shards_of(
    files: list[tuple[str, Path]],
    shard_rows: int,
    column: str | None,
    roots: list[Path],
    named: str,
    *,
    takes_all: bool,
) -> Pictures:
    """Cut files into shards: tars if there are any, else parquet files of bytes, else pictures.

    ``takes_all``: files were named one by one, and are taken for pictures whatever their suffix.
    """
    kinds: dict[str, list[tuple[str, Path]]] = {}
    for file in files:
        kinds.setdefault(suffix_of(file[1].name), []).append(file)
    tables = [path for _, path in kinds.get(PARQUET, [])]
    loose = {suffix for suffix in kinds if suffix in (*SUFFIXES, *VIDEOS)}
    # Parquet files beside tars or pictures are their metadata, unless they hold pictures themselves
    beside = column is None and bool(loose) and TAR not in kinds
    if tables and beside:
        beside = image_column(stream_parquet(tables[0]).schema_arrow) is None
    shards: list[Shard]
    if TAR in kinds:
        taken = {TAR}
        shards = list(open_all(TarShard, [path for _, path in kinds[TAR]]))
    elif tables and not beside:
        taken = {PARQUET}
        shards = list(open_all(lambda path: ParquetShard(path, column), tables))
        check_columns(shards)
    else:
        taken = set(kinds) if takes_all else loose
        chosen = [file for file in files if suffix_of(file[1].name) in taken]
        if not chosen:
            raise SnipError(
                f"{NONE} in {named}: expected {', '.join(SUFFIXES[:6])}, ... (also in subfolders), "
                f"{TAR} or {PARQUET}; for files with other names give a list of their paths"
            )
        shards = file_shards(chosen, {name for name, _ in files}, shard_rows)
    used = [path for suffix in taken for _, path in kinds[suffix]]
    unused = {suffix: len(some) for suffix, some in kinds.items() if suffix not in (*taken, *TEXTS)}
    return Pictures(
        shards,
        roots,
        sum(shard.count() for shard in shards),
        dict(sorted(unused.items())),
        stamp_of(used),
    )


def open_all(kind: Any, paths: list[Path]) -> Iterable[Any]:
    """Open container files; remote ones side by side."""
    return map_requests(kind, paths) if any(map(is_remote, paths)) else map(kind, paths)


def check_columns(shards: Sequence[Shard]) -> None:
    """Refuse parquet files that do not all have the same columns."""
    tables = [shard for shard in shards if isinstance(shard, ParquetShard)]
    for table in tables[1:]:
        different = sorted(set(table.schema.names) ^ set(tables[0].schema.names))
        if different:
            raise SnipError(
                f"{table.path} and {tables[0].path} do not both have the columns "
                f"{', '.join(different)}; files of one set have the same columns"
            )


def file_shards(files: list[tuple[str, Path]], names: set[str], shard_rows: int) -> list[Shard]:
    """Cut picture files into shards; ``names`` are those of all files, texts too.

    A key is the name without suffix, with it where another file has the same otherwise.
    """
    stems = [name.removesuffix(Path(name).suffix) for name, _ in files]
    count, whole = Counter(stems), {name for name, _ in files}
    keys, beside = [], []
    for (name, path), stem in zip(files, stems, strict=True):
        keys.append(clean(stem if count[stem] == 1 and stem not in whole else name))
        texts = [suffix for suffix in TEXTS if f"{stem}{suffix}" in names]
        beside.append(tuple(beside_of(path, suffix) for suffix in texts))
    paths = [path for _, path in files]
    return [
        FileShard(
            paths[at : at + shard_rows], keys[at : at + shard_rows], beside[at : at + shard_rows]
        )
        for at in range(0, len(paths), shard_rows)
    ]


def beside_of(path: Path, suffix: str) -> Path:
    """Return the file of the same name with another suffix."""
    if not isinstance(path, RemotePath):
        return path.with_suffix(suffix)
    return RemotePath(path.url[: -len(suffix_of(path.name)) or None] + suffix)


def stamp_of(paths: Iterable[Path]) -> str:
    """Return a hash of the names, sizes and dates of files.

    Of a remote picture and of a file that is gone it is the name alone.
    """
    total = hashlib.sha256()
    for path in paths:
        known: tuple[int, ...] = ()
        with suppress(OSError):
            if not is_remote(path) or suffix_of(path.name) in (TAR, PARQUET):
                known = identity_of(path)[1:]
        total.update(json.dumps([str(path), *known]).encode())
    return total.hexdigest()[:16]
