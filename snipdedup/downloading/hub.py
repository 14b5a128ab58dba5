"""Repositories of the Hugging Face hub: their files at one commit, and why one cannot be fetched.

The hub's client lists, and knows the token; `transfer` fetches, since the client does not continue
part of a file in a later run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import quote

from snipdedup import __version__
from snipdedup.downloading.transfer import SourceFile
from snipdedup.errors import MissingError, SnipError, TemporaryError, UsageError
from snipdedup.storage.remote import with_retries
from snipdedup.storage.web import AGAIN, Token, origin_of, status_error

T = TypeVar("T")

SCHEME = "hf"
ADDRESS = re.compile(
    r"hf://(?:(?P<kind>datasets|models)/)?(?!(?:datasets|models|spaces)/)(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)"
    r"(?:@(?P<early>refs/(?:pr|convert)/[^/@]+|[^/@]+))?"
    r"(?P<path>(?:/[^/@]+)*)/?(?:@(?P<late>[^@]+))?"
)


@dataclass(frozen=True)
class HubAddress:
    """What an ``hf://`` URL names; the kind is ``dataset`` or ``model``."""

    kind: str
    repo: str
    path: str
    revision: str | None

    def __str__(self) -> str:
        """Return the URL."""
        at = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.kind}s/{self.repo}{at}/{self.path}".rstrip("/")

    @property
    def page(self) -> str:
        """The page of the repository."""
        return f"{endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"


def parse_address(address: str) -> HubAddress:
    """Parse ``hf://datasets/OWNER/NAME[/folder][@revision]``; without ``datasets/`` a model."""
    found = ADDRESS.fullmatch(address)
    if not found or (found["early"] and found["late"]):
        expected = "hf://datasets/OWNER/NAME[/folder][@revision], or hf://OWNER/NAME of a model"
        raise UsageError(f"{address}: expected {expected}")
    return HubAddress(
        (found["kind"] or "models").removesuffix("s"),
        f"{found['owner']}/{found['name']}",
        found["path"].strip("/"),
        found["early"] or found["late"],
    )


def endpoint() -> str:
    """Return the hub's address; the client reads this variable only once, at its import."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def ask_hub(place: HubAddress, work: Callable[[Any], T]) -> T:
    """Return what ``work`` gets from the hub's client, tried again after temporary faults."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        text = "hf:// needs huggingface_hub: pip install 'snipdedup-toolkit[hub]'"
        raise SnipError(text) from None

    def attempt() -> T:
        try:
            return work(HfApi(endpoint(), library_name="snipdedup", library_version=__version__))
        except Exception as error:
            raise hub_error(place, error) from error

    return with_retries(attempt)


def pin(address: str, commit: str | None = None) -> str:
    """Return an address with the commit that its revision is now, or with a given one."""
    place = parse_address(address)
    if commit is not None:
        return str(replace(place, revision=commit))
    info = ask_hub(
        place,
        lambda client: client.repo_info(place.repo, repo_type=place.kind, revision=place.revision),
    )
    if info.id.lower() != place.repo.lower():
        raise SnipError(f"{address}: has moved to {info.id}: give hf://{place.kind}s/{info.id}")
    return str(replace(place, revision=str(info.sha)))


def list_repository(address: str) -> tuple[dict[str, SourceFile], list[str]]:
    """Return the files of a folder by name, and the names of its folders, at a pinned commit."""
    from huggingface_hub.utils import build_hf_headers

    place, files, folders = parse_address(address), {}, []
    entries = ask_hub(
        place,
        lambda client: list(
            client.list_repo_tree(
                place.repo, place.path or None, repo_type=place.kind, revision=place.revision
            )
        ),
    )
    bearer = build_hf_headers().get("authorization")  # None without a login
    token = Token(origin_of(endpoint()), bearer.removeprefix("Bearer ")) if bearer else None
    for entry in entries:
        name = entry.path.rpartition("/")[2]
        if hasattr(entry, "tree_id"):
            folders.append(name)
            continue
        files[name] = SourceFile(
            f"{place.page}/resolve/{place.revision}/{quote(entry.path)}",
            size=entry.size,
            sha256=entry.lfs.sha256 if entry.lfs else None,
            git_sha1=None if entry.lfs else entry.blob_id,
            token=token,
        )
    return files, folders


def hub_error(place: HubAddress, error: Exception) -> SnipError:
    """Return what an error of the client means, and what to do."""
    # The client hides causes: a disabled repository can look like a missing cache entry.
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    responses = [getattr(error, "response", None) for error in chain]
    response = next((response for response in responses if response is not None), None)
    if response is None:
        first_line = str(chain[-1]).strip().partition("\n")[0] or type(chain[-1]).__name__
        if type(error).__name__ == "OfflineModeIsEnabled":
            return SnipError(f"{place}: HF_HUB_OFFLINE is set; unset it")
        if type(error).__name__ == "HFValidationError":
            return UsageError(f"{place}: {first_line}")
        return TemporaryError(f"{place}: the hub cannot be reached: {first_line}; {AGAIN}")
    code, tree = response.headers.get("X-Error-Code"), f"{place.page}/tree/main"
    private = "it is private: log in with: hf auth login"
    missing = {
        "RepoNotFound": f"the hub has no such {place.kind}; check the name, or {private}",
        "RevisionNotFound": f"has no revision {place.revision!r}; see {tree} for those it has (to "
        "restart a run that began with another: --overwrite)",
        "EntryNotFound": f"has no {place.path!r}; see {tree}",
    }
    denied = "Invalid credentials" in response.headers.get("X-Error-Message", "")
    if response.status_code == 401 and code is None and not denied:
        code = "RepoNotFound"
    if code in missing:
        return MissingError(f"{place}: {missing[code]}")
    status, reason = response.status_code, response.reason_phrase
    return status_error(f"{place}: the hub says", place.page, status, reason, response.headers)
