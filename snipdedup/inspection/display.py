"""What pages and tables are made of: templates, numbers, places of rows, and strangers' texts.

Captions, keys and urls may hold what steers a terminal or breaks a page. They are shown on one
line, cut, and linked only where that is safe.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from snipdedup.errors import SnipError

TEMPLATES = Path(__file__).parent / "templates"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")  # line breaks among them
# White space, and what steers a terminal or the direction of writing.
STEERING = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")
URL_CHARS = 2048  # characters of a url that may be followed, at the most


def require(module: str, what: str) -> None:
    """Refuse what needs a module of the extra ``report`` where that is not installed."""
    if importlib.util.find_spec(module) is None:
        raise SnipError(f"{what} needs {module}: pip install 'snipdedup-toolkit[report]'")


def render_page(template: str, script: str = "", **values: Any) -> str:
    """Return a page from one of the templates; every value in it is escaped.

    The page's own policy allows its style and its script only. With a script, a picture may come
    over http and https too, when the reader asks for it.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": "{:,}".format, "percent": percent, "cosine": cosine_text}
    styles = (TEMPLATES / "report.css").read_text("utf-8")
    rules = [f"default-src 'none'; style-src {content_hash(styles)}"]
    if script:
        rules += [f"script-src {content_hash(script)}", "img-src data: https: http:"]
    policy = "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])
    page = environment.get_template(template)
    return page.render(policy=policy, styles=styles, script=script, **values)


def content_hash(text: str) -> str:
    """Return the source of a content policy that allows this style or script only."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def percent(part: float, whole: float) -> str:
    """Return a share for reading."""
    return f"{100 * part / whole:.2f} %" if whole else "0 %"


def cosine_text(value: float) -> str:
    """Return a cosine for reading; one below 1 is never shown as 1."""
    if np.isnan(value):
        return "unknown"
    return "1" if value == 1 else f"{min(value, 0.9999):.4f}"


def page_text(text: str, most: int) -> str:
    """Return a text for a page: on one line, at most so many characters."""
    text = CONTROL.sub(" ", text[: 4 * most]).strip()
    return text if len(text) <= most else text[:most].rstrip() + "…"


def terminal_text(text: str, most: int | None = None) -> str:
    """Return a text for a terminal: on one line, nothing that steers it, cut to a width."""
    text = STEERING.sub(" ", text).strip()
    return text if most is None or len(text) <= most else text[: most - 1] + "…"


def safe_link(url: str) -> str:
    """Return a url that may be followed, else nothing: http or https with a host, nothing odd."""
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


def places_of(shards: list[dict[str, Any]], rows: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Return each row's ``shard`` and ``shard_row``, by the shards of a manifest."""
    offsets, places = shard_offsets(shards), {}
    for row in rows:
        number = int(np.searchsorted(offsets, row, side="right")) - 1
        place = {"shard": str(shards[number]["name"]), "shard_row": row - int(offsets[number])}
        places[row] = place
    return places
