"""What ``snip embed`` says of features that it made: their model, its threshold, the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from snipdedup.config import THRESHOLD
from snipdedup.errors import SnipError
from snipdedup.storage.listing import FEATURES
from snipdedup.storage.out_folder import MANIFEST
from snipdedup.storage.remote import absolute_location, is_remote, path_of
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

    ``source`` is its folder, or the ``img_emb`` in it or files of that.
    """
    if not isinstance(source, str | Path) or is_web(str(source)):  # no folders there
        return None
    text = str(source) if is_remote(source) else absolute_location(source)
    above, _, name = text.rstrip("/").rpartition("/")
    if above.rpartition("/")[2] == FEATURES:
        folder = above.rpartition("/")[0]
    else:
        folder = above if name == FEATURES else text.rstrip("/")
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


def usual_threshold(source: Any) -> tuple[float, str | None]:
    """Return the cosine of two duplicates that is usual for FEATURES, and the model's name.

    Of features of unknown origin these are CLIP's, and None.
    """
    origin = origin_of(source)
    return (THRESHOLD, None) if origin is None else (origin.threshold, origin.model)
