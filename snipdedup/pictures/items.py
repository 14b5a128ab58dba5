"""One picture where it lies, and what is written beside it; small enough to be sent to a worker."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif",
    ".heic", ".heif",
)  # fmt: skip
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".3gp", ".wmv")
TEXTS = (".txt", ".json")  # caption and url beside a picture
FILE_BYTES = 1 << 30  # longer files are not read
CAPTIONS, URLS = ("caption", "text"), ("url",)


class Text(NamedTuple):
    """What is written beside a picture."""

    caption: str | None = None
    url: str | None = None


class Item(NamedTuple):
    """One picture: its key, where it lies, and its bytes or where to read them."""

    key: str
    place: dict[str, Any]  # columns of the metadata that say so
    data: bytes | None = None  # None: of the path, from ``begin`` on, ``size`` bytes or all
    path: Path | None = None
    begin: int = 0
    size: int | None = None
    text: Text = Text()
    beside: tuple[Path, ...] = ()  # `TEXTS` to read
    refused: str | None = None  # why it cannot be embedded

    @property
    def source(self) -> str:
        """Where it lies, for people."""
        return ": ".join(str(value) for value in self.place.values())


def suffix_of(name: str) -> str:
    """Return the last suffix of a name, in lower case."""
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""


def read_texts(txt: bytes | None, described: bytes | None) -> Text:
    """Return caption and url of a ``.txt`` and a ``.json``; the caption of the text comes first."""
    known: Any = {}
    with suppress(ValueError, RecursionError):
        known = json.loads(described or b"{}")
    known = {str(k).lower(): v for k, v in known.items()} if isinstance(known, dict) else {}
    caption, url = (
        next((clean(known[n]) for n in names if isinstance(known.get(n), str)), None)
        for names in (CAPTIONS, URLS)
    )
    return Text(caption if txt is None else txt.decode(errors="replace").strip(), url)


def clean(text: str) -> str:
    """Return a text that can be written as UTF-8."""
    return text.encode(errors="backslashreplace").decode()
