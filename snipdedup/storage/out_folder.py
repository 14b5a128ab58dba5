"""Who may write OUT: claims of a folder for a run, finished results, refusals to touch inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from snipdedup.errors import SnipError, UsageError
from snipdedup.storage import locks
from snipdedup.storage.atomic import fingerprint, load_json, save_json
from snipdedup.storage.locks import DOOR, LOCK, REQUEST, WORK
from snipdedup.storage.manifest import (
    MANIFEST,
    put_in_place,
    read_manifest,
    recover,
    short_json,
    write_manifest,
)

FILES = "files"  # in the work: the files of the result while they are made


def claim(
    out: Path,
    kind: str,
    request: dict[str, Any],
    *,
    overwrite: bool,
    shared: bool = False,
    decisions: Collection[str] = (),
) -> str:
    """Claim ``out`` for a run, or find that it is finished. An earlier result stays in place.

    Parameters
    ----------
    out : Path
        The folder to write; locked for this thread until its work ends (or `locks.released`).
    kind : str
        As in `write_manifest`; the finished manifest must hold ``request``.
    request : dict
        All that the result depends on, by name: settings and inputs.
    overwrite : bool
        Replace what an earlier run of the same kind wrote.
    shared : bool
        Other processes with the same request may claim it too.
    decisions : collection of str
        Entries of ``request`` on which nothing in the work depends. A stopped run goes on with
        other ones, unless other processes work on it.

    Returns
    -------
    str
        ``"new"``; ``"resume"`` where a stopped run with the same request left its work;
        ``"done"`` where a finished run did.

    Raises
    ------
    SnipError
        If ``out`` belongs to another request, is being written by another run, or holds files that
        are not snip's.
    """
    recovered, note = recover(out), out / WORK / REQUEST
    try:
        state, differing = find_state(out, kind, request, overwrite, decisions)
    except SnipError as error:
        other = locks.holder(out / WORK / LOCK, shared)
        if other is not None:  # the more useful message
            raise locks.in_use(out, other) from error
        raise
    if state == "done" and (not overwrite or (recovered and not differing)):
        return state
    with locks.door(out):
        alone = locks.lock_run(out, shared)
        free = decisions if alone else ()
        state, _ = find_state(out, kind, request, overwrite, free)  # another run may have ended
        if overwrite and state != "new":
            same = note.is_file() and not differences(load_json(note), request, decisions)
            state = "resume" if same else "new"
        if state == "new":
            locks.empty_work(out)
        if state != "done":
            save_json(note, request)
        if shared:
            locks.share(out / WORK / LOCK)
    return state


def find_state(
    out: Path, kind: str, request: dict[str, Any], overwrite: bool, free: Collection[str]
) -> tuple[str, list[str]]:
    """Return ``new``, ``resume`` or ``done``, and how the earlier request differs; see `claim`."""
    if (out / MANIFEST).is_file():
        state, earlier = "done", read_manifest(out, kind).get("request", {})
        differing = differences(earlier, request)
    elif (out / WORK / REQUEST).is_file():
        state, differing = "resume", differences(load_json(out / WORK / REQUEST), request, free)
    elif out.exists() and not is_free(out):
        raise SnipError(f"--out {out} exists and is not a folder that snip wrote; choose another")
    else:
        state, differing = "new", []
    if differing and not overwrite:
        raise SnipError(
            f"--out {out} holds a {'finished' if state == 'done' else 'stopped'} run with other "
            f"{'; '.join(differing)}. Choose another folder, or replace it with --overwrite"
        )
    return state, differing


def is_free(out: Path) -> bool:
    """Tell whether a folder is empty, but for what a claim that was stopped at once leaves."""
    if not out.is_dir() or any(path.name != WORK for path in out.iterdir()):
        return False
    work = out / WORK
    begun = (f".{REQUEST}.", LOCK, DOOR)  # any other file may be someone's own
    return not work.exists() or (
        work.is_dir() and all(path.name.startswith(begun) for path in work.iterdir())
    )


def differences(
    earlier: dict[str, Any], now: dict[str, Any], free: Collection[str] = ()
) -> list[str]:
    """Return how two requests differ but for ``free`` entries: a text each, ordered by name."""
    return [
        f"{name} ({short_json(earlier.get(name))}, now {short_json(now.get(name))})"
        for name in sorted({*earlier, *now} - set(free))
        if fingerprint(earlier.get(name)) != fingerprint(now.get(name))
    ]


def release(out: Path) -> None:
    """Give up a claim: remove the work, and the folder if nothing else is in it."""
    locks.end_work(out)
    with suppress(OSError):  # missing, or not empty
        out.rmdir()


def release_unbegun(out: Path) -> None:
    """Give up a claim whose work holds the request and no more: there is nothing to resume."""
    work = out / WORK
    if work.is_dir() and all(path.name in (REQUEST, LOCK) for path in work.iterdir()):
        release(out)


def publish(
    out: Path,
    kind: str,
    body: dict[str, Any],
    parts: Iterable[Path],
    kept: Iterable[Path] = (),
    *,
    removed: Iterable[str] = (),
    keep_work: bool = False,
) -> None:
    """Write the manifest of finished files below the work, and put all into ``out``.

    Parameters
    ----------
    out, kind, body, removed, keep_work
        As in `write_manifest` and `put_in_place`.
    parts : iterable of Path
        Files of one folder directly below the work; their paths in ``out`` are those in it.
    kept : iterable of Path
        Files of ``out`` that stay part of the result.
    """
    work, parts = out / WORK, list(parts)
    source = work / (parts[0].relative_to(work).parts[0] if parts else FILES)
    parts = [path for path in parts if path != source / MANIFEST]  # of a run stopped just here
    write_manifest(source, kind, body, parts, {p.relative_to(out).as_posix(): p for p in kept})
    put_in_place(out, source, removed=removed, keep_work=keep_work)


def refuse_output_inside(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write into an input folder, or over or beside an input file.

    Raises
    ------
    SnipError
        If ``out`` is an input, lies in an input folder, or is the folder of an input file. A new
        folder beside an input file is no harm.
    """
    target = out.resolve()
    for path in inputs:
        if target == path.resolve() and not path.is_dir():
            raise SnipError(f"{out} is an input; snip never writes there, choose another place")
        folder = (path if path.is_dir() else path.parent).resolve()
        if target == folder or (path.is_dir() and folder in target.parents):
            raise SnipError(
                f"--out {out} lies in the input folder {folder}; snip never writes there, "
                "choose another folder"
            )


