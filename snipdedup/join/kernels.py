"""Where products of codes reach a limit: by the native kernels, or by torch on a GPU.

Both see the same codes and give the same integers, so no result depends on the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from snipdedup import native

Hits = tuple[np.ndarray, np.ndarray]


def kernel_name(device: str) -> str:
    """Return the name of the kernels that a device (``cpu``, ``cuda``) uses."""
    return native.used() if device == "cpu" else device


class TileColumns:
    """The columns of some tiles: codes, made ready for products on a device."""

    def __init__(
        self,
        narrow: np.ndarray,
        falls: np.ndarray,
        wide: tuple[np.ndarray, np.ndarray] | None,
        device: str,
        references: np.ndarray,
    ) -> None:
        self.falls, self.wide, self.device, self.references = falls, wide, device, references
        self.columns: Any = (
            native.columns(narrow, falls) if device == "cpu" else cuda_columns(narrow)
        )

    def hits(
        self,
        narrow: np.ndarray,
        limits: np.ndarray,
        wide: np.ndarray,
        wide_limits: np.ndarray,
        *,
        first: int,
        references: np.ndarray,
        references_only: bool,
    ) -> Hits:
        """Return the candidate pairs of rows with the columns, as places, (hits,) int32 each.

        Codes are (n, w) int8, limits (n,) float; for the rest see `native.hits`.
        """
        both = None if self.wide is None else (wide, wide_limits, *self.wide)
        sides = (references, self.references)
        known = sides if references_only or any(side.any() for side in sides) else None
        if self.device == "cpu":
            return native.hits(
                narrow, self.columns, limits, both,
                first=first, references=known, references_only=references_only,
            )  # fmt: skip
        i, j = cuda_hits(narrow, self.columns, self.falls, limits)
        keep = j < i.astype(np.int64) + first
        if known is not None:
            a, b = references[i], self.references[j]
            keep &= (a != b) if references_only else ~(a & b)
        i, j = i[keep], j[keep]
        if both is not None:
            products = native.code_dots(wide[i], both[2][j]) + both[3][j]
            keep = products >= native.whole_limits(wide_limits)[i]
            i, j = i[keep], j[keep]
        return i, j


def cuda_columns(codes: np.ndarray) -> Any:
    """Return columns, (w, n) int8 on CUDA, padded as its int8 product wants them."""
    import torch

    padded = np.zeros((-(-len(codes) // 8) * 8, codes.shape[1]), np.int8)
    padded[: len(codes)] = codes
    return torch.from_numpy(padded).to("cuda").T


def cuda_hits(rows: np.ndarray, columns: Any, falls: np.ndarray, limits: np.ndarray) -> Hits:
    """Return where products reach their row's limit, in row order.

    CUDA's int8 product takes more than 16 rows, in multiples of 8.
    """
    import torch

    padded = np.zeros((max(32, -(-len(rows) // 8) * 8), rows.shape[1]), np.int8)
    padded[: len(rows)] = rows
    products = torch._int_mm(torch.from_numpy(padded).to("cuda"), columns)
    least = torch.from_numpy(native.whole_limits(limits)).to("cuda")
    starts = torch.from_numpy(falls).to("cuda")
    close = products[: len(rows), : len(falls)] + starts >= least[:, None]
    i, j = (side.cpu().numpy().astype(np.int32) for side in torch.nonzero(close, as_tuple=True))
    return i, j
