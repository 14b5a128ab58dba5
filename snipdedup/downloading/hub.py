"""Repositories of the Hugging Face hub: their files at one commit, and why one cannot be fetched.

The hub's client lists, and knows the token; `transfer` fetches, since the client does not continue
part of a file in a later run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from snipdedup import __version__
from snipdedup.downloading.transfer import SourceFile
from snipdedup.errors import MissingError, SnipError, TemporaryError, UsageError
from snipdedup.storage.http import (
    AGAIN,
    DISABLED,
    GATED,
    TEMPORARY,
    Token,
    origin_of,
    temporary_error,
)

SCHEME = "hf"
ADDRESS = re.compile(
    r"hf://(?:(?P<kind>datasets|models)/)?(?!(?:datasets|models|spaces)/)(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)"
    r"(?:@(?P<early>refs/(?:pr|convert)/[^/@]+|[^/@]+))?"
    r"(?P<path>(?:/[^/@]+)*)/?(?:@(?P<late>[^@]+))?"
)


@dataclass(frozen=True)
class HubAddress:
    """What an ``hf://`` URL names."""

    kind: str  # dataset, model
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
        part = "datasets/" if self.kind == "dataset" else ""
        return f"{endpoint()}/{part}{self.repo}"


def parse(address: str) -> HubAddress:
    """Parse ``hf://datasets/OWNER/NAME[/folder][@revision]``; without ``datasets/`` a model.

    Raises
    ------
    UsageError
        If it is something else.
    """
    found = ADDRESS.fullmatch(address)
    if not found or (found["early"] and found["late"]):
        raise UsageError(
            f"{address}: expected hf://datasets/OWNER/NAME[/folder][@revision], or "
            "hf://OWNER/NAME of a model"
        )
    return HubAddress(
        (found["kind"] or "models").removesuffix("s"),
        f"{found['owner']}/{found['name']}",
        found["path"].strip("/"),
        found["early"] or found["late"],
    )


def endpoint() -> str:
    """Return the hub's address; the client reads this variable only once, at its import."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def own_token() -> str | None:
    """Return the token that the hub's own tools keep, None if there is none or none is wanted."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    try:
        return get_token()
    except Exception as error:  # for example a login that has expired
        raise SnipError(
            f"the hub's client cannot use its token ({first_line(error)}): log in again with: hf "
            "auth login"
        ) from error


def client() -> Any:
    """Return the hub's client."""
    try:
        import huggingface_hub
    except ImportError:
        raise SnipError(
            "hf:// needs huggingface_hub: pip install 'snipdedup-toolkit[hub]'"
        ) from None
    return huggingface_hub.HfApi(
        endpoint=endpoint(),
        token=own_token() or False,
        library_name="snipdedup",
        library_version=__version__,
    )


def pin(address: str, commit: str | None = None) -> str:
    """Return an address with the commit that its revision is now, or with a given one."""
    place = parse(address)
    if commit is not None:
        return str(replace(place, revision=commit))
    with client_errors(place):
        info = client().repo_info(place.repo, repo_type=place.kind, revision=place.revision)
    if info.id.lower() != place.repo.lower():
        raise SnipError(f"{address}: has moved to {info.id}: give hf://{place.kind}s/{info.id}")
    return str(replace(place, revision=str(info.sha)))


def list_folder(address: str) -> tuple[dict[str, SourceFile], list[str]]:
    """Return the files of a folder by name, and the names of its folders, at a pinned commit."""
    place, files, folders = parse(address), {}, []
    with client_errors(place):
        entries = list(
            client().list_repo_tree(
                place.repo, place.path or None, repo_type=place.kind, revision=place.revision
            )
        )
    text = own_token()
    token = Token(origin_of(endpoint()), text) if text else None
    for entry in entries:
        name = entry.path.rpartition("/")[2]
        if hasattr(entry, "tree_id"):
            folders.append(name)
            continue
        sha256 = entry.lfs.sha256 if entry.lfs is not None else None
        files[name] = SourceFile(
            f"{place.page}/resolve/{place.revision}/{quote(entry.path)}",
            size=entry.size,
            sha256=sha256,
            git_sha1=None if sha256 else entry.blob_id,
            token=token,
        )
    return files, folders


@contextmanager
def client_errors(place: HubAddress) -> Iterator[None]:
    """Turn the client's errors into ours, which say what to do."""
    try:
        yield
    except SnipError:
        raise
    except Exception as error:
        # The client hides causes: a disabled repository can look like a missing cache entry.
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        raise hub_error(place, chain) from error


def hub_error(place: HubAddress, chain: list[BaseException]) -> SnipError:
    """Return what an error of the client, with its causes, means."""
    from huggingface_hub import errors

    login = "" if own_token() else ", or it is private: log in with: hf auth login"
    tree = f"{place.page}/tree/{place.revision or 'main'}"
    meanings: list[tuple[type[Exception], type[SnipError], str]] = [
        (errors.DisabledRepoError, SnipError, DISABLED),
        # a kind of RepositoryNotFoundError, so it comes first
        (errors.GatedRepoError, SnipError, GATED.format(page=place.page)),
        (
            errors.RepositoryNotFoundError,
            MissingError,
            f"the hub has no such {place.kind}; check the name{login}",
        ),
        (
            errors.RevisionNotFoundError,
            MissingError,
            f"has no revision {place.revision!r}; see {place.page}/tree/main for those it has (to "
            "restart a run that began with another: --overwrite)",
        ),
        (errors.EntryNotFoundError, MissingError, f"has no {place.path!r}; see {tree}"),
        (errors.OfflineModeIsEnabled, SnipError, "HF_HUB_OFFLINE is set; unset it"),
        (errors.HFValidationError, UsageError, first_line(chain[0])),
    ]
    for kind, ours, text in meanings:
        if any(isinstance(error, kind) for error in chain):
            return ours(f"{place}: {text}")
    responses = [error.response for error in chain if isinstance(error, errors.HfHubHTTPError)]
    if not responses:
        return TemporaryError(
            f"{place}: the hub cannot be reached: {first_line(chain[-1])}; {AGAIN}"
        )
    status = responses[0].status_code
    if status in TEMPORARY:
        return temporary_error(f"{place}: the hub says {status}; {AGAIN}", responses[0].headers)
    return SnipError(f"{place}: the hub says {status} {responses[0].reason_phrase}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
