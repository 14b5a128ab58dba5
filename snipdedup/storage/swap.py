"""A new result in the place of an earlier one: wholly, or not yet.

The new files lie complete below the work, with their manifest. Then the journal says what goes and
what comes; whoever finds it ends what it says, as often as it takes. While files go and come, no
manifest stands in the folder, so that a mixture is never taken for whole.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from snipdedup.errors import SnipError

MANIFEST = "snip.json"
WORK = "work"  # what an unfinished run needs to go on; removed at the end
JOURNAL = "swap.json"  # in the work
EARLIER = "earlier.json"  # the manifest that went


def begin(out: Path, source: Path, files: Iterable[str], gone: Iterable[str], keep: bool) -> None:
    """Write the journal; from here on the new result counts.

    Parameters
    ----------
    out : Path
        The folder that gets the result.
    source : Path
        A folder directly below its work, with the files and their manifest.
    files : iterable of str
        Their paths below ``source``, and soon below ``out``, with ``/``.
    gone : iterable of str
        Files of ``out`` that go; none of them may lie elsewhere.
    keep : bool
        Leave the work.
    """
    names = sorted(files)
    said = {"from": source.name, "files": names, "gone": sorted(gone), "keep_work": keep}
    for folder in {source, *((source / name).parent for name in names)}:
        sync_folder(folder)
    journal = out / WORK / JOURNAL
    part = journal.with_name(f".{JOURNAL}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(said, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    part.replace(journal)
    sync_folder(journal.parent)


def is_begun(out: Path) -> bool:
    """Tell whether a result is on its way into a folder."""
    return (out / WORK / JOURNAL).is_file()


def finish(out: Path) -> bool:
    """Do what the journal says and was not done yet; return whether the work is to be kept.

    Only one process may be at it. The journal goes with the work, last of all: see `end`.
    """
    said = read_journal(out)
    source = out / WORK / said["from"]
    if (source / MANIFEST).is_file():  # else all is in its place
        if (out / MANIFEST).is_file():
            (out / MANIFEST).replace(source / EARLIER)
            sync_folder(out)
        for name in said["gone"]:
            remove(out, name)
        for name in said["files"]:
            if (source / name).is_file():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).replace(out / name)
        for folder in {(out / name).parent for name in said["files"]}:
            sync_folder(folder)
        (source / MANIFEST).replace(out / MANIFEST)
        sync_folder(out)
    return bool(said["keep_work"])


def end(out: Path) -> None:
    """Remove the journal of a swap that is finished."""
    (out / WORK / JOURNAL).unlink(missing_ok=True)


def read_journal(out: Path) -> dict[str, Any]:
    """Read the journal; refuse one that names what is not in the folder."""
    path = out / WORK / JOURNAL
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        names = [said["from"], *said["files"], *said["gone"]]
        plain = all(is_below(name) for name in names) and isinstance(said["keep_work"], bool)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SnipError(f"{path}: damaged ({error}); remove {out} and make it anew") from error
    if not plain:
        raise SnipError(f"{path}: damaged: it names files elsewhere; remove {out}, make it anew")
    return dict(said)


def is_below(name: Any) -> bool:
    """Tell whether a name is that of a file below a folder, as it is written."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def remove(out: Path, name: str) -> None:
    """Remove a file of an earlier result, and its folder if nothing else is in it."""
    refuse_outside(out, name, out / WORK / JOURNAL)
    (out / name).unlink(missing_ok=True)
    for folder in PurePosixPath(name).parents:
        if folder.parts:
            with contextlib.suppress(OSError):  # not empty, or missing
                (out / folder).rmdir()


def refuse_outside(out: Path, name: str, where: Path) -> None:
    """Refuse a name in a file like any other, which anyone may have written."""
    if out.resolve() not in (out / name).resolve().parents:
        raise SnipError(f"{where} names {name}, which is not in the folder")


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder: what was renamed, and what is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        with contextlib.suppress(OSError):  # a file system that cannot
            os.fsync(handle)
    finally:
        os.close(handle)
