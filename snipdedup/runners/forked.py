"""Workers forked from this process, which do tasks side by side and share nothing but files.

Threads take turns at Python's one lock. A task is thousands of short steps, and to wake the other
thread at each of them takes longer than many a step; a process has a lock of its own.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

from snipdedup.errors import SnipError
from snipdedup.parallel import set_threads

T = TypeVar("T")

PR_SET_PDEATHSIG = 1  # of Linux' prctl


def can_fork() -> bool:
    """Tell whether this system lets a process that holds threads be forked, and ends orphans."""
    return sys.platform == "linux"


def in_processes(do: Callable[[T], None], tasks: Sequence[T], workers: int) -> Iterator[T]:
    """Do tasks by forked processes; yield each that is done.

    Raises
    ------
    SnipError
        If a worker ended before its task did: killed, as a rule for want of memory.
    Exception
        What a task raised.
    """
    fork, todo = multiprocessing.get_context("fork"), iter(range(len(tasks)))
    crew: dict[Connection, Any] = {}
    busy: set[Connection] = set()

    def give(pipe: Connection) -> None:
        number = next(todo, None)
        pipe.send(number)  # None: there is no more
        (busy.discard if number is None else busy.add)(pipe)

    try:
        gc.freeze()  # or the first look for dead objects copies every page that holds some
        for _ in range(min(workers, len(tasks))):
            pipe, theirs = fork.Pipe()
            process = fork.Process(target=work, args=(theirs, do, tasks, os.getpid()))
            process.start()
            crew[pipe] = process
            theirs.close()
            give(pipe)
        while busy:
            for ready in wait(list(busy)):
                pipe = cast(Connection, ready)
                number = receive(pipe, crew[pipe])
                give(pipe)
                yield tasks[number]
    finally:
        gc.unfreeze()
        for pipe in busy:
            crew[pipe].kill()
            crew[pipe].join()
        for pipe in crew:  # those with nothing to do end on their own
            pipe.close()


def receive(pipe: Any, process: Any) -> int:
    """Return which task a worker did; raise what it raised."""
    try:
        number, error = pipe.recv()
    except (EOFError, ConnectionError):
        process.join()
        signals = {number.value: number.name for number in signal.Signals}
        how = signals.get(-process.exitcode, f"exit status {process.exitcode}")
        raise SnipError(
            f"a worker process ended early ({how}), perhaps for want of memory; what is done is "
            "kept: run it again, with a lower --max_memory or fewer --threads"
        ) from None
    if error is not None:
        raise error
    return int(number)


def work(pipe: Connection, do: Callable[[Any], None], tasks: Sequence[Any], parent: int) -> None:
    """Do tasks by their numbers, until there is no more or one fails."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends this
    set_threads(1)
    while (number := pipe.recv()) is not None:
        try:
            do(tasks[number])
        except BaseException as error:
            pipe.send((number, portable(error)))
            return
        pipe.send((number, None))


def portable(error: BaseException) -> BaseException:
    """Return an error as it can be sent, or one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def die_with_parent(parent: int) -> None:
    """End this process when its parent is killed: it holds the parent's lock on OUT open."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was killed just then
        os._exit(1)
