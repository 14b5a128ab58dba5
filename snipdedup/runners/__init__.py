"""Who does the tasks of a run: threads, processes, machines that share a folder, Ray.

A task leaves files, the last of them its done file; its files are the same bit for bit whoever does
it, so runners differ in speed only. To add one, for Dask say: write ``runners/dask.py`` with a
class that has what `local.Runner` lists (`ray` is an example), make it in `open_runner`, and add
its name to the choices of ``--runner`` in ``config.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snipdedup.runners.local import Local, Runner
from snipdedup.runners.ray import Ray
from snipdedup.runners.slurm import Share, Slurm

FORK_ROWS = 1 << 18  # from this size on, processes are faster than threads


@contextmanager
def open_runner(
    name: str, threads: int, device: str, *,
    rows: int = 0, share: Share | None = None, out: Path | None = None,
) -> Iterator[Runner]:  # fmt: skip
    """Yield the runner of that name, on so many threads; close it after the block.

    ``rows`` is the size of the set where processes may be forked, else 0. With a ``share``, this
    process is one of several that write ``out``.
    """
    local = Local(threads, forks=rows >= FORK_ROWS, device=device)
    if share is not None and out is not None:
        yield Slurm(out, share, local)
    elif name == "ray":
        ray = Ray(threads)
        try:
            yield ray
        finally:
            ray.close()
    else:
        yield local
