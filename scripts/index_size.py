"""What an index costs: bytes a row on disk, and in anonymous memory when it is searched.

    python scripts/index_size.py INDEX [--rows 2.17e9] [--shard_rows 1000000] [--json FILE]

An index of a million rows is made by

    python scripts/synthetic.py set --rows 1000000 --dim 128
    snip index set/img_emb --m 4 --out INDEX

Memory is measured in a process of its own: RssAnon (Linux) before and after the lists are loaded,
and after a search. Files that are mapped are not ours to hold, so they do not count. Centroids and
codebooks are stated apart. The last lines are arithmetic, for as many rows as --rows.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snipdedup.index.folder import QUANTISER, Index, load_shard, packed_width
from snipdedup.index.quantizer import MOST_LISTS
from snipdedup.index.search import Searcher
from snipdedup.parallel import ALIGNED_ROWS

START_BYTES = 8  # of a list's beginning, in memory
SIZE_BYTES = 2  # of a list's length in a shard's file, where one may be longer than 255


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("index", type=Path)
    parser.add_argument("--rows", type=float, default=2.17e9, help="rows to reckon with")
    parser.add_argument("--shard_rows", type=int, default=1_000_000, help="rows of a shard there")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.measure:
        print(json.dumps(in_memory(given.index)))
        return
    words = [sys.executable, __file__, str(given.index), "--measure"]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    disk, memory = on_disk(given.index), json.loads(done.stdout)
    code = Index(given.index).code_size
    reckoned = reckon(int(given.rows), given.shard_rows, code)
    print(table(disk, memory, reckoned, int(given.rows)))
    if given.json:
        body = {"disk": disk, "memory": memory, "reckoned": reckoned, "rows": int(given.rows)}
        given.json.write_text(json.dumps(body, indent=2) + "\n")


def on_disk(folder: Path) -> dict[str, float]:
    """Return rows, and bytes a row of the shards' files, of which codes, ids and list lengths."""
    index = Index(folder)
    rows = int(index.manifest["stored_rows"])
    parts = {"codes": 0, "ids": 0, "sizes": 0}
    size = 0
    for described in index.manifest["shards"]:
        path = folder / described["file"]
        shard = load_shard(path)
        size += path.stat().st_size
        for name in parts:
            parts[name] += getattr(shard, name).nbytes
    told = {name: count / rows for name, count in parts.items()}
    apart = (folder / QUANTISER).stat().st_size
    return {"rows": rows, "bytes_a_row": size / rows, **told, "apart": apart}


def in_memory(folder: Path) -> dict[str, float]:
    """Return bytes of the lists' arrays, and what loading and searching add to anonymous memory."""
    index = Index(folder)
    x = index.quantiser.centroids[: 4 * ALIGNED_ROWS].copy()
    index.quantiser.assign(x[:8], 1)  # libraries set themselves up at the first call
    before = anonymous()
    lists = index.lists()
    loaded = anonymous()
    searcher = Searcher(index, lists, 4)
    searcher.places(x, *searcher.probe(x, 0), 16)
    return {
        "arrays": lists.codes.nbytes + lists.ids.nbytes + lists.starts.nbytes,
        "starts": lists.starts.nbytes,
        "loaded": loaded - before,
        "searched": anonymous() - before,
        "table": index.nlist * index.quantiser.m * 4 << index.quantiser.nbits,
    }


def anonymous() -> int:
    """Return this process's anonymous memory, in bytes; Linux tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return int(found["RssAnon"].split()[0]) * 1024


def reckon(rows: int, shard_rows: int, code: int) -> dict[str, float]:
    """Return bytes of an index of so many rows: on disk, and in memory."""
    shards = math.ceil(rows / shard_rows)
    lengths = shards * MOST_LISTS * SIZE_BYTES
    return {
        "disk": rows * (code + packed_width(shard_rows)) + lengths,
        "memory": rows * (code + packed_width(rows)) + (MOST_LISTS + 1) * START_BYTES,
    }


def table(
    disk: dict[str, float], memory: dict[str, float], reckoned: dict[str, Any], rows: int
) -> str:
    """Return all figures as a person reads them."""
    count = disk["rows"]
    parts = ", ".join(f"{name} {disk[name]:.2f}" for name in ("codes", "ids", "sizes"))
    mega = {name: f"{size / 1e6:.1f} MB" for name, size in memory.items()}
    lines = [
        f"{int(count):,} rows",
        f"on disk    {disk['bytes_a_row']:.2f} bytes a row ({parts})",
        f"in memory  {memory['arrays'] / count:.2f} bytes a row (beginnings of lists "
        f"{memory['starts'] / count:.2f} of them): {mega['arrays']}",
        f"RssAnon    grows by {mega['loaded']} when they are loaded, by {mega['searched']} after a "
        f"search, which makes a table of {mega['table']} from the codebooks",
        f"apart      {disk['apart'] / 1e6:.1f} MB of centroids and codebooks",
        "",
        f"{rows:,} rows, {MOST_LISTS:,} lists:",
    ]
    for name, size in reckoned.items():
        lines.append(f"{name:<10} {size / 1e9:.2f} GB, {size / rows:.3f} bytes a row")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
