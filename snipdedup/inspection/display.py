"""Texts from strangers, made safe to show: on one line, cut, and linked only where that is safe.

Captions, keys and urls may hold what steers a terminal or breaks a page.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import numpy as np

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")  # line breaks among them
# White space, and what steers a terminal or the direction of writing.
STEERING = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")
URL_CHARS = 2048  # characters of a url that may be followed, at the most


def page_text(text: str, most: int) -> str:
    """Return a text for a page: on one line, at most so many characters."""
    text = CONTROL.sub(" ", text[: 4 * most]).strip()
    return text if len(text) <= most else text[:most].rstrip() + "…"


def terminal_text(text: str, most: int | None = None) -> str:
    """Return a text for a terminal: on one line, nothing that steers it, cut to a width."""
    text = STEERING.sub(" ", text).strip()
    return text if most is None or len(text) <= most else text[: most - 1] + "…"


def safe_link(url: str) -> str:
    """Return a url that may be followed: http or https with a host, and nothing odd in it."""
    odd = any(c.isspace() or c in "\\\"'<>`" for c in url)
    if odd or len(url) > URL_CHARS or CONTROL.search(url):
        return ""
    try:
        parts = urlsplit(url)
        usual = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return ""
    return url if usual else ""


def shard_offsets(shards: list[dict[str, Any]]) -> np.ndarray:
    """Return the first row of each shard of a manifest, then the number of rows."""
    return np.cumsum([0, *(shard["rows"] for shard in shards)], dtype=np.int64)


def place_of(shards: list[dict[str, Any]], offsets: np.ndarray, row: int) -> dict[str, Any]:
    """Return a row's shard and its row in it, by the names that JSON has."""
    number = int(np.searchsorted(offsets, row, side="right")) - 1
    return {"shard": str(shards[number]["name"]), "shard_row": row - int(offsets[number])}
