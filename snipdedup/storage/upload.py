"""Results in a store: made in a folder of this machine, then uploaded whole, the manifest last.

``--out s3://bucket/set`` and ``snip push`` do the same. A URL has a folder below the temporary one
(``TMPDIR``), for the files and for a journal of what the store has. It is removed when the store
has the manifest. Until then the same command goes on. fsspec opens the store; to the Hugging Face
hub all files go in one commit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from snipdedup import progress
from snipdedup.errors import MissingError, SnipError, UsageError
from snipdedup.parallel import ordered_results
from snipdedup.storage import atomic, locks
from snipdedup.storage.out_folder import MANIFEST
from snipdedup.storage.remote import (
    RemotePath,
    filesystem,
    is_remote,
    read_version,
    store_errors,
    with_retries,
)
from snipdedup.storage.web import redacted, scheme_of

F = TypeVar("F", bound=Callable[..., Any])

FILES = "out"  # in the folder of a URL: the result
JOURNAL = "uploaded.json"  # there: begun uploads, and which files the store has
LOCK = "upload.lock"
CARD = "README.md"  # which a page of the store shows
PROBE = ".snip-probe"  # written and removed: may this place be written?
AT_ONCE = 8  # files
# Here a folder is part of a file's name. s3fs would make a bucket of the first folder.
WITHOUT_FOLDERS = ("s3", "s3a", "gs", "gcs", "abfs", "az", "memory")
HUB = re.compile(r"hf://(datasets/|models/)?([\w.-]+/[\w.-]+)(/[^@]*)?")


# ---- commands with --out URL


def local_folder(out: str | Path) -> Path:
    """Return a folder as it is; of a URL the one in which its files are made."""
    if not is_remote(out):
        return Path(out).expanduser()
    owner = os.getuid() if hasattr(os, "getuid") else 0
    name = f"snip-{atomic.short_hash([str(out).rstrip('/'), owner])}"
    return Path(tempfile.gettempdir()) / name / FILES


def uploading(run: F) -> F:
    """Let a command's function write to a URL; it writes to the `local_folder` of its OUT."""

    @functools.wraps(run)
    def run_and_upload(options: Any, **more: Any) -> Any:
        if options.out is None or not is_remote(options.out):
            return run(options, **more)
        url = str(options.out).rstrip("/")
        with place_of(url) as folder:
            fetched = begin(
                folder, url, overwrite=options.overwrite, whole=more.get("in_memory", False)
            )
            try:
                result = run(options, **more)
                upload(folder, url, overwrite=options.overwrite)
                fetched = True
            finally:
                if fetched:  # the store has all of it
                    shutil.rmtree(folder.parent, ignore_errors=True)
        return renamed(result, folder, url)

    return run_and_upload  # type: ignore[return-value]


@contextmanager
def place_of(url: str) -> Iterator[Path]:
    """Yield the local folder of a URL, for this process alone; errors name the URL instead."""
    folder, shown = local_folder(url), redacted(url)
    own = folder.parent
    with atomic.explained(own):
        own.mkdir(mode=0o700, exist_ok=True)
        if own.is_symlink() or (hasattr(os, "getuid") and own.stat().st_uid != os.getuid()):
            raise SnipError(f"{own} is another user's: set TMPDIR to a folder of your own")
        other = locks.acquire(own / LOCK)
    if other is not None:
        raise SnipError(f"{shown} is being written by another run ({other}); wait for it")
    try:
        yield folder
    except SnipError as error:
        error.args = (str(error).replace(str(folder), shown),)
        raise
    finally:
        locks.remove(own / LOCK)
        with suppress(OSError):  # removed already, or kept for the next run
            own.rmdir()


def begin(folder: Path, url: str, *, overwrite: bool, whole: bool) -> bool:
    """Refuse a URL that cannot be written; fetch the manifest of a result that is there.

    By that the run refuses other settings, as of a folder. ``whole``: its other files, too. Returns
    whether there was one.
    """
    there = read_manifest_bytes(url)
    refuse_taken(url, there)
    probe(url)
    if there is None or overwrite or (folder / MANIFEST).is_file():
        return False
    names = names_in(there, url) if whole else []
    system, root = filesystem(url)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with store_errors(f"{url}/{name}"):
            system.get_file(f"{root}/{name}", str(folder / name))
    with atomic.replacing(folder / MANIFEST) as part:
        part.write_bytes(there)
    return True