def refuse_output_file(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse to write a file over one that snip wrote or reads; see `refuse_output_inside`.

    Raises
    ------
    SnipError
        If ``path`` is an input, lies in an input folder, or is a file that a folder of snip needs:
        its manifest, a file named there, the work of a stopped run.
    UsageError
        If it is a folder, or something else that is no file: it would be replaced by one.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file to write")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a device or a pipe; name a file to write")
    refuse_output_inside(path, inputs)
    place = path.parent.resolve() / path.name  # a link in its place is replaced, not followed
    for target in {place, path.resolve()}:
        for folder in target.parents:
            if is_own(folder, target):
                raise SnipError(
                    f"{path} is a file of {folder}, which would not be whole without it; choose "
                    "another name"
                )


def is_own(folder: Path, path: Path) -> bool:
    """Tell whether a file below a folder is one that snip wrote there, or is writing."""
    name = path.relative_to(folder)
    if name.parts[0] == WORK:
        return (folder / WORK / LOCK).is_file() or (folder / WORK / REQUEST).is_file()
    if str(name) == MANIFEST:
        return True  # by this name alone snip knows its folders
    try:
        manifest = load_json(folder / MANIFEST)
    except SnipError:  # none, or a file of someone else
        return False
    outputs = manifest.get("outputs") if isinstance(manifest, dict) else None
    return isinstance(outputs, dict) and name.as_posix() in outputs
