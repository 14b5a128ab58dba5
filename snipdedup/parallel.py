"""Cores and devices: how many threads, which device, and how blocks run side by side.

Each block is computed by one thread, so its bits do not depend on how many run beside it.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import numpy as np

from snipdedup.commands import parse_bytes
from snipdedup.errors import SnipError

ALIGNED_ROWS = 1024  # rows computed together, aligned to global rows

T = TypeVar("T")
R = TypeVar("R")
Stage = Callable[[str], AbstractContextManager[None]]  # times a stage of a run by its name

_held = threading.local()


def cores(threads: int = 0) -> int:
    """Return how many threads to use; 0 means all that this process may run on."""
    if threads:
        return threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bound(text: str | None, need: int = 0) -> int:
    """Return a bound on memory in bytes; one below ``need`` is refused.

    Without a text, it is a quarter of the machine's memory, or ``need`` if that is more.
    """
    if text is None:
        return max(machine_memory() // 4, need)
    bound = parse_bytes(text)
    if bound < need:
        raise SnipError(
            f"--max_memory {text}: this run needs {need / 1e9:.2f} GB besides its libraries; "
            "give as much, fewer --threads or fewer rows"
        )
    return bound


def machine_memory() -> int:
    """Return the bytes of RAM of this machine; 8 GB where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows says it through other libraries only
        return 8 << 30


def pick_device(name: str) -> str:
    """Turn ``auto`` into ``cuda`` where there is one, else ``cpu``; refuse ``cuda`` without one."""
    if name == "cpu" or (name == "auto" and not has_cuda_driver()):
        return "cpu"
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise SnipError("--device cuda: torch sees no CUDA device; use --device cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def has_cuda_driver() -> bool:
    """Tell whether CUDA's driver is installed; torch, which takes a second to load, is not."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


@contextmanager
def library_threads(count: int, *, torch_too: bool = True) -> Iterator[None]:
    """Let torch and faiss use ``count`` threads inside the block, as before after it.

    Float sums depend on that number, so torch is loaded first, unless ``torch_too`` is false: then
    it is told only if something has imported it, as faiss is.
    """
    if torch_too:
        import torch
    torch, faiss = loaded("torch", "get_num_threads"), loaded("faiss", "omp_get_max_threads")
    given = given_threads()
    before = torch.get_num_threads() if torch else 0, faiss.omp_get_max_threads() if faiss else 0
    set_threads(count)
    try:
        yield
    finally:
        _held.__dict__["threads"] = given
        if torch:
            torch.set_num_threads(before[0])
        if faiss:
            faiss.omp_set_num_threads(before[1])


def loaded(name: str, function: str) -> Any:
    """Return a module if it is imported as far as a function; another thread may be at it."""
    module = sys.modules.get(name)
    return module if hasattr(module, function) else None


def given_threads() -> int:
    """Return how many threads this thread was given, by `library_threads`; else one a core."""
    return int(_held.__dict__.get("threads", 0)) or cores()


def set_threads(count: int) -> None:
    """Let torch and faiss, where imported, use ``count`` threads when called from this one."""
    _held.__dict__["threads"] = count
    if torch := loaded("torch", "set_num_threads"):
        torch.set_num_threads(count)
    if faiss := loaded("faiss", "omp_set_num_threads"):
        faiss.omp_set_num_threads(count)


def ordered_map(
    work: Callable[[T], R], items: Iterable[T], threads: int, window: int | None = None
) -> Generator[R, None, None]:
    """Yield ``work(item)`` in the order of ``items``, computed by ``threads`` threads.

    Libraries inside ``work`` run single-threaded. So many items as ``window`` says, by default
    twice as many as threads, are under way or finished and not yet taken: memory stays bounded.
    """
    if threads == 1:
        with library_threads(1, torch_too=False):
            yield from map(work, items)
        return
    # OpenMP keeps its number of threads by thread: each worker sets its own
    workers = ThreadPoolExecutor(threads, initializer=set_threads, initargs=(1,))
    with library_threads(1, torch_too=False), workers as pool:
        yield from ordered_results(work, items, pool, window or 2 * threads)


def ordered_results(
    work: Callable[[T], R], items: Iterable[T], pool: ThreadPoolExecutor, window: int
) -> Generator[R, None, None]:
    """Yield ``work(item)`` in the order of ``items``, done by a pool of threads.

    At most ``window`` items are under way or finished and not yet taken. When the caller stops
    early or an item fails, those not begun are cancelled.
    """
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def most_open_files() -> int:
    """Return how many files this process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit  # which is -1 on Linux


def scratch(use: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return uninitialised memory, the same again for each call of a thread with one ``use``.

    Pages that are new to a process are dear to touch, and blocks of work need alike memory again
    and again. What an earlier call of the thread returned for the same ``use`` is overwritten.
    """
    need = math.prod(shape) * np.dtype(dtype).itemsize
    pool: dict[str, np.ndarray] = _held.__dict__
    if use not in pool or pool[use].nbytes < need:
        pool[use] = np.empty(need, np.uint8)
    return pool[use][:need].view(dtype).reshape(shape)


def aligned_spans(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Cut ``start`` to ``stop`` at the multiples of ``size``."""
    cuts = range(start - start % size, stop, size)
    return [(max(cut, start), min(cut + size, stop)) for cut in cuts]


def in_aligned_blocks(
    work: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    rows: np.ndarray,
    first: int,
    size: int = ALIGNED_ROWS,
) -> tuple[np.ndarray, ...]:
    """Apply ``work`` to whole blocks, each row at its place, padded with zeros.

    Matrix products change in their last bits with their shape. In a block of full size, aligned to
    global rows, what comes out for a row does not depend on which other rows are at hand.
    ``first`` is the global row of ``rows[0]``; ``work`` takes a block (size, d), and returns
    arrays of as many rows. What is returned has a row for each of ``rows``, (n, d).
    """
    parts = []
    for low, high in aligned_spans(first, first + len(rows), size):
        at = slice(low % size, low % size + high - low)
        block = np.zeros((size, rows.shape[1]), rows.dtype)
        block[at] = rows[low - first : high - first]
        parts.append([array[at] for array in work(block)])
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