def renamed(result: Any, folder: Path, url: str) -> Any:
    """Return a command's result with the URL where it names the folder."""
    if isinstance(result, str):
        return result.replace(str(folder), redacted(url))
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, str) and str(folder) in value:
            changes[field.name] = value.replace(str(folder), redacted(url))
        elif isinstance(value, Path) and value == folder:
            changes[field.name] = RemotePath(url)
    return dataclasses.replace(result, **changes)


# ---- uploads


def upload(folder: Path, url: str, *, overwrite: bool = False, card: Path | None = None) -> bool:
    """Upload a finished result, its manifest last; False where the store has it already.

    ``card`` is a file that is not in the manifest. Another result in the place is refused, or with
    ``overwrite`` removed: its manifest before any other file. Files that are not as the manifest
    says are refused.
    """
    manifest = (folder / MANIFEST).read_bytes()
    there = read_manifest_bytes(url)
    if there == manifest:
        return False
    refuse_taken(url, there)
    if there is not None and not overwrite:
        raise SnipError(
            f"{redacted(url)} holds another finished result; choose another place, or replace it "
            "with --overwrite"
        )
    hashes = {name: json.loads(manifest)["outputs"][name]["sha256"] for name in
              names_in(manifest, url)}  # fmt: skip
    files = {name: folder / name for name in hashes}
    for name, path in files.items():
        if not path.is_file() or atomic.sha256(path) != hashes[name]:
            raise SnipError(f"{path}: not as snip wrote it; make the result again")
    if card is not None:
        files[CARD], hashes[CARD] = card, atomic.sha256(card)
    journal = read_journal(url)
    journal["stale"] = sorted({*journal["stale"], *(names_in(there, url) if there else [])})
    atomic.save_json(local_folder(url).parent / JOURNAL, journal)
    stale = [name for name in journal["stale"] if name not in hashes]
    if scheme_of(url) == "hf":
        commit_to_hub(url, {**files, MANIFEST: folder / MANIFEST}, stale)
        return True
    for name in ([MANIFEST] if there is not None else []) + stale:
        remove(f"{url}/{name}")
    upload_files(files, hashes, url, journal)
    put(folder / MANIFEST, f"{url}/{MANIFEST}")
    return True


def upload_files(
    files: dict[str, Path], hashes: dict[str, str], url: str, journal: dict[str, Any]
) -> None:
    """Upload files that the store does not have; note each in the journal of the URL."""
    done, path = journal["files"], local_folder(url).parent / JOURNAL
    size, noting = sum(file.stat().st_size for file in files.values()), threading.Lock()

    def transfer(name: str) -> int:
        place = f"{url}/{name}"
        if name not in done or done[name] != [hashes[name], *(stored(place) or [])]:
            put(files[name], place)
            entry = [hashes[name], *(stored(place) or [])]
            with noting:
                done[name] = entry
                atomic.save_json(path, journal, lasting=False)
        return files[name].stat().st_size

    with ThreadPoolExecutor(AT_ONCE) as pool, progress.bar(size, "uploading", "B") as bar:
        for transferred in ordered_results(transfer, files, pool, 2 * AT_ONCE):
            bar.update(transferred)


def put(path: Path, url: str) -> None:
    """Upload one file whole."""

    def attempt() -> None:
        with store_errors(url, doing="written"):
            system, place = filesystem(url)
            if scheme_of(url) not in WITHOUT_FOLDERS:
                system.makedirs(place.rpartition("/")[0], exist_ok=True)
            system.put_file(str(path), place)
            system.invalidate_cache()

    with_retries(attempt)
    if (found := stored(url)) is None or found[0] != path.stat().st_size:
        raise SnipError(f"{redacted(url)}: was not stored whole; run it again")


