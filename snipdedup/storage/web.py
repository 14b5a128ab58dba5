"""URLs as text, and GET requests to web servers: ranges, redirects, tokens, errors that help.

Status, length and range of every response are checked. A token is sent to its own origin only.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from snipdedup import __version__
from snipdedup.errors import MissingError, RangeError, SnipError, TemporaryError, UsageError

PART = "{part"  # begins the place of the file number in a pattern
TIMEOUT_S = 30
CHUNK = 1 << 20
URL_CHARACTERS = "%:/?#[]@!$&'()*+,;=~"  # what a URL may hold unquoted (RFC 3986, 2.2)
AGAIN = "run again later: complete files are kept"
GATED = (
    "it is gated: open {page} in a browser, accept its terms, log in with: hf auth login, and run "
    "again; or fetch it with the host's own tool, then give the local folder"
)
DISABLED = "it was disabled by its owner or the host and cannot be fetched; choose another source"
PRIVATE = (
    "it is gated or private: fetch it with the host's own tool, then give the local folder; a "
    "hub's token is used with hf:// sources only"
)
ADVICE = {
    401: PRIVATE,
    403: PRIVATE,
    404: "check the URL and the file numbers",
    410: "it was removed; check the URL",
    416: "the file has no such range of bytes",
    429: f"the server asks for fewer requests: {AGAIN}",
    451: "the host may not send it to your country",
}
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
KINDS: dict[int, type[SnipError]] = {404: MissingError, 410: MissingError, 416: RangeError}


class NoRangesError(SnipError):
    """A web server sends whole files only."""


class Stream(NamedTuple):
    """The bytes of a file from ``begin`` on, its length (None if unknown), and its version."""

    begin: int
    total: int | None
    version: str
    chunks: Iterator[bytes]


class FileVersion(NamedTuple):
    """Size of a file, and a text that changes when the file does; empty where nothing tells."""

    size: int
    version: str


@dataclass(frozen=True)
class Token:
    """A token, and the only origin (scheme, host, port) that it may be sent to."""

    origin: str
    text: str = field(repr=False)


def scheme_of(location: str) -> str:
    """Return the scheme of a URL in lower case, an empty text for a path."""
    scheme, mark, _ = location.partition("://")
    return scheme.lower() if mark else ""


def is_web(location: str) -> bool:
    """Tell whether a location is an http(s) URL."""
    return scheme_of(location) in ("http", "https")


def redacted(location: str) -> str:
    """Return a URL without user, password, query and fragment; a path as it is."""
    if is_web(location):
        parts = urlsplit(location)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return re.sub(r"://[^/]*@", "://", location)


def name_of(location: str) -> str:
    """Return the file name at the end of a location; refuse one that is empty, hidden or a path."""
    name = location.rpartition("/")[2]
    if is_web(location):
        name = unquote(urlsplit(location).path.rpartition("/")[2])
    if not name or name.startswith(".") or re.search(r"[/\\\0]", name):
        raise SnipError(f"{redacted(location)}: expected a file name at its end")
    return name


def expand_parts(pattern: str, numbers: Iterable[int]) -> list[str]:
    """Put file numbers into a ``{part:04d}`` pattern; refuse one with other fields."""
    try:
        return [pattern.format(part=number) for number in numbers]
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        expected = "a pattern such as img_emb_{part:04d}.npy"
        raise UsageError(f"{redacted(pattern)}: expected {expected}") from error


def origin_of(url: str) -> str:
    """Return scheme, host and port of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme.lower()}://{parts.netloc.rpartition('@')[2].lower()}"


