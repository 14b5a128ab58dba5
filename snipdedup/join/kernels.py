"""Products of int8 codes, by the fastest way that this processor has and computes right.

All kernels take the same codes and give the same integers, so no result depends on which one is
used. A short self-test at the first use checks each against exact products and times it; one that
is wrong or rounds is never used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from snipdedup.parallel import scratch

TEST_ROWS, TEST_WIDTH = 512, 256
TEST_ROUNDS = 15
RUN = 64  # columns of products among which a hit is looked for at once
MOST_RUNS = 1 / 4  # share of runs with a hit from which all products are looked at
CLEARLY = 1.5  # a kernel that was only lucky in one short trial must win by more


_testing = threading.RLock()


@dataclass(frozen=True)
class Kernel:
    """One way to compute all products of two blocks of codes on a device, as torch names it.

    ``prepare`` brings the columns' codes, an (n, w) int8 tensor, into the form that ``multiply``
    wants, once a block. ``multiply`` takes an (m, w) int8 tensor and these, and returns (m, n)
    products as a tensor, int32 or float32, which stands until the thread's next call.
    """

    name: str
    device: str
    prepare: Callable[[Any], Any]
    multiply: Callable[[Any, Any], Any]


def candidates(device: str) -> list[Kernel]:
    """Return the kernels to try on a device, float32 last: it works everywhere."""
    int8 = Kernel("int8", device, lambda y: y.T.contiguous(), cpu_int8)
    if device != "cpu":
        int8 = Kernel("int8", device, cuda_columns, cuda_int8)
    # sums of products of codes stay below 2^24, so float32 is exact
    single = Kernel(
        "float32", device, lambda y: y.float().T.contiguous(), lambda x, y: x.float() @ y
    )
    return [int8, single]


def cpu_int8(x: Any, columns: Any) -> Any:
    """Return int8 products, in memory that is used again."""
    import torch

    out = torch.from_numpy(scratch("products", (len(x), columns.shape[1]), np.int32))
    return torch._int_mm(x, columns, out=out)


def cuda_columns(y: Any) -> tuple[Any, int]:
    """Return columns padded as CUDA's int8 product wants them, and how many are real."""
    import torch

    return torch.nn.functional.pad(y, (0, 0, 0, -len(y) % 8)).T.contiguous(), len(y)


def cuda_int8(x: Any, prepared: tuple[Any, int]) -> Any:
    """Return int8 products on CUDA, which takes more than 16 rows, in multiples of 8."""
    import torch

    columns, count = prepared
    rows = max(32, -(-len(x) // 8) * 8)
    padded = torch.nn.functional.pad(x, (0, 0, 0, rows - len(x)))
    return torch._int_mm(padded, columns)[: len(x), :count]


def pick_kernel(device: str = "cpu") -> Kernel:
    """Return the fastest kernel of a device (``cpu``, ``cuda``) that passes the self-test."""
    with _testing:  # two threads that test at once would time each other
        return _picked(device)


@cache
def _picked(device: str) -> Kernel:
    best, least = candidates(device)[-1], float("inf")
    for kernel in candidates(device):  # the first that is right, unless one is clearly faster
        seconds = trial(kernel, TEST_WIDTH)
        if seconds is not None and seconds * CLEARLY < least:
            best, least = kernel, seconds
    return best


def trial(kernel: Kernel, width: int) -> float | None:
    """Return the best time of a kernel on random codes, None if it fails or is wrong."""
    import torch

    rng = np.random.default_rng(0)
    x, y = (rng.integers(-127, 128, (TEST_ROWS, width), np.int8) for _ in range(2))
    x[0], y[0] = 127, 127  # the largest product there can be
    # exact, and quicker than integers; by torch, since numpy's threads would run on for a while
    truth = (torch.from_numpy(x).double() @ torch.from_numpy(y).double().T).numpy()
    try:
        a, b = (torch.from_numpy(side).to(kernel.device) for side in (x, y))
        columns = kernel.prepare(b)
        found = kernel.multiply(a, columns).double().cpu().numpy()
        if found.shape != truth.shape:
            return None
        if not np.array_equal(found, truth):  # NaN is wrong
            return None
        best = float("inf")
        for _ in range(TEST_ROUNDS):
            start = time.perf_counter()
            kernel.multiply(a, columns)
            if kernel.device != "cpu":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    except (RuntimeError, NotImplementedError, AttributeError):  # not on this build or processor
        return None
    return best


class Hits(NamedTuple):
    """Where products reach their row's limit, by runs of `RUN` columns, in row order."""

    row: np.ndarray  # (r,) int64: the row of each run that holds a hit,
    column: np.ndarray  # (r,) int64: its first column,
    hit: np.ndarray  # (r, RUN) bool: and where

    @property
    def total(self) -> int:
        """Number of hits."""
        return int(np.count_nonzero(self.hit))

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the row and column of each hit, (hits,) int64."""
        run, at = np.divmod(np.flatnonzero(self.hit.ravel()), RUN)
        return self.row[run], self.column[run] + at


def product_hits(products: Any, limits: np.ndarray, most: float) -> Hits | None:
    """Return where (m, n) products reach their row's limit, (m,) float64.

    Most runs of columns hold no hit. None where more than a share ``most`` of them do: `all_close`
    is cheaper then.
    """
    import torch

    rows, columns = products.shape
    # rounded up once, so that integers are compared with integers
    least = np.ceil(limits).astype(products[:0].cpu().numpy().dtype)
    whole = columns - columns % RUN
    spans = [(a, b) for a, b in ((0, whole), (whole, columns)) if rows and a < b]
    most *= rows * -(-columns // RUN)
    parts = []
    for start, stop in spans:
        runs = products[:, start:stop].unflatten(1, (-1, min(RUN, stop - start)))
        place = np.flatnonzero(runs.amax(2).cpu().numpy() >= least[:, None])
        most -= len(place)
        if most < 0:
            return None
        row = place // runs.shape[1]
        run = place - row * runs.shape[1]
        hit = runs[torch.from_numpy(row), torch.from_numpy(run)].cpu().numpy() >= least[row, None]
        parts.append(Hits(row, run * RUN + start, hit))
    if len(parts) == 1 and whole:  # the usual case
        return parts[0]
    row, column, hit = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty((0, RUN), bool)]
    for part in parts:
        row.append(part.row)
        column.append(part.column)
        hit.append(np.pad(part.hit, ((0, 0), (0, RUN - part.hit.shape[1]))))
    order = np.argsort(np.concatenate(row), kind="stable")
    return Hits(*(np.concatenate(side)[order] for side in (row, column, hit)))


def hit_places(products: Any, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and column of each product that reaches its row's limit, in row order."""
    hits = product_hits(products, limits, MOST_RUNS)
    if hits is not None:
        return hits.places()
    row, column = np.divmod(np.flatnonzero(all_close(products, limits)), products.shape[1])
    return row, column


def all_close(products: Any, limits: np.ndarray) -> np.ndarray:
    """Return for every product whether it reaches its row's limit, (m, n) bool.

    It stands until the thread's next call.
    """
    table = products.cpu().numpy()
    least = np.ceil(limits).astype(table.dtype)[:, None]
    return np.greater_equal(table, least, out=scratch("close", table.shape, np.bool_))
