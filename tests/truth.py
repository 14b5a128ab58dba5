"""What tests compare with: plain references that share no code with the package, and data."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np

from snipdedup import cli


def clustered(rows, dim, seed, *, clusters=None, noise=0.2, copies=0.0, dtype=np.float32):
    """Rows about random centres, so near that many are pairs; some are bitwise copies."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters or max(1, rows // 8), dim))
    of = rng.integers(0, len(centres), rows)
    x = centres[of] + noise * rng.random((rows, 1)) * rng.standard_normal((rows, dim))
    x = (x * rng.uniform(0.5, 2, (rows, 1))).astype(dtype)
    copied = rng.random(rows) < copies
    x[copied] = x[rng.integers(0, rows, copied.sum())]
    return x


def cosine_table(x):
    """All cosines: float64 products of rows as stored, over norms, rounded to float32."""
    x = np.asarray(x, np.float64)
    norms = np.sqrt((x * x).sum(1))
    table = ((x @ x.T) / np.outer(norms, norms)).astype(np.float32)
    return np.minimum(table, np.float32(1))


def components(rows, pairs):
    """The smallest row of each row's component, by union-find, one pair after the other."""
    root = list(range(rows))

    def find(a):
        while root[a] != a:
            a = root[a]
        return a

    for pair in pairs:
        a, b = (find(int(row)) for row in pair)
        root[max(a, b)] = min(a, b)
    return np.array([find(row) for row in range(rows)])


def star(table, threshold, order, references=0):
    """The star rule as the terms say it: (representative, stays) of each row.

    ``order`` are all rows in keep order, but the first ``references``, which stay in any case.
    """
    limit = np.float32(threshold)
    staying = list(range(references))
    for row in order:
        if not any(table[row, other] >= limit for other in staying):
            staying.append(row)
    stays = np.zeros(len(table), bool)
    stays[staying] = True
    representative = np.arange(len(table))
    for row in np.flatnonzero(~stays):
        best = max(table[row, staying])
        representative[row] = min(other for other in staying if table[row, other] == best)
    return representative, stays


def pairs_of(table, threshold):
    """All pairs a < b of a table of cosines."""
    a, b = np.nonzero(np.triu(table >= np.float32(threshold), 1))
    return list(zip(a.tolist(), b.tolist(), strict=True))


def kruskal(edges):
    """The maximum spanning forest of (a, b, similarity), one edge after the other."""
    root = {}

    def find(a):
        while root.setdefault(a, a) != a:
            a = root[a]
        return a

    chosen = []
    for a, b, similarity in sorted(set(edges), key=lambda e: (-e[2], e[0], e[1])):
        u, v = find(a), find(b)
        if u != v:
            root[v] = u
            chosen.append((a, b, similarity))
    return sorted(chosen)


def save_shards(folder, x, cuts):
    """Write rows as img_emb_0.npy, ...: cut at ``cuts``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.split(x, cuts)):
        np.save(folder / f"img_emb_{number}.npy", part)
    return folder


def snip(*words):
    """Run the command line in this process: (status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


def listing(folder):
    """Every path under a folder with size, time of change and bytes: what must not change."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(Path(folder).rglob("*"))
    }
