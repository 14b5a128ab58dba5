"""Files on a web server: every status, length and range is checked before it is believed.

Nothing but the standard library. What a URL may hide (a password, a signed query) is kept out of
messages and manifests.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

import pyarrow as pa
import pyarrow.parquet as pq

from snipdedup import __version__, store
from snipdedup.errors import SnipError

TIMEOUT_S = 60
CHUNK = 1 << 20
TAIL = 1 << 16  # most footers fit, so that one request counts a file's rows
PARQUET_END = 8  # four bytes of footer length and the magic number
MAGIC = b"PAR1"
ADVICE = {
    401: "it is gated or private: fetch it with the host's own tool, then give the local folder",
    403: "it is gated or private: fetch it with the host's own tool, then give the local folder",
    404: "check the URL and the file numbers",
    410: "check the URL and the file numbers",
    416: "the server cannot send that part of it",
    429: "the server asks for fewer requests: run again later, what is complete is kept",
}


class MissingError(SnipError):
    """The server says that there is no such file."""


def is_url(text: str) -> bool:
    """Tell a URL from a path; refuse a URL that is not http(s)."""
    scheme, mark, _ = text.partition("://")
    if not mark:
        return False
    if scheme.lower() not in ("http", "https"):
        raise SnipError(
            f"{shown(text)}: expected an http(s) URL or a local path, found {scheme}://; fetch it "
            "with a tool for it, then give the local folder"
        )
    return True


def shown(url: str) -> str:
    """Return a URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def name_of(url: str) -> str:
    """Return the file name at the end of a URL."""
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    if not name or name.startswith(".") or re.search(r"[/\\\0]", name):
        raise SnipError(f"{shown(url)}: expected a file name at its end")
    return name


def get(url: str, span: str | None = None) -> HTTPResponse:
    """Ask for a URL, or for the bytes ``span`` of it (RFC 9110, 14.2); redirects are followed.

    Raises
    ------
    SnipError
        If the server cannot be reached or says anything but 200 or 206.
    """
    headers = {"User-Agent": f"snipdedup/{__version__}", "Accept-Encoding": "identity"}
    if span:
        headers["Range"] = f"bytes={span}"
    try:
        response: HTTPResponse = urlopen(Request(url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        error.close()
        raise refusal(url, error) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise SnipError(f"{shown(url)}: the server cannot be reached: {reason}") from error
    if response.status not in (200, 206) or (response.status == 206 and not span):
        response.close()
        raise SnipError(f"{shown(url)}: expected status 200, found {response.status}")
    return response


def refusal(url: str, error: HTTPError) -> SnipError:
    """Return what a status of 400 and above means, and what to do."""
    advice = ADVICE.get(error.code, "")
    if error.code >= 500:
        advice = "the server has a fault: run again later, what is complete is kept"
    wait = error.headers.get("Retry-After") if error.headers else None
    text = f"{shown(url)}: {error.code} {error.reason}"
    text += f"; {advice}" if advice else ""
    text += f" (it says after {wait})" if wait else ""
    return MissingError(text) if error.code in (404, 410) else SnipError(text)


def chunks(response: HTTPResponse, url: str) -> Iterator[bytes]:
    """Yield the body; refuse one that ends before its announced length."""
    told = response.headers.get("Content-Length", "")
    found = 0
    with response:
        while True:
            try:
                chunk = response.read(CHUNK)
            except (OSError, HTTPException) as error:
                raise SnipError(
                    f"{shown(url)}: the connection broke after {found:,} bytes: {error}; run again"
                ) from error
            if not chunk:
                break
            found += len(chunk)
            yield chunk
    if told.isdecimal() and int(told) != found:
        raise SnipError(
            f"{shown(url)}: truncated: {int(told):,} bytes were announced, {found:,} came; run "
            "again"
        )


def save(url: str, path: Path) -> dict[str, Any]:
    """Write a URL to a file, whole or not at all; return its ``size`` and ``etag``."""
    response = get(url)
    with store.replacing(path) as part, part.open("wb") as file:
        for chunk in chunks(response, url):
            file.write(chunk)
    return {"size": path.stat().st_size, "etag": response.headers.get("ETag")}


def parquet_rows(url: str) -> int | None:
    """Count the rows of a parquet file from its footer, fetched by range.

    Returns
    -------
    int or None
        None where the server does not send ranges: then the whole file is needed.
    """
    tail = read_tail(url, TAIL)
    if tail is None:
        return None
    need = footer_size(tail, url)
    if need > len(tail):
        tail = read_tail(url, need)
        if tail is None or len(tail) < need:
            raise SnipError(f"{shown(url)}: truncated: its footer is longer than the file")
    try:
        # What stands before the footer is not looked at, but a file begins with the magic number.
        metadata = pq.read_metadata(io.BytesIO(MAGIC + tail[-need:]))
    except (pa.ArrowException, OSError) as error:
        raise SnipError(f"{shown(url)}: damaged parquet footer: {error}") from error
    return int(metadata.num_rows)


def read_tail(url: str, size: int) -> bytes | None:
    """Return the last ``size`` bytes, all where there are fewer; None without ranges."""
    response = get(url, f"-{size}")
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    if response.status != 206 or not span:
        response.close()
        return None
    first, last, total = map(int, span.groups())
    body = b"".join(chunks(response, url))
    if last != total - 1 or len(body) != last - first + 1 or len(body) != min(size, total):
        return None  # not the part that was asked for
    return body


def footer_size(tail: bytes, url: str) -> int:
    """Return how many bytes at the end of a parquet file its footer takes."""
    if len(tail) < PARQUET_END + len(MAGIC) or tail[-4:] != MAGIC:
        raise SnipError(f"{shown(url)}: truncated or not a parquet file")
    return int.from_bytes(tail[-PARQUET_END:-4], "little") + PARQUET_END
