"""Small pictures of a few rows, from a folder, tar shards or local paths, as ``data:`` URLs.

Keys, paths and picture files come from strangers: a key never leads out of its folder, and a file
that is no picture, or too large a one, is left out.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path, PurePosixPath

from snipdedup import progress
from snipdedup.errors import SnipError
from snipdedup.features.shards import natural_sort
from snipdedup.pictures.decode import MOST_PIXELS, Unreadable, decode

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
SIDE = 168  # pixels: twice as many as are shown on a narrow screen
QUALITY = 70
FILE_BYTES = 64 << 20
SHARD_DIGITS = 5  # img2dataset: the shard's number begins the key


@dataclass
class Thumbnails:
    """``data:`` URLs by key or path, and what could not be shown."""

    pictures: dict[str, str] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)  # files that are no pictures
    ambiguous: list[str] = field(default_factory=list)  # keys that several files have
    sums: dict[str, str] = field(default_factory=dict)  # sha256 of files that must be these
    changed: list[str] = field(default_factory=list)  # they are others now

    def add(self, name: str, data: bytes) -> None:
        """Take the bytes of a picture file."""
        if name in self.sums and self.sums[name] != hashlib.sha256(data).hexdigest():
            self.changed.append(name)
            return
        picture = thumbnail(data)
        if picture is None:
            self.unreadable.append(name)
        else:
            self.pictures[name] = picture

    def add_file(self, path: Path, name: str) -> None:
        """Take one file, if it is there and not huge."""
        try:
            if path.is_file() and path.stat().st_size <= FILE_BYTES:
                self.add(name, path.read_bytes())
        except (OSError, ValueError):
            self.unreadable.append(name)


def thumbnail(data: bytes) -> str | None:
    """Return a picture file as a small JPEG in a ``data:`` URL, None if it is no picture."""
    try:
        picture = decode(data, 2 * SIDE, MOST_PIXELS).picture
    except Unreadable:
        return None
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def by_key(spec: str, keys: Iterable[str]) -> Thumbnails:
    """Return thumbnails of keys: names of files without suffix.

    ``spec`` is a folder of picture files (also in its folders) or of tar shards, a tar, or a glob
    of tars. A key that could name a file elsewhere is left out.
    """
    found, path = Thumbnails(), Path(spec).expanduser()
    wanted = {key for key in keys if key not in ("", ".", "..") and not set(key) & set("/\\\0")}
    if path.is_dir():
        tars = natural_sort(p for p in path.glob("*.tar") if p.is_file())
    elif path.is_file() and path.suffix == ".tar":
        tars = [path]
    else:
        tars = natural_sort(map(Path, glob(str(path)))) if has_magic(spec) else []
    if tars:
        add_from_tars(tars, wanted, found)
    elif path.is_dir():
        for key, files in picture_files(path, sorted(wanted)).items():
            if len(files) == 1:
                found.add_file(files[0], key)
            elif files:
                found.ambiguous.append(key)
    else:
        raise SnipError(f"--images {spec}: no such folder of pictures, and no tar")
    return found


def by_path(paths: Iterable[str], folder: str | None) -> Thumbnails:
    """Return thumbnails of local files, relative to ``folder``; none outside it is opened."""
    found = Thumbnails()
    root = None if folder is None else Path(folder).expanduser().resolve()
    for name in sorted(set(paths)):
        path = Path(name).expanduser() if root is None else (root / name).resolve()
        inside = root is None or path.is_relative_to(root)
        if inside and path.name.lower().endswith(SUFFIXES):
            found.add_file(path, name)
    return found


def img2dataset_shard(key: str) -> str:
    """Return the folder or tar that img2dataset puts a key in."""
    return key[:SHARD_DIGITS] if key.isdecimal() and len(key) > SHARD_DIGITS else ""


def picture_files(folder: Path, keys: list[str]) -> dict[str, list[Path]]:
    """Return the picture files of keys: where they should be, else anywhere below the folder."""
    found: dict[str, list[Path]] = {}
    for key in keys:
        parents = (folder, folder / img2dataset_shard(key))
        likely = (parent / (key + suffix) for parent in parents for suffix in SUFFIXES)
        found[key] = [path for path in likely if path.is_file()][:1]
    missing = {key for key, paths in found.items() if not paths}
    for parent, _, names in os.walk(folder) if missing else ():  # links are not followed
        for path in (Path(parent, name) for name in sorted(names)):
            if path.stem in missing and path.suffix.lower() in SUFFIXES:
                found[path.stem].append(path)
    return found


def add_from_tars(tars: list[Path], wanted: set[str], found: Thumbnails) -> None:
    """Read tars until every key has its picture, first those that keys name as img2dataset does.

    A member's key is its name up to the first dot, as in webdataset; its first picture counts.
    """
    named = {img2dataset_shard(key) for key in wanted}
    order = sorted(tars, key=lambda path: path.stem not in named)
    with progress.bar(len(order), "pictures", "tars") as bar:
        for path in order:
            if wanted <= found.pictures.keys():
                return
            try:
                with tarfile.open(path, "r:") as tar:
                    for member in tar:
                        name = PurePosixPath(member.name).name
                        key = name.partition(".")[0]
                        new = key in wanted and key not in found.pictures
                        usable = member.isfile() and member.size <= FILE_BYTES
                        if new and usable and name.lower().endswith(SUFFIXES):
                            file = tar.extractfile(member)
                            found.add(key, b"" if file is None else file.read())
            except (tarfile.TarError, OSError, EOFError) as error:
                raise SnipError(f"{path}: truncated or not a tar: {error}") from error
            bar.update(1)
