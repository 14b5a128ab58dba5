"""What ``snip embed`` says of features that it made: their model, its threshold, the pictures."""

from __future__ import annotations

import json
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

from snipdedup.config import THRESHOLD
from snipdedup.errors import SnipError
from snipdedup.storage.listing import FEATURES
from snipdedup.storage.out_folder import MANIFEST
from snipdedup.storage.remote import is_remote, path_of
from snipdedup.storage.web import is_web

EMBEDDED = "embed"  # the kind of its manifests


class Origin(NamedTuple):
    """The folder that ``snip embed`` wrote, and what its manifest says."""

    folder: str  # path or URL
    model: str
    threshold: float  # the cosine that is usual for the model
    images: list[str]  # IMAGES: absolute paths and URLs
    column: str | None  # of the pictures in parquet files, where it was named


def origin_of(source: Any) -> Origin | None:
    """Return the origin of FEATURES that ``snip embed`` made, None of all others.

    ``source`` is its folder, or the ``img_emb`` in it or files of that: also by links, a glob or a
    list, if all lie in one such folder.
    """
    folders = {folder_of(place) for place in places_of(source)}
    if len(folders) != 1:
        return None
    folder = folders.pop()
    path = path_of(f"{folder}/{MANIFEST}")
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            manifest = json.load(file)
    except (OSError, ValueError) as error:
        raise SnipError(f"{path}: expected a manifest of snip: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != EMBEDDED:
        return None
    model = manifest.get("model")
    known = model if isinstance(model, dict) else {}
    limit = known.get("threshold")
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not -1 <= limit <= 1:
        raise SnipError(f"{path}: damaged: its model has the threshold {limit!r}")
    settings = manifest.get("settings")
    given = settings if isinstance(settings, dict) else {}
    images = given.get("images")
    named = [str(one) for one in images] if isinstance(images, list) else []
    return Origin(folder, str(known.get("name")), float(limit), named, given.get("column"))


def places_of(source: Any) -> list[str]:
    """Return the paths and URLs that FEATURES name, without links; none of an array."""
    if isinstance(source, list | tuple) and all(isinstance(one, str | Path) for one in source):
        return [place for one in source for place in places_of(one)]
    if not isinstance(source, str | Path) or is_web(str(source)):  # no folders there
        return []
    if is_remote(source):
        return [str(source)]
    path = path_of(str(source))
    named = glob(str(path)) if has_magic(str(path)) and not path.exists() else [path]
    return [str(Path(one).resolve()) for one in named]


def folder_of(place: str) -> str:
    """Return the folder that holds the ``img_emb`` which is meant, or in which it lies."""
    above, _, name = place.rstrip("/").rpartition("/")
    if above.rpartition("/")[2] == FEATURES:
        return above.rpartition("/")[0]
    return above if name == FEATURES else place.rstrip("/")


def usual_threshold(source: Any) -> tuple[float, str | None]:
    """Return the cosine of two duplicates that is usual for FEATURES, and the model's name.

    Of features of unknown origin these are CLIP's, and None.
    """
    origin = origin_of(source)
    return (THRESHOLD, None) if origin is None else (origin.threshold, origin.model)
