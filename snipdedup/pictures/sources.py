"""What IMAGES means: a folder, a glob, tars, parquet files of bytes, a list of paths; its shards.

Shards, rows and keys depend on names, never on how many processes there are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from snipdedup.errors import SnipError, UsageError
from snipdedup.features.formats import identity_of
from snipdedup.features.shards import natural_key, part_numbers
from snipdedup.metadata.tables import Metadata, stream_parquet
from snipdedup.pictures.containers import (
    FileShard,
    ParquetShard,
    Shard,
    TarShard,
    image_column,
)
from snipdedup.pictures.items import SUFFIXES, TEXTS, VIDEOS, clean, suffix_of
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
    stamp: str  # a hash of names, sizes and dates of all files, also of the texts beside them

    def request(self) -> dict[str, Any]:
        """Return what tells these pictures from others; see `out_folder.claim`."""
        return {"shards": len(self.shards), "files": self.stamp}


class Found(NamedTuple):
    """A file that IMAGES means."""

    name: str  # that its key is made of: its path below the folder
    path: Path
    is_named: bool  # itself: it is taken for a picture whatever its suffix
    is_listed: bool  # with all files of its folder, so that the texts beside it are known


def find_pictures(
    spec: Any,
    shard_rows: int,
    *,
    parts: str | None = None,
    column: str | None = None,
    videos: bool = False,
) -> Pictures:
    """Find the pictures that IMAGES means: see the page on pictures.

    ``spec`` is a text, as typed, or a sequence of paths. ``column`` is that of parquet files.
    ``videos`` are read too, or left out.
    """
    words = locations(spec)
    if not words:
        raise UsageError("IMAGES is empty; give a folder, a glob, tars, parquet files or a list")
    roots = [path_of(word) for word in words if not scheme_of(word) and path_of(word).exists()]
    files = [file for word in words for file in files_of(word, parts)]
    if len(words) > 1:
        names = below_common_folder([file.path for file in files])
        files = [file._replace(name=name) for file, name in zip(files, names, strict=True)]
    return shards_of(files, shard_rows, column, videos, roots, ", ".join(map(redacted, words)))


def locations(spec: Any) -> list[str]:
    """Return the paths and URLs of IMAGES: of a text, that of a file with a comma, or several."""
    given = [spec] if isinstance(spec, str | Path) else list(spec)
    words = [word.url if isinstance(word, RemotePath) else str(word) for word in given]
    if len(words) == 1 and not exists(words[0]):
        words = [word.strip() for word in words[0].split(",") if word.strip()]
    return words


def exists(location: str) -> bool:
    """Tell whether a path of this machine is there, whatever letters it has."""
    return not scheme_of(location) and os.path.lexists(path_of(location))


def files_of(word: str, parts: str | None) -> list[Found]:
    """Return the files that a folder, glob, pattern, list or file means, in their order."""
    if is_folder(word):
        found = [Found(name, path, False, True) for name, path in files_below(word)]
        return sorted(found, key=lambda file: (natural_key(file.name), file.name))
    numbers = part_numbers(word, parts)
    is_list = suffix_of(redacted(word)) == LIST and numbers is None
    if is_list:
        paths = listed_files(path_of(word))
    else:
        paths = find_files(word, numbers, SUFFIXES, NONE)
        if numbers is None:
            paths = sorted(paths, key=lambda path: (natural_key(str(path)), str(path)))
    is_named = is_list or (len(paths) == 1 and str(paths[0]) == str(path_of(word)))
    names = below_common_folder(paths)
    return [Found(*file, is_named, False) for file in zip(names, paths, strict=True)]


def files_below(folder: str) -> list[tuple[str, Path]]:
    """Return the paths in a folder of all files below it, and the files; no hidden ones."""
    if scheme_of(folder):
        with store_errors(folder):
            system, top = filesystem(folder)
            places = [place for place in system.find(top) if "/." not in place]
        begin = f"{top.rstrip('/')}/"
        return [(p.removeprefix(begin), RemotePath(system.unstrip_protocol(p))) for p in places]
    root, found = path_of(folder), []

    def refuse(error: OSError) -> None:
        raise SnipError(f"{error.filename}: a folder that cannot be listed: {error.strerror}")

    for above, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "."]
        inside, shown = Path(above).relative_to(root), [n for n in names if n[0] != "."]
        found += [((inside / name).as_posix(), Path(above, name)) for name in shown]
    return found


def listed_files(path: Path) -> list[Path]:
    """Return the files of a list, one path or URL a line, in its order."""
    try:
        with path.open("rb") as file:
            lines = file.read().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SnipError(f"{path}: expected a list of paths in UTF-8: {error}") from error
    found = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if line:
            found.append(listed_file(line, f"{path}: line {number:,}"))
    if not found:
        raise SnipError(f"{path}: expected a list, one path or URL a line, found nothing")
    return found


def listed_file(line: str, where: str) -> Path:
    """Return the file of a line; refuse what can name none."""
    try:
        found = path_of(line)
        named = found.name != "" and "\0" not in line
    except RuntimeError:  # ~ and a user who is not there
        named = False
    if not named:
        raise SnipError(f"{where}: expected the path or URL of a file, found {line[:200]!r}")
    return found


def below_common_folder(paths: Sequence[Path]) -> list[str]:
    """Return the path of each file below the folder that all have in common."""
    parts = [absolute_location(path).split("/") for path in paths]
    folders = [names[:-1] for names in parts] or [[]]
    ends = zip(min(folders), max(folders), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    return ["/".join(names[common:]) for names in parts]


def shards_of(
    files: list[Found],
    shard_rows: int,
    column: str | None,
    videos: bool,
    roots: list[Path],
    named: str,
) -> Pictures:
    """Cut files into shards: tars if there are any, else parquet files of bytes, else pictures."""
    kinds: dict[str, list[Found]] = {}
    for file in files:
        kinds.setdefault(suffix_of(file.path.name), []).append(file)
    tables = [file.path for file in kinds.get(PARQUET, [])]
    chosen = [file for file in files if is_picture(file, videos)]
    # Parquet files beside tars or pictures are their metadata, unless they hold pictures themselves
    beside = column is None and bool(chosen) and TAR not in kinds
    if tables and beside:
        beside = image_column(stream_parquet(tables[0]).schema_arrow, by_name=True) is None
    shards: Sequence[Shard]
    if TAR in kinds:
        used = kinds[TAR]
        shards = list(open_all(TarShard, [file.path for file in used]))
    elif tables and not beside:
        used = kinds[PARQUET]
        opened = list(open_all(partial(ParquetShard, asked=column), tables))
        Metadata([shard.table for shard in opened])  # refuses other columns than the first's
        shards = opened
    elif chosen:
        used = chosen
        names = {file.name for file in files if file.is_listed}
        shards = file_shards(chosen, names, shard_rows, videos)
    else:
        raise SnipError(
            f"{NONE} in {named}: expected {', '.join(SUFFIXES[:6])}, ... (also in subfolders), "
            f"{TAR} or {PARQUET}; "
            + (
                "--every SECONDS reads videos"
                if set(VIDEOS) & set(kinds)
                else "for files with other names give a list of their paths"
            )
        )
    texts = [text for shard in shards for beside in shard.beside for text in beside]
    left_out = Counter(suffix_of(file.path.name) for file in files)
    left_out.subtract(suffix_of(file.path.name) for file in used)
    return Pictures(
        shards,
        roots,
        sum(shard.count() for shard in shards),
        {kind: left_out[kind] for kind in sorted(left_out) if left_out[kind] and kind not in TEXTS},
        stamp_of([*(file.path for file in used), *texts]),
    )


def is_picture(file: Found, videos: bool) -> bool:
    """Tell whether a file is taken for a picture: by its suffix, or since it was named."""
    suffix = suffix_of(file.path.name)
    if suffix in VIDEOS:
        return videos
    return suffix in SUFFIXES or (file.is_named and suffix not in (*TEXTS, TAR, PARQUET))


def open_all(kind: Callable[[Path], Any], paths: list[Path]) -> Iterable[Any]:
    """Open container files; remote ones side by side."""
    return map_requests(kind, paths) if any(map(is_remote, paths)) else map(kind, paths)


def file_shards(files: list[Found], names: set[str], shard_rows: int, videos: bool) -> list[Shard]:
    """Cut picture files into shards; ``names`` are those of all files in their folders.

    A key is the name without suffix, with it where another file has the same otherwise.
    """
    stems = [file.name.removesuffix(Path(file.name).suffix) for file in files]
    count, whole = Counter(stems), {file.name for file in files}
    keys, texts = [], []
    for file, stem in zip(files, stems, strict=True):
        keys.append(clean(stem if count[stem] == 1 and stem not in whole else file.name))
        likely = [(f"{stem}{suffix}", beside_of(file.path, suffix)) for suffix in TEXTS]
        look = not file.is_listed and not is_remote(file.path)
        texts.append(tuple(p for name, p in likely if name in names or (look and is_there(p))))
    paths = [file.path for file in files]
    cuts = [slice(at, at + shard_rows) for at in range(0, len(paths), shard_rows)]
    columns = ("path", "video", "second") if videos else ("path",)
    return [FileShard(paths[part], keys[part], texts[part], columns) for part in cuts]


def is_there(path: Path) -> bool:
    """Tell whether a file is there, also of a name that no file can have: one too long, say."""
    with suppress(OSError, ValueError):
        return path.is_file()
    return False


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
        with suppress(OSError, ValueError):
            if not is_remote(path) or suffix_of(path.name) in (TAR, PARQUET):
                known = identity_of(path)[1:]
        total.update(json.dumps([absolute_location(path), *known]).encode())
    return total.hexdigest()[:16]