def remove(url: str) -> None:
    """Remove a file of a store, if it is there."""
    with store_errors(url, doing="removed"):
        system, place = filesystem(url)
        system.invalidate_cache()
        if system.exists(place):
            system.rm_file(place)
            system.invalidate_cache()


def stored(url: str) -> list[Any] | None:
    """Return size and version of a file of a store, None where there is none."""
    try:
        return list(with_retries(lambda: read_version(url)))
    except MissingError:
        return None


def probe(url: str) -> None:
    """Refuse a place that cannot be written, before any work."""
    if scheme_of(url) == "hf":
        parse_hub(url)
        return
    empty = local_folder(url).parent / PROBE
    empty.touch()
    try:
        put(empty, f"{url}/{PROBE}")
    except MissingError as error:
        raise SnipError(f"{redacted(url)}: no such bucket or folder; make it first") from error
    finally:
        empty.unlink()
    remove(f"{url}/{PROBE}")


def read_manifest_bytes(url: str) -> bytes | None:
    """Return the manifest at a URL, None where there is none."""

    def attempt() -> bytes:
        with store_errors(url):
            system, root = filesystem(url)
            system.invalidate_cache()
            return bytes(system.cat_file(f"{root}/{MANIFEST}"))

    try:
        return with_retries(attempt)
    except MissingError:
        return None


def names_in(manifest: bytes, url: str) -> list[str]:
    """Return the files that a manifest names; refuse those outside the folder."""
    try:
        names = list(json.loads(manifest)["outputs"])
    except (ValueError, LookupError, TypeError) as error:
        raise SnipError(f"{redacted(url)}/{MANIFEST}: not one that snip wrote") from error
    for name in names:  # anyone may have written the manifest
        if "\\" in name or {"/", ".."} & set(PurePosixPath(name).parts):
            raise SnipError(f"{redacted(url)}/{MANIFEST} names {name}, which is not in the folder")
    return names


def refuse_taken(url: str, manifest: bytes | None) -> None:
    """Refuse a place with files of someone else: no manifest, and no upload was begun."""
    if manifest is not None or (local_folder(url).parent / JOURNAL).is_file():
        return
    with store_errors(url):
        system, root = filesystem(url)
        try:
            names = [path.rstrip("/").rpartition("/")[2] for path in system.ls(root, detail=False)]
        except FileNotFoundError:
            return
    own = [name for name in names if name and name[0] != "." and name != CARD]
    if own:
        raise SnipError(
            f"{redacted(url)} has files ({own[0]}, ...) and no {MANIFEST}; choose another place, "
            "or remove them first"
        )


def read_journal(url: str) -> dict[str, Any]:
    """Return the journal of uploads to a URL, an empty one where none was begun."""
    path = local_folder(url).parent / JOURNAL
    return atomic.load_json(path) if path.is_file() else {"files": {}, "stale": []}


def parse_hub(url: str) -> tuple[str, str, str]:
    """Return kind, name and folder of a hub's URL."""
    found = HUB.fullmatch(url)
    if found is None or found[2].startswith(("datasets/", "models/", "spaces/")):
        raise UsageError(f"{url}: expected hf://datasets/OWNER/NAME or hf://OWNER/NAME of a model")
    return (found[1] or "models/").removesuffix("s/"), found[2], (found[3] or "").strip("/")


def commit_to_hub(url: str, files: dict[str, Path], stale: list[str]) -> None:
    """Upload files to the hub in one commit; a repository that is missing is made, private."""
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    except ImportError:
        text = "hf:// needs huggingface_hub: pip install 'snipdedup-toolkit[hub]'"
        raise SnipError(text) from None
    kind, repository, folder = parse_hub(url)
    above = f"{folder}/" if folder else ""
    changes = [CommitOperationAdd(above + name, str(path)) for name, path in files.items()]
    gone = [CommitOperationDelete(above + name) for name in stale]

    def attempt() -> None:
        with store_errors(url, doing="written"):
            client = HfApi()
            client.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
            message = "Add a result of snipdedup"
            client.create_commit(
                repository, [*changes, *gone], commit_message=message, repo_type=kind
            )

    with_retries(attempt)
