"""Files on a web server: every status, length and range is checked before it is believed.

Nothing but the standard library. What a URL may hide (a password, a signed query) is kept out of
messages and manifests; a token goes to its own origin only, wherever a redirect may lead.
"""

from __future__ import annotations

import io
import re
import socket
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import HTTPRedirectHandler, Request, build_opener

from snipdedup import __version__
from snipdedup.errors import SnipError
from snipdedup.storage.urls import (
    CHUNK,
    Access,
    MissingError,
    RangeError,
    Remote,
    Stream,
    TemporaryError,
    is_web,
    origin_of,
    redacted,
)

TIMEOUT_S = 30
ASCII = "%:/?#[]@!$&'()*+,;=~"  # what a URL may hold as it is (RFC 3986, 2.2), and what is quoted
TAIL = 1 << 16  # most footers fit, so that one request counts a file's rows
PARQUET_END = 8  # four bytes of footer length and the magic number
MAGIC = b"PAR1"
AGAIN = "run again later: what is complete is kept"
GATED = (
    "it is gated: open {page} in a browser, accept its terms, log in with: hf auth login, and run "
    "again; or fetch it with the host's own tool, then give the local folder"
)
PRIVATE = (
    "it is gated or private: fetch it with the host's own tool, then give the local folder; a "
    "hub's token is used with hf:// sources only"
)
DISABLED = "it was disabled by its owner or the host and cannot be fetched; choose another source"
NOT_THERE = "check the URL and the file numbers"
MOVED = "it has moved, but not to a place that can be followed: give the URL where it is now"
ADVICE = {
    401: PRIVATE,
    403: PRIVATE,
    404: NOT_THERE,
    410: NOT_THERE,
    429: f"the server asks for fewer requests: {AGAIN}",
    451: "the host may not hand it out where you are",
}
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)