class SafeRedirects(HTTPRedirectHandler):
    """Follows redirects between web servers, not from https to http; no token leaves its origin."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """See `HTTPRedirectHandler.redirect_request`."""
        downgraded = scheme_of(req.full_url) == "https" and scheme_of(newurl) != "https"
        if downgraded or not is_web(newurl):
            raise HTTPError(req.full_url, code, f"redirects to {redacted(newurl)}", headers, fp)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and origin_of(newurl) != origin_of(req.full_url):
            request.remove_header("Authorization")
        return request


OPENER = build_opener(SafeRedirects)


def open_range(
    url: str, begin: int = 0, end: int | None = None, token: Token | None = None, if_range: str = ""
) -> Stream:
    """Request the bytes ``begin`` to ``end`` (exclusive; None: the last) of a file.

    Without an ``end`` the whole file comes if the server has no ranges (RFC 9110, 14.2), or if
    ``if_range``, a strong ETag, is not the file's any more (13.1.5). What is worth another try (a
    broken connection, 429, 5xx) raises `TemporaryError`, other answers raise as `KINDS` lists.
    """
    url = quote(url, safe=URL_CHARACTERS)
    headers = {"User-Agent": f"snipdedup/{__version__}", "Accept-Encoding": "identity"}
    if begin or end:
        headers["Range"] = f"bytes={begin}-{'' if end is None else end - 1}"
        headers |= {"If-Range": if_range} if if_range else {}
    if token is not None and origin_of(url) == token.origin:
        headers["Authorization"] = f"Bearer {token.text}"
    try:
        response: HTTPResponse = OPENER.open(Request(url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        error.close()
        page = redacted(url).partition("/resolve/")[0]  # if it is a file of the hub
        what = f"{redacted(url)}:"
        raise status_error(what, page, error.code, error.reason, error.headers) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        text = f"{redacted(url)}: the server cannot be reached: {reason}"
        if isinstance(reason, ValueError) or getattr(reason, "errno", None) == socket.EAI_NONAME:
            raise SnipError(f"{text}; check the URL") from error
        raise TemporaryError(f"{text}; {AGAIN}") from error
    try:
        first, total = received_range(response, redacted(url), begin, end)
    except SnipError:
        response.close()  # before the whole file comes
        raise
    version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return Stream(first, total, version, read_body(response, redacted(url)))


def read_range(url: str, begin: int, end: int, token: Token | None) -> tuple[FileVersion, bytes]:
    """Request the bytes ``begin`` to ``end`` (exclusive); return the file's version, and them."""
    stream = open_range(url, begin, end, token)
    data = b"".join(stream.chunks)
    return FileVersion(stream.total or 0, stream.version), data


def received_range(
    response: HTTPResponse, name: str, begin: int, end: int | None
) -> tuple[int, int | None]:
    """Return the first byte that comes, and the length of the file, None if it is not known.

    Other bytes than were requested are refused.
    """
    if response.status == 206 and (begin or end):
        header = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", header)
        first, last, total = map(int, found.groups()) if found else (-1, -1, -1)
        if (first, last + 1) != (begin, end or total):
            wanted = f"bytes {begin} to {end or 'the last'} (exclusive)"
            kind = RangeError if end is None else TemporaryError
            raise kind(f"{name}: expected {wanted}, found Content-Range {header!r}; run it again")
        return first, total
    if response.status != 200:
        raise SnipError(f"{name}: expected status 200, found {response.status}")
    if end is not None:
        text = f"{name}: cannot be read in parts: the server sends whole files only"
        raise NoRangesError(f"{text}: fetch it first with snip download, or by hand")
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def status_error(what: str, page: str, code: int, reason: str, headers: Any) -> SnipError:
    """Return the error for a status of 300 and above.

    ``what`` begins its text, ``page`` is where the terms of a gated repository are.
    """
    advice = ADVICE.get(code, "")
    if 300 <= code < 400:
        advice = "it has moved, but not to a URL that can be followed: give its new URL"
    elif headers.get("X-Error-Code") == "GatedRepo":  # this header and the next one are the hub's
        advice = GATED.format(page=page)
    elif "disabled" in headers.get("X-Error-Message", ""):
        advice = DISABLED
    elif code >= 500:
        advice = f"the server has a fault: {AGAIN}"
    reason = str(reason).partition("\n")[0]
    text = f"{what} {code} {reason}" + (f"; {advice}" if advice else "")
    if code not in TEMPORARY:
        return KINDS.get(code, SnipError)(text)
    asked = str(headers.get("Retry-After") or "").strip()
    limit = re.search(r"\br=0\b.*\bt=(\d+)", str(headers.get("RateLimit") or ""))  # the hub's
    wait = float(limit[1]) if limit else None
    if asked.isdecimal():
        wait = float(asked)
    elif asked:
        with suppress(ValueError):  # not a date either
            wait = max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    return TemporaryError(text + (f" (it asks to wait {wait:,.0f} s)" if wait else ""), wait)


def read_body(response: HTTPResponse, name: str) -> Iterator[bytes]:
    """Yield the body as it comes; refuse one that ends before its announced length."""
    length = response.headers.get("Content-Length", "")
    found, why = 0, ""
    with response:
        try:
            while chunk := response.read1(CHUNK):  # what is there, so that a kill loses little
                found += len(chunk)
                yield chunk
        except (OSError, HTTPException) as error:
            why = f"the connection broke: {error}"
    if not why and length.isdecimal() and int(length) != found:
        why = f"truncated: {int(length):,} bytes announced"
    if why:
        raise TemporaryError(f"{name}: {why}, {found:,} came; {AGAIN}")
