"""Small pictures of a few rows, from a folder, tar shards or local paths, as ``data:`` URLs.

Keys, paths and picture files come from strangers: a key never leads out of its folder, and a file
that is no picture, or too large a one, is left out.
"""

from __future__ import annotations

import base64
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from snipdedup import progress
from snipdedup.errors import SnipError
from snipdedup.features.shards import natural_sort

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # none that runs other programs, as EPS does
SIDE = 168  # pixels: twice as many as are shown on a narrow screen
QUALITY = 70
FILE_BYTES = 64 << 20
PIXELS = 200_000_000
GROUND = (238, 236, 231)  # behind what is transparent
SHARD_DIGITS = 5  # img2dataset: the shard's number begins the key


@dataclass
class Found:
    """Thumbnails by what was asked for, and what of it there is no thumbnail of.

    Attributes
    ----------
    pictures : dict
        Key or path to ``data:`` URL.
    unreadable, ambiguous : list of str
        Files that are no pictures; keys that several files have.
    """

    pictures: dict[str, str] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)

    def add(self, name: str, data: bytes) -> None:
        """Take the bytes of a picture file."""
        picture = thumbnail(data)
        if picture is None:
            self.unreadable.append(name)
        else:
            self.pictures[name] = picture


def require_pillow() -> None:
    """Refuse pictures where Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise SnipError(
            "pictures need Pillow: pip install 'snipdedup-toolkit[report]', or leave out --images "
            "and --image_column"
        ) from None


def thumbnail(data: bytes) -> str | None:
    """Return a picture file as a small JPEG in a ``data:`` URL, None if it is no picture."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > PIXELS:
                return None
            opened.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded smaller
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except Exception:  # a damaged file can fail in many ways inside Pillow
        return None
    picture.thumbnail((SIDE, SIDE))
    whole = Image.new("RGB", picture.size, GROUND)
    whole.paste(picture, mask=picture)
    file = io.BytesIO()
    whole.save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def by_key(spec: str, keys: Iterable[str]) -> Found:
    """Return thumbnails of keys.

    Parameters
    ----------
    spec : str
        A folder of picture files (also in its folders) or of tar shards, a tar, or a glob of tars.
    keys : iterable of str
        Names of the files without suffix.

    Raises
    ------
    SnipError
        If there is no such folder, or neither pictures nor tars in it.
    """
    found, wanted = Found(), {key for key in keys if is_plain(key)}
    folder = Path(spec).expanduser()
    tars = find_tars(spec)
    if tars:
        from_tars(tars, wanted, found)
    elif folder.is_dir():
        from_folder(folder, wanted, found)
    else:
        raise SnipError(f"--images {spec}: no such folder of pictures, and no tar")
    return found


def by_path(paths: Iterable[str], folder: str | None) -> Found:
    """Return thumbnails of local files, named from ``folder`` on; none outside it is opened."""
    found = Found()
    root = None if folder is None else Path(folder).expanduser().resolve()
    for name in sorted(set(paths)):
        path = Path(name).expanduser() if root is None else (root / name).resolve()
        if root is not None and not path.is_relative_to(root):
            continue
        if has_suffix(path.name):
            read_file(path, name, found)
    return found


def is_plain(key: str) -> bool:
    """Tell whether a key can be the name of a file, and of none elsewhere."""
    return bool(key) and key not in (".", "..") and not set(key) & set("/\\\0")


def has_suffix(name: str) -> bool:
    """Tell whether a file is called like a picture."""
    return name.lower().endswith(SUFFIXES)


def find_tars(spec: str) -> list[Path]:
    """Return the tar shards that ``--images`` means."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return natural_sort(p for p in path.glob("*.tar") if p.is_file())
    if path.is_file() and path.suffix == ".tar":
        return [path]
    return natural_sort(map(Path, glob(str(path)))) if has_magic(spec) else []


def read_file(path: Path, name: str, found: Found) -> None:
    """Take one file, if it is there and not huge."""
    try:
        if path.is_file() and path.stat().st_size <= FILE_BYTES:
            found.add(name, path.read_bytes())
    except (OSError, ValueError):
        found.unreadable.append(name)


def from_folder(folder: Path, wanted: set[str], found: Found) -> None:
    """Look for keys where they should be; search the folder's folders for the rest."""
    rest = set()
    for key in sorted(wanted):
        parents = (folder, folder / shard_of(key))
        likely = (parent / (key + suffix) for parent in parents for suffix in SUFFIXES)
        path = next((path for path in likely if path.is_file()), None)
        if path is None:
            rest.add(key)
        else:
            read_file(path, key, found)
    places: dict[str, list[Path]] = {}
    for path in files_below(folder) if rest else ():
        if path.stem in rest:
            places.setdefault(path.stem, []).append(path)
    for key, paths in sorted(places.items()):
        if len(paths) == 1:
            read_file(paths[0], key, found)
        else:
            found.ambiguous.append(key)


def shard_of(key: str) -> str:
    """Return the folder or tar that img2dataset puts a key in."""
    return key[:SHARD_DIGITS] if key.isdecimal() and len(key) > SHARD_DIGITS else ""


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all picture files of a folder and its folders; links are not followed."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in sorted(names) if has_suffix(name))


def from_tars(tars: list[Path], wanted: set[str], found: Found) -> None:
    """Read tars until every key has its picture, first those that keys name as img2dataset does."""
    named = {shard_of(key) for key in wanted}
    likely = [path for path in tars if path.stem in named]
    order = likely + [path for path in tars if path.stem not in named]
    with progress.bar(len(order), "pictures", "tars") as bar:
        for path in order:
            if wanted <= found.pictures.keys():
                return
            from_tar(path, wanted, found)
            bar.update(1)


def from_tar(path: Path, wanted: set[str], found: Found) -> None:
    """Take the wanted members of one tar; the first picture of a key counts."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key = member_key(member)
                if key in wanted and key not in found.pictures and member.size <= FILE_BYTES:
                    found.add(key, contents(tar, member))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SnipError(f"{path}: truncated or not a tar: {error}") from error


def member_key(member: Any) -> str:
    """Return a tar member's key as webdataset has it: its name up to the first dot."""
    name = PurePosixPath(member.name).name
    return name.partition(".")[0] if member.isfile() and has_suffix(name) else ""


def contents(tar: Any, member: Any) -> bytes:
    """Return the bytes of a member."""
    file = tar.extractfile(member)
    return b"" if file is None else file.read()
