"""Repositories of the Hugging Face hub: what is in them, at which commit, and who may have it.

The hub's client lists, and knows the token; `web` fetches, since the client does not go on with
part of a file in a later run. A listing is of one commit, whatever is pushed meanwhile.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

from snipdedup import __version__
from snipdedup.errors import SnipError, UsageError
from snipdedup.storage.http import DISABLED, GATED, TEMPORARY, wanted_wait
from snipdedup.storage.urls import (
    Access,
    Folder,
    MissingError,
    Remote,
    TemporaryError,
    origin_of,
)

ENDPOINT = "https://huggingface.co"
SCHEME = "hf"
AGAIN = "run again later: what is complete is kept"
ADDRESS = re.compile(
    r"hf://(?:(?P<kind>datasets|models)/)?(?!(?:datasets|models|spaces)/)(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)"
    r"(?:@(?P<early>refs/(?:pr|convert)/[^/@]+|[^/@]+))?"
    r"(?P<path>(?:/[^/@]+)*)/?(?:@(?P<late>[^@]+))?"
)


@dataclass(frozen=True)
class Place:
    """What an ``hf://`` address names."""

    kind: str
    repo: str
    path: str
    revision: str | None

    def __str__(self) -> str:
        """Return the address."""
        return "/".join(filter(None, (f"hf://{self.kind}s/{self.repo}", self.path)))


def parse(address: str) -> Place:
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
    kind = (found["kind"] or "models").removesuffix("s")
    return Place(
        kind,
        f"{found['owner']}/{found['name']}",
        found["path"].strip("/"),
        found["early"] or found["late"],
    )


def own_token() -> str | None:
    """Return the token that the hub's own tools keep, None where there is none or none is wanted.

    It is read again each time and stays in memory.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    try:
        return get_token()
    except Exception as error:  # a login that ran out, say
        raise SnipError(
            f"the hub's client cannot use its token ({first_line(error)}): log in again with: hf "
            "auth login"
        ) from error


class Repository:
    """One repository at one commit.

    Parameters
    ----------
    place : Place
    commit : str, optional
        Instead of the revision that ``place`` names.
    """

    def __init__(self, place: Place, commit: str | None = None) -> None:
        try:
            import huggingface_hub
        except ImportError:
            raise SnipError(
                "hf:// needs huggingface_hub: pip install 'snipdedup-toolkit[hub]'"
            ) from None
        self.place = place
        # the client reads its environment once, at import
        self.endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")
        self.token = own_token()
        self.client = huggingface_hub.HfApi(
            endpoint=self.endpoint,
            token=self.token or False,
            library_name="snipdedup",
            library_version=__version__,
        )
        self.asked = commit or place.revision

    @property
    def page(self) -> str:
        """Where a person reads about it."""
        part = "datasets/" if self.place.kind == "dataset" else ""
        return f"{self.endpoint}/{part}{self.place.repo}"

    @property
    def access(self) -> Access | None:
        """The token, for the hub alone."""
        return Access(origin_of(self.endpoint), self.token) if self.token else None

    @cached_property
    def commit(self) -> str:
        """The commit that the asked revision is now."""
        with explained(self):
            info = self.client.repo_info(
                self.place.repo, repo_type=self.place.kind, revision=self.asked
            )
        if info.id.lower() != self.place.repo.lower():
            raise SnipError(
                f"{self.place} has moved to {info.id}: give hf://{self.place.kind}s/{info.id}"
            )
        return str(info.sha)

    def listing(self, path: str) -> tuple[dict[str, Remote], list[str]]:
        """Return the files of a folder by name, with size and checksum, and its folders' names."""
        with explained(self, path):
            entries = list(
                self.client.list_repo_tree(
                    self.place.repo, path or None, repo_type=self.place.kind, revision=self.commit
                )
            )
        files, folders = {}, []
        for entry in entries:
            name = entry.path.rpartition("/")[2]
            if hasattr(entry, "tree_id"):
                folders.append(name)
            else:
                files[name] = self.remote(entry)
        return files, folders

    def remote(self, entry: Any) -> Remote:
        """Return one file of a listing."""
        large = entry.lfs is not None
        return Remote(
            f"{self.page}/resolve/{self.commit}/{quote(entry.path)}",
            size=entry.size,
            sha256=entry.lfs.sha256 if large else None,
            git_sha1=None if large else entry.blob_id,
            access=self.access,
        )


class HubFolder(Folder):
    """A folder of a repository."""

    def __init__(self, repository: Repository, path: str) -> None:
        self.repository, self.path = repository, path
        place = repository.place
        self.shown = str(Place(place.kind, place.repo, path, None))

    def list(self) -> tuple[dict[str, Remote], list[str]]:
        """See `Folder.list`."""
        return self.repository.listing(self.path)

    def child(self, name: str) -> HubFolder:
        """See `Folder.child`."""
        return HubFolder(self.repository, f"{self.path}/{name}".lstrip("/"))

    def parent(self) -> HubFolder | None:
        """See `Folder.parent`."""
        if not self.path:
            return None
        return HubFolder(self.repository, self.path.rpartition("/")[0])


@contextmanager
def explained(repository: Repository, path: str = "") -> Iterator[None]:
    """Turn the client's errors into ours: what is the matter, and what to do."""
    try:
        yield
    except SnipError:
        raise
    except Exception as error:
        # The client hides causes: a disabled repository can look like a missing cache entry.
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        raise refusal(repository, path, chain) from error


def refusal(repository: Repository, path: str, chain: list[BaseException]) -> SnipError:
    """Return what a chain of the client's errors means."""
    from huggingface_hub import errors

    place, page = repository.place, repository.page

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(error, kinds) for error in chain)

    if any_of(errors.DisabledRepoError):
        return SnipError(f"{place}: {DISABLED}")
    if any_of(errors.GatedRepoError):  # a kind of RepositoryNotFoundError: first
        waiting = "; or your account still waits to be let in" if repository.token else ""
        return SnipError(f"{place}: {GATED.format(page=page)}{waiting}")
    if any_of(errors.RepositoryNotFoundError):
        login = "" if repository.token else ", or it is private: log in with: hf auth login"
        return MissingError(f"{place}: the hub has no such {place.kind}; check the name{login}")
    if any_of(errors.RevisionNotFoundError):
        return MissingError(
            f"{place}: has no revision {repository.asked!r}; see {page}/tree/main for those it has "
            "(a run that began with another: --overwrite begins anew)"
        )
    if any_of(errors.EntryNotFoundError):
        return MissingError(f"{place}: has no {path!r}; see {page}/tree/{repository.commit}")
    if any_of(errors.OfflineModeIsEnabled):
        return SnipError(f"{place}: HF_HUB_OFFLINE is set, so the hub may not be asked; unset it")
    if any_of(errors.HFValidationError):
        return UsageError(f"{place}: {first_line(chain[0])}")
    responses = [e.response for e in chain if isinstance(e, errors.HfHubHTTPError)]
    if responses:
        return status_refusal(place, responses[0])
    return TemporaryError(f"{place}: the hub cannot be reached: {first_line(chain[-1])}; {AGAIN}")


def status_refusal(place: Place, response: Any) -> SnipError:
    """Return what any other status of the hub means."""
    status = response.status_code
    if status not in TEMPORARY:
        return SnipError(f"{place}: the hub says {status} {response.reason_phrase}")
    wait = wanted_wait(response.headers)
    text = f"{place}: the hub says {status}; {AGAIN}"
    return TemporaryError(text + (f" (it asks to wait {wait:,.0f} s)" if wait else ""), wait)


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
