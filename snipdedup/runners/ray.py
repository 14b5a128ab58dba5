"""Workers of a Ray cluster do the tasks of a join; they are sent paths and numbers, never rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from snipdedup.errors import SnipError
from snipdedup.parallel import library_threads

T = TypeVar("T")

STORE_BYTES = 100 << 20
RETRIES = 3  # of a task whose worker died, or could not read or write
_functions: dict[str, Any] = {}  # in a worker: what `perform` calls, with all that it has read


class Ray:
    """Workers of a cluster (``RAY_ADDRESS``, an open connection); else ``threads`` of a new Ray."""

    world_size = 1

    def __init__(self, threads: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise SnipError(
                "--runner ray needs Ray; install it with: pip install 'snipdedup-toolkit[ray]'"
            ) from None
        self.ray, self.started = ray, not ray.is_initialized()
        if self.started:
            connect(ray, threads)
        machines = [node["Resources"].get("CPU", 0) for node in self.ray.nodes() if node["Alive"]]
        self.here, self.workers = int(max(machines)), int(sum(machines))

    def each(
        self, do: Callable[[T], None], tasks: Sequence[T], done_file: Callable[[T], Path],
        within: int = 1, *, last: bool = False,
    ) -> Iterator[T]:  # fmt: skip
        """See `Runner.each`; twice as many tasks as workers are submitted at a time.

        Workers end after tasks that take all threads, and after the last: they hold memory.
        """
        function, todo = [self.ray.put((Path.cwd(), do))], iter(tasks)
        submitted: dict[Any, T] = {}
        remote = self.ray.remote(
            num_cpus=within, max_calls=int(within > 1),
            max_retries=RETRIES, retry_exceptions=[OSError],
        )(perform)  # fmt: skip
        while True:
            for task in islice(todo, 2 * self.workers - len(submitted)):
                submitted[remote.remote(function, function[0].hex(), task)] = task
            if not submitted:
                break
            ready, _ = self.ray.wait(list(submitted), num_returns=1)
            task = submitted.pop(ready[0])
            self.raise_failure(ready[0])
            if not done_file(task).is_file():
                raise SnipError(
                    f"{done_file(task)}: a Ray worker wrote it, but it is not seen here; --out "
                    "must lie on a file system that all nodes share, under the same path"
                )
            yield task
        if last:
            self.close()

    def raise_failure(self, result: Any) -> None:
        """Raise what a task raised."""
        errors = self.ray.exceptions
        try:
            self.ray.get(result)
        except errors.RayTaskError as error:
            if isinstance(error.cause, SnipError | OSError | MemoryError):
                raise error.cause from error
            raise
        except errors.RayError as error:
            raise SnipError(
                f"a Ray worker failed {RETRIES + 1} times at the same task "
                f"({first_line(error)}); what is done is kept: remove the cause and run it again"
            ) from error

    def close(self) -> None:
        """End the connection, or the Ray that was started here."""
        if self.started:
            self.ray.shutdown()
            self.started = False


def perform(function: list[Any], name: str, task: Any) -> None:
    """Do a task in a Ray worker, which keeps what it read of the files that all tasks need."""
    import ray

    if name not in _functions:
        _functions.clear()
        cwd, _functions[name] = ray.get(function[0])
        os.chdir(cwd)  # paths may be relative
    with library_threads(1, torch_too=False):
        _functions[name](task)


def connect(ray: Any, threads: int) -> None:
    """Connect to the cluster that ``RAY_ADDRESS`` names, or start Ray on this machine."""
    address = os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if not address:
        settings.update(num_cpus=threads, include_dashboard=False, object_store_memory=STORE_BYTES)
    try:
        ray.init(address=address or "local", **settings)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if not address:
            raise
        raise SnipError(
            f"RAY_ADDRESS={address}: cannot connect to a Ray cluster there: {first_line(error)}; "
            "if it refuses the token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            "RAY_AUTH_TOKEN_PATH) as on the cluster"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, which Ray's often have many of."""
    return str(error).strip().splitlines()[0]