class Redirects(HTTPRedirectHandler):
    """Follows redirects between web servers; a token stays behind, and https stays https."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """See `HTTPRedirectHandler.redirect_request`."""
        if not is_web(newurl) or (is_web(req.full_url) and _less_safe(req.full_url, newurl)):
            raise HTTPError(req.full_url, code, f"redirects to {redacted(newurl)}", headers, fp)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and origin_of(newurl) != origin_of(req.full_url):
            request.remove_header("Authorization")
        return request


def _less_safe(url: str, newurl: str) -> bool:
    return url.lower().startswith("https:") and not newurl.lower().startswith("https:")


OPENER = build_opener(Redirects)


def get(
    url: str,
    span: str | None = None,
    *,
    validator: str | None = None,
    access: Access | None = None,
) -> HTTPResponse:
    """Ask for a URL, or for the bytes ``span`` of it (RFC 9110, 14.2); redirects are followed.

    Parameters
    ----------
    url : str
    span : str, optional
        ``"100-"``, ``"-8"``.
    validator : str, optional
        A strong ETag: if the file is another one by now, all of it is wanted (RFC 9110, 13.1.5).
    access : Access, optional
        A token for one origin.

    Raises
    ------
    TemporaryError
        If it is worth another try: broken connections, 429, 5xx.
    MissingError, SnipError
        If the server says anything but 200 or 206.
    """
    url = quote(url, safe=ASCII)
    headers = {"User-Agent": f"snipdedup/{__version__}", "Accept-Encoding": "identity"}
    if span:
        headers["Range"] = f"bytes={span}"
        headers |= {"If-Range": validator} if validator else {}
    if access is not None and origin_of(url) == access.origin:
        headers["Authorization"] = f"Bearer {access.token}"
    try:
        response: HTTPResponse = OPENER.open(Request(url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        error.close()
        raise refusal(url, error) from error
    except (OSError, HTTPException, ValueError) as error:
        raise unreachable(url, error) from error
    if response.status not in (200, 206) or (response.status == 206 and not span):
        response.close()
        raise SnipError(f"{redacted(url)}: expected status 200, found {response.status}")
    return response


def unreachable(url: str, error: Exception) -> SnipError:
    """Return what to say of a server that gives no answer."""
    reason = error.reason if isinstance(error, URLError) else error
    text = f"{redacted(url)}: the server cannot be reached: {reason}"
    if isinstance(reason, ValueError) or getattr(reason, "errno", None) == socket.EAI_NONAME:
        return SnipError(f"{text}; check the URL")
    return TemporaryError(f"{text}; {AGAIN}")


def refusal(url: str, error: HTTPError) -> SnipError:
    """Return what a status of 300 and above means, and what to do."""
    headers = error.headers
    text = f"{redacted(url)}: {error.code} {error.reason}"
    if 300 <= error.code < 400:
        return SnipError(f"{text.splitlines()[0]}; {MOVED}")
    if headers.get("X-Error-Code") == "GatedRepo":
        return SnipError(f"{text}; {GATED.format(page=redacted(url).partition('/resolve/')[0])}")
    if "disabled" in headers.get("X-Error-Message", ""):
        return SnipError(f"{text}; {DISABLED}")
    if error.code == 416:
        return RangeError(f"{text}; the server cannot send that part of it")
    advice = ADVICE.get(error.code, "")
    if error.code >= 500:
        advice = f"the server has a fault: {AGAIN}"
    text += f"; {advice}" if advice else ""
    if error.code in TEMPORARY:
        wait = wanted_wait(headers)
        text += f" (it asks to wait {wait:,.0f} s)" if wait else ""
        return TemporaryError(text, wait)
    return MissingError(text) if error.code in (404, 410) else SnipError(text)


def wanted_wait(headers: Any) -> float | None:
    """Return the seconds that a server asks to wait: Retry-After, or the hub's RateLimit."""
    text = str(headers.get("Retry-After") or "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:  # no date
        limit = re.search(r"\br=0\b.*\bt=(\d+)", str(headers.get("RateLimit") or ""))
        return float(limit[1]) if limit else None


def open_at(remote: Remote, begin: int = 0, validator: str | None = None) -> Stream:
    """Ask for a file from byte ``begin`` on.

    A server that sends no parts, or whose file has another ETag by now, sends all of it: then the
    stream begins at 0.
    """
    span = f"{begin}-" if begin else None
    response = get(remote.url, span, validator=validator, access=remote.access)
    length, total = response.headers.get("Content-Length", ""), None
    if response.status == 206:
        first, last, total = content_range(response, remote.url)
        if first != begin or last != total - 1:
            response.close()
            raise RangeError(f"{remote.shown}: bytes {begin}- were asked, {first}-{last} came")
    else:
        begin, total = 0, int(length) if length.isdecimal() else None
    etag = response.headers.get("ETag")
    strong = etag if etag and etag.startswith('"') else None  # RFC 9110, 8.8.3: W/ says "like it"
    return Stream(begin, total, strong, chunks(response, remote.url))


def content_range(response: HTTPResponse, url: str) -> tuple[int, int, int]:
    """Return first byte, last byte and length of the whole, as a 206 tells them."""
    told = response.headers.get("Content-Range", "")
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", told)
    if not span:
        response.close()
        raise RangeError(f"{redacted(url)}: expected a Content-Range, found {told!r}")
    return int(span[1]), int(span[2]), int(span[3])


def chunks(response: HTTPResponse, url: str) -> Iterator[bytes]:
    """Yield the body; refuse one that ends before its announced length."""
    told = response.headers.get("Content-Length", "")
    found = 0
    with response:
        while True:
            try:
                chunk = response.read1(CHUNK)  # what is there: a kill loses no more
            except (OSError, HTTPException) as error:
                raise TemporaryError(
                    f"{redacted(url)}: the connection broke after {found:,} bytes: {error}; {AGAIN}"
                ) from error
            if not chunk:
                break
            found += len(chunk)
            yield chunk
    if told.isdecimal() and int(told) != found:
        raise TemporaryError(
            f"{redacted(url)}: truncated: {int(told):,} bytes were announced, {found:,} came; "
            f"{AGAIN}"
        )


def parquet_rows(remote: Remote) -> int | None:
    """Count the rows of a parquet file from its footer, fetched by range.

    Returns
    -------
    int or None
        None where the server does not send ranges: then the whole file is needed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tail = read_tail(remote, TAIL)
    if tail is None:
        return None
    need = footer_size(tail, remote.url)
    if need > len(tail):
        tail = read_tail(remote, need)
        if tail is None or len(tail) < need:
            raise SnipError(f"{remote.shown}: truncated: its footer is longer than the file")
    try:
        # What stands before the footer is not looked at, but a file begins with the magic number.
        metadata = pq.read_metadata(io.BytesIO(MAGIC + tail[-need:]))
    except (pa.ArrowException, OSError) as error:
        raise SnipError(f"{remote.shown}: damaged parquet footer: {error}") from error
    return int(metadata.num_rows)


def read_tail(remote: Remote, size: int) -> bytes | None:
    """Return the last ``size`` bytes, all where there are fewer; None without ranges."""
    # Some stores know no "last n bytes": where the length is known, say from where.
    begin = None if remote.size is None else max(remote.size - size, 0)
    response = get(remote.url, f"-{size}" if begin is None else f"{begin}-", access=remote.access)
    if response.status != 206:
        response.close()
        return None
    first, last, total = content_range(response, remote.url)
    body = b"".join(chunks(response, remote.url))
    if last != total - 1 or len(body) != last - first + 1 or len(body) != min(size, total):
        return None  # not the part that was asked for
    return body


def footer_size(tail: bytes, url: str) -> int:
    """Return how many bytes at the end of a parquet file its footer takes."""
    if len(tail) < PARQUET_END + len(MAGIC) or tail[-4:] != MAGIC:
        raise SnipError(f"{redacted(url)}: truncated or not a parquet file")
    return int.from_bytes(tail[-PARQUET_END:-4], "little") + PARQUET_END
