"""Workers of a Ray cluster do the tasks of a join; what they are sent is small, and never rows."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from snipdedup.errors import SnipError
from snipdedup.parallel import library_threads

T = TypeVar("T")

STORE_BYTES = 100 << 20
RETRIES = 3  # of a task whose worker died, or could not read or write


class Ray:
    """Workers of a Ray cluster, or of a Ray that is started on this machine.

    Parameters
    ----------
    threads : int
        Workers to start here; a cluster (``RAY_ADDRESS``, or an open connection) has its own.
    """

    def __init__(self, threads: int) -> None:
        self.ray, self.cwd = import_ray(), Path.cwd()
        self.started = not self.ray.is_initialized()
        if self.started:
            connect(self.ray, threads)
        machines = [node["Resources"].get("CPU", 0) for node in self.ray.nodes() if node["Alive"]]
        self.here, self.workers = int(max(machines)), int(sum(machines))

    def once(self, do: Callable[[], None], mark: Path) -> None:
        """See `Runner.once`; by a worker that ends then: what it held is free for the others."""
        for _ in self.send(lambda _: do(), [mark], lambda path: path, self.here, max_calls=1):
            pass

    def each(
        self,
        do: Callable[[T], None],
        tasks: Sequence[T],
        mark: Callable[[T], Path],
        within: int = 1,
    ) -> Iterator[T]:
        """See `Runner.each`."""
        return self.send(do, tasks, mark, within)

    def send(
        self,
        do: Callable[[T], None],
        tasks: Sequence[T],
        mark: Callable[[T], Path],
        cpus: int,
        max_calls: int = 0,
    ) -> Iterator[T]:
        """Let workers do tasks; twice as many as there are workers are under way."""
        held, todo = [self.ray.put((self.cwd, do))], iter(tasks)
        under_way: dict[Any, T] = {}
        remote = self.ray.remote(
            num_cpus=cpus, max_calls=max_calls, max_retries=RETRIES, retry_exceptions=[OSError]
        )(perform)
        while True:
            for task in islice(todo, 2 * self.workers - len(under_way)):
                under_way[remote.remote(held, held[0].hex(), task)] = task
            if not under_way:
                return
            ready, _ = self.ray.wait(list(under_way), num_returns=1)
            task = under_way.pop(ready[0])
            self.take(ready[0])
            if not mark(task).is_file():
                raise SnipError(
                    f"{mark(task)}: a Ray worker wrote it, but it is not seen here; --out must lie "
                    "on a file system that all nodes share, under the same path"
                )
            yield task

    def take(self, result: Any) -> None:
        """Wait for a task; raise what it raised."""
        errors = self.ray.exceptions
        try:
            self.ray.get(result)
        except errors.RayTaskError as error:
            if isinstance(error.cause, SnipError | OSError | MemoryError):
                raise error.cause from error
            raise
        except errors.RayError as error:
            what = str(error).strip().splitlines()[0]
            raise SnipError(
                f"a Ray worker failed {RETRIES + 1} times at the same task ({what}); what is done "
                "is kept: mend the cause and run it again"
            ) from error

    def finish(self) -> None:
        """See `Runner.finish`; workers would only hold memory."""
        if self.started:
            self.ray.shutdown()
            self.started = False


_held: dict[str, Any] = {}


def perform(held: list[Any], name: str, task: Any) -> None:
    """Do a task in a Ray worker, which keeps what it read of the files that all tasks need."""
    import ray

    if name not in _held:
        _held.clear()
        cwd, _held[name] = ray.get(held[0])
        os.chdir(cwd)  # paths may be relative
    with library_threads(1):
        _held[name](task)


def import_ray() -> Any:
    """Return the library.

    Raises
    ------
    SnipError
        If it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise SnipError(
            "--runner ray needs Ray; install it with: pip install 'snipdedup-toolkit[ray]'"
        ) from None
    return ray


def connect(ray: Any, threads: int) -> None:
    """Connect to the cluster that ``RAY_ADDRESS`` names, or start Ray on this machine."""
    address = os.environ.get("RAY_ADDRESS")
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if address:
        with tempfile.TemporaryFile() as said:
            try:
                with stderr_to(said):
                    ray.init(address=address, **quiet)
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                said.seek(0)
                raise refused(address, error, said.read().decode(errors="replace")) from error
        return
    ray.init(
        address="local",
        num_cpus=threads,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        **quiet,
    )


@contextmanager
def stderr_to(file: IO[bytes]) -> Iterator[None]:
    """Send to ``file`` what the process writes to stderr, what Ray's C++ writes included."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


def refused(address: str, error: Exception, said: str) -> SnipError:
    """Return why there is no connection; of a wrong token only stderr tells, for a client of Ray.

    Parameters
    ----------
    said : str
        What was written to stderr meanwhile.
    """
    if type(error).__name__ == "AuthenticationError" or "Unauthenticated" in said:
        return SnipError(
            f"RAY_ADDRESS={address}: the Ray cluster refuses the token that it is given; set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) as on the cluster"
        )
    what = str(error).strip().splitlines()[0]
    return SnipError(f"RAY_ADDRESS={address}: no Ray cluster answers there: {what}")
