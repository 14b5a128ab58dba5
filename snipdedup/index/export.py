"""The index as one file that plain faiss reads, written without holding faiss' ids in memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.index.folder import QUANTISER, Index
from snipdedup.index.quantizer import read_quantiser
from snipdedup.storage import atomic


def export_faiss(index: Index, path: Path) -> int:
    """Write one IndexIVFPQ that plain faiss reads, with int64 ids that are global rows.

    faiss would hold 8 bytes an id in memory to write it; here its file is laid out by hand: the
    empty index as faiss serialises it, with the lists put in place of its empty ones (format of
    faiss/impl/index_write.cpp, "ilar").

    Returns
    -------
    int
        Bytes written.
    """
    import faiss

    lists = index.lists()
    ivfpq = read_quantiser(index.folder / QUANTISER).ivfpq
    ivfpq.ntotal = len(lists.ids)
    head = faiss.serialize_index(ivfpq).tobytes()
    empty = array_lists_header(index.nlist, index.code_size, b"sprs", np.empty(0, "<u8"))
    if not head.endswith(empty):
        raise SnipError(f"this faiss ({faiss.__version__}) writes indexes in an unknown layout")
    sizes = np.diff(lists.starts).astype("<u8")
    with atomic.replacing(path) as part, part.open("wb") as file:
        file.write(head.removesuffix(empty))
        file.write(array_lists_header(index.nlist, index.code_size, b"full", sizes))
        for low, high in pairwise(lists.starts.tolist()):
            file.write(lists.codes[low:high].tobytes())
            file.write(lists.rows(slice(low, high)).astype("<i8").tobytes())
    return path.stat().st_size


def array_lists_header(nlist: int, code_size: int, layout: bytes, sizes: np.ndarray) -> bytes:
    """Return what precedes the lists in a faiss file: full or sparse sizes."""
    counts = np.array([nlist, code_size], "<u8").tobytes()
    return b"ilar" + counts + layout + np.array([sizes.size], "<u8").tobytes() + sizes.tobytes()
