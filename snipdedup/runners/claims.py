"""Who works on what, where processes share nothing but a folder.

A claim is a small file that only one process can make (``O_EXCL``); it holds its owner. Each owner
has a file of its own that it touches every few seconds. A claim whose owner is gone (on another
machine: was not heard of for a minute) counts for nothing: the next one is made beside it. Claims
save work and do not protect anything: what two processes make by mistake must be the same, and
appear whole.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from contextlib import suppress
from pathlib import Path

from snipdedup.storage.atomic import explained

BEAT_S = 5.0  # an owner shows that often that it lives
STALE_S = 60.0  # who was not heard of for so long is gone


class Claims:
    """The claims of one process.

    Parameters
    ----------
    folder : Path
        Shared by all processes, made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.host = folder, host_name()
        self.owner = f"{os.getpid()}-{begun(os.getpid())}-{secrets.token_hex(4)}-{self.host}"
        self.alive = folder / f"alive-{self.owner}"
        self.ended = threading.Event()

    def __enter__(self) -> Claims:
        with explained(self.alive):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.alive.touch()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Give up all claims."""
        self.ended.set()
        self.alive.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_S):
            with suppress(OSError):  # the folder may be gone, or come back
                os.utime(self.alive)

    def take(self, name: str) -> bool:
        """Claim ``name``; False where a process that lives has it, or the folder is gone."""
        turn = 0
        while True:
            path = self.folder / f"{name}.{turn}"
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                owner = read_owner(path)
                last = not (self.folder / f"{name}.{turn + 1}").exists()
                if owner == self.owner and last:
                    return True
                if owner != self.owner and self.lives(owner, path):
                    return False
                turn += 1
                continue
            except FileNotFoundError:
                return False
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.owner)
            return True

    def give_up(self, name: str) -> None:
        """Let others claim ``name`` at once."""
        turn = 0
        while (owner := read_owner(self.folder / f"{name}.{turn}")) is not None:
            if owner == self.owner:
                (self.folder / f"{name}.{turn}").unlink(missing_ok=True)
                return
            turn += 1

    def holder(self, name: str) -> tuple[str, float] | None:
        """Return who made the last claim of a name, in words, and when, by the folder's clock."""
        found, turn = None, 0
        while True:
            path = self.folder / f"{name}.{turn}"
            owner = read_owner(path)
            if owner is None:
                return found
            with suppress(FileNotFoundError):
                found = in_words(owner), path.stat().st_mtime
            turn += 1

    def lives(self, owner: str | None, claim: Path) -> bool:
        """Tell whether the owner of a claim is at work."""
        if owner is None:  # given up just now
            return False
        beat = claim if not owner else self.folder / f"alive-{owner}"  # empty: not yet written
        try:
            with beat.open("rb") as file:  # NFS looks at its server again when a file is opened
                last = os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return False
        if owner:
            pid, since, _, host = owner.split("-", 3)
            if host == self.host and not runs(int(pid)):
                return False
            if host == self.host and since:  # suspended, perhaps, and back at any time
                return begun(int(pid)) == since
        return self.now() - last <= STALE_S

    def now(self) -> float:
        """Return the time by the folder's clock, which may be another machine's."""
        with suppress(FileNotFoundError):
            os.utime(self.alive)
            return self.alive.stat().st_mtime
        return float("inf")  # the folder is gone, and all claims with it


def read_owner(path: Path) -> str | None:
    """Return who made a claim; None where there is none, empty while it is being written."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def in_words(owner: str) -> str:
    """Return an owner for a message."""
    pid, _, _, host = owner.split("-", 3) if owner else ("?", "", "", "?")
    return f"process {pid} on {host.partition('@')[0]}"


def host_name() -> str:
    """Return what tells machines apart, and containers whose processes do not see each other."""
    try:
        space = Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
    except OSError:
        space = ""
    return f"{socket.gethostname().replace('/', '_')}@{space}"


def begun(pid: int) -> str:
    """Return when a process began, as Linux tells it: its number may be another's one day."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[19]
        )
    except (OSError, IndexError):
        return ""


def runs(pid: int) -> bool:
    """Tell whether a process of this machine runs."""
    if os.name != "posix":  # there, signal 0 is one that ends processes
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
