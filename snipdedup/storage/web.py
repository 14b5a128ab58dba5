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
from snipdedup.errors import (
    InputError,
    MissingError,
    RangeError,
    SnipError,
    TemporaryError,
    UsageError,
)

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


def get(
    url: str, byte_range: str | None = None, if_range: str | None = None, token: Token | None = None
) -> HTTPResponse:
    """Request a URL, or a range of its bytes: ``"100-"``, ``"100-199"`` (RFC 9110, 14.2).

    The whole file comes, with status 200, if the server has no ranges, or if ``if_range``, a strong
    ETag, is not the file's any more (RFC 9110, 13.1.5). What is worth another try (a broken
    connection, 429, 5xx) raises `TemporaryError`, other answers raise as `KINDS` lists.
    """
    url = quote(url, safe=URL_CHARACTERS)
    headers = {"User-Agent": f"snipdedup/{__version__}", "Accept-Encoding": "identity"}
    if byte_range:
        headers["Range"] = f"bytes={byte_range}"
        headers |= {"If-Range": if_range} if if_range else {}
    if token is not None and origin_of(url) == token.origin:
        headers["Authorization"] = f"Bearer {token.text}"
    try:
        response: HTTPResponse = OPENER.open(Request(url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        error.close()
        raise status_error(url, error) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        text = f"{redacted(url)}: the server cannot be reached: {reason}"
        if isinstance(reason, ValueError) or getattr(reason, "errno", None) == socket.EAI_NONAME:
            raise SnipError(f"{text}; check the URL") from error
        raise TemporaryError(f"{text}; {AGAIN}") from error
    if response.status not in (200, 206) or (response.status == 206 and not byte_range):
        response.close()
        raise SnipError(f"{redacted(url)}: expected status 200, found {response.status}")
    return response


def get_range(
    url: str, begin: int, end: int, token: Token | None, expected: FileVersion | None = None
) -> tuple[FileVersion, bytes]:
    """Request the bytes ``begin`` to ``end`` (exclusive); return the file's version, and them.

    A file that has not the ``expected`` version is refused.
    """
    with get(url, f"{begin}-{end - 1}", token=token) as response:
        if response.status != 206:  # before the whole file comes
            text = f"{redacted(url)}: cannot be read in parts: the server sends whole files only"
            raise NoRangesError(f"{text}: fetch it first with snip download, or by hand")
        first, last, size = content_range(response, url)
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        version = FileVersion(size, str(tag))
        if expected not in (None, version):
            raise InputError(f"{redacted(url)}: changed while it was read; run it again")
        if (first, last) != (begin, end - 1):
            text = f"{redacted(url)}: bytes {begin}-{end - 1} requested, {first}-{last} came"
            raise TemporaryError(text)
        return version, b"".join(read_body(response, url))


def status_error(url: str, error: HTTPError) -> SnipError:
    """Return the error for a status of 300 and above."""
    headers, code = error.headers, error.code
    advice = ADVICE.get(code, "")
    if 300 <= code < 400:
        advice = "it has moved, but not to a URL that can be followed: give its new URL"
    elif headers.get("X-Error-Code") == "GatedRepo":  # this header and the next one are the hub's
        advice = GATED.format(page=redacted(url).partition("/resolve/")[0])
    elif "disabled" in headers.get("X-Error-Message", ""):
        advice = DISABLED
    elif code >= 500:
        advice = f"the server has a fault: {AGAIN}"
    reason = str(error.reason).partition("\n")[0]
    text = f"{redacted(url)}: {code} {reason}" + (f"; {advice}" if advice else "")
    return temporary_error(text, headers) if code in TEMPORARY else KINDS.get(code, SnipError)(text)


def temporary_error(text: str, headers: Any) -> TemporaryError:
    """Return an error with the wait that a server asks for: Retry-After, or the hub's RateLimit."""
    asked = str(headers.get("Retry-After") or "").strip()
    limit = re.search(r"\br=0\b.*\bt=(\d+)", str(headers.get("RateLimit") or ""))
    wait = float(limit[1]) if limit else None
    if asked.isdecimal():
        wait = float(asked)
    elif asked:
        with suppress(ValueError):  # not a date either
            wait = max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    return TemporaryError(text + (f" (it asks to wait {wait:,.0f} s)" if wait else ""), wait)


def content_range(response: HTTPResponse, url: str) -> tuple[int, int, int]:
    """Return first byte, last byte and length of the whole file from the headers of a 206."""
    header = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", header)
    if not found:
        response.close()
        raise RangeError(f"{redacted(url)}: expected a Content-Range, found {header!r}")
    return int(found[1]), int(found[2]), int(found[3])


def read_body(response: HTTPResponse, url: str) -> Iterator[bytes]:
    """Yield the body as it comes; refuse one that ends before its announced length."""
    length = response.headers.get("Content-Length", "")
    found = 0
    with response:
        while True:
            try:
                chunk = response.read1(CHUNK)  # what is there, so that a kill loses little
            except (OSError, HTTPException) as error:
                text = f"{redacted(url)}: the connection broke after {found:,} bytes: {error}"
                raise TemporaryError(f"{text}; {AGAIN}") from error
            if not chunk:
                break
            found += len(chunk)
            yield chunk
    if length.isdecimal() and int(length) != found:
        text = f"{redacted(url)}: truncated: {int(length):,} bytes announced, {found:,} came"
        raise TemporaryError(f"{text}; {AGAIN}")
