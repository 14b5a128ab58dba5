"""Short int8 codes of rows whose products bound the cosine from above.

A unit row x is projected on the main directions P of a sample, and the norm of what is left,
r = ‖x − PᵀPx‖, becomes one more coordinate: z = (Px, r) has norm 1, and by Cauchy and Schwarz
z·z' = Px·Px' + r r' ≥ x·x'. A fixed rotation then makes all coordinates alike in size, and int8
rounds them. So rows whose codes' product lies below ``limit`` cannot be a pair.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from snipdedup.ground.compute import in_order
from snipdedup.ground.cosine import Directions, directions
from snipdedup.ground.shards import plan_blocks

# Coordinates of a code, multiples of 16: fewer are cheaper, more rule out more pairs.
WIDTHS = (64, 80, 96, 128, 192, 256)
PEAK = 127  # largest int8
MOMENT_ROWS = 1 << 11  # whose products are added up at a time, in order
HEADROOM = 1.1  # coordinates of rows outside the sample may be this much larger
# Codes are a = x + e and b = y + f, so a·b = x·y + x·f + y·e + e·f. Assumed, of a random rotation
# that spreads coordinates over many integers: the errors of a row are uniform in ±1/2, independent
# of one another and of the weights x and y. Not assumed: that e is independent of f. Rows nearly
# equal round alike, and x·f + y·e has twice the variance that it has elsewhere.
# For u uniform in ±1/2, E exp(tu) <= exp(t²/24). So x·f < -s has probability at most
# exp(-6 s²/norm²), y·e < -s too, and e·f >= -w/4. `Projection.limit` allows 2 s + w/4 = 4.63 norm;
# with w <= 256 and scale >= 127, hence norm >= 135, the two together are below 2e-11, whatever e
# and f have to do with each other. (That errors are bounded, Hoeffding's inequality, would alone
# prove 2e-5 for equal rows.)
MISS_PROBABILITY = 1e-9
FLOAT_SLACK = 1e-5  # float32 arithmetic in projecting
# bfloat16 keeps 8 bits: rounding rows, directions and coordinates moves products of dense rows by
# about 1e-4; rows of two nonzero values, the worst case known, by .0032.
BFLOAT16_SLACK = 4e-3


@dataclass(frozen=True)
class Projection:
    """How rows become codes.

    Attributes
    ----------
    matrix : (d, w) float32
        Main directions, rotated.
    residual : (w,) float32
        The rotated axis of the residual norm.
    scale : float
        Codes are coordinates times this, rounded.
    """

    matrix: np.ndarray
    residual: np.ndarray
    scale: float

    @property
    def width(self) -> int:
        """Number of coordinates of a code."""
        return len(self.residual)

    @property
    def norm(self) -> float:
        """What the norm of a code is at most."""
        return float(self.scale + 0.5 * self.width**0.5)

    def encode(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the codes of a block of rows; see `encode_directions`.

        Parameters
        ----------
        rows : (n, d) float16, float32 or float64
        """
        return self.encode_directions(directions(rows))

    def encode_directions(self, rows: Directions) -> tuple[np.ndarray, np.ndarray]:
        """Return the codes of a block of rows.

        Returns
        -------
        codes : (n, w) int8
        excess : (n,) float32
            Norm of what int8 could not hold of a code, 0 for nearly all rows.
        """
        return to_codes(self.rotated(rows), self.scale)

    def rotated(self, rows: Directions) -> Any:
        """Return rotated unit coordinates, (n, w) float32 tensor; their products bound cosines."""
        import torch

        # scaled to norm 1 after the product, which has fewer columns
        matrix = torch.from_numpy(self.matrix)
        if has_bfloat16():
            coordinates = (rows.values.bfloat16() @ matrix.bfloat16()).float()
        else:
            coordinates = rows.values @ matrix
        coordinates *= rows.factor[:, None]
        inside = torch.linalg.vector_norm(coordinates, dim=1)
        rest = (1 - inside * inside).clamp_(min=0).sqrt_()
        return coordinates.addr_(rest, torch.from_numpy(self.residual))

    def limit(self, threshold: float) -> float:
        """Return the product of two codes from which their rows may be a pair."""
        rounding = self.norm * np.sqrt(2) * np.sqrt(np.log(2 / MISS_PROBABILITY) / 2)
        slack = BFLOAT16_SLACK if has_bfloat16() else FLOAT_SLACK
        return float(self.scale**2 * (np.float32(threshold) - slack) - rounding)

    def slack(self, excess: np.ndarray) -> np.ndarray:
        """Return by how much a row's limit falls for what its code could not hold."""
        return np.asarray(excess * self.norm * 2)

    def distance(self, threshold: float) -> float:
        """Return the largest distance of the codes of two rows that are a pair."""
        return float(self.scale * np.sqrt(max(0.0, 2 - 2 * threshold)) + self.width**0.5)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the parts as arrays, to be saved."""
        return {"matrix": self.matrix, "residual": self.residual, "scale": np.array(self.scale)}


def to_codes(coordinates: Any, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates scaled and rounded to int8, and the norm of what that could not hold.

    Parameters
    ----------
    coordinates : (n, w) float32 tensor
        Overwritten.
    scale : float
    """
    import torch

    scaled = coordinates.mul_(scale)
    excess = np.zeros(len(scaled), np.float32)
    low, high = scaled.aminmax() if len(scaled) else (0.0, 0.0)
    if max(high, -low) > PEAK + 0.5:  # hardly ever; for all at once it is quickly seen
        wide = scaled.abs().amax(1) > PEAK + 0.5
        over = scaled[wide] - scaled[wide].round().clamp_(-PEAK, PEAK)
        excess[wide.numpy()] = torch.linalg.vector_norm(over, dim=1).numpy()
    codes = scaled.round_().clamp_(-PEAK, PEAK).to(torch.int8)
    return np.asarray(codes.numpy()), excess


@cache
def has_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 itself; asked, not timed, so always alike."""
    import torch

    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))


def fit_projection(sample: np.ndarray, width: int, seed: int) -> Projection:
    """Fit a projection of a width to a sample of distinct rows, (n, d), that can be compared."""
    rows = directions(sample)
    return project(main_directions(rows.unit(), width - 1), rows, width, seed)[0]


def project(
    main: np.ndarray, rows: Directions, width: int, seed: int
) -> tuple[Projection, np.ndarray]:
    """Return a projection on the last ``width`` - 1 main directions, and the codes of some rows.

    Parameters
    ----------
    main : (d, m) float64
        Orthonormal; see `main_directions`.
    rows : Directions
        A sample, from which the scale comes.
    width : int
        Coordinates of a code.
    seed : int
        Of the rotation.
    """
    main, rotation = main[:, -(width - 1) :], random_rotation(width, seed)
    count = main.shape[1]
    matrix = (main @ rotation[:count]).astype(np.float32)
    projection = Projection(matrix, rotation[count].astype(np.float32), 1.0)
    coordinates = projection.rotated(rows)
    scale = PEAK / min(1.0, float(coordinates.abs().max()) * HEADROOM)
    return dataclasses.replace(projection, scale=scale), to_codes(coordinates, scale)[0]


def random_rotation(width: int, seed: int) -> np.ndarray:
    """Return a random orthonormal matrix, (width, width) float64."""
    import torch

    values = np.random.default_rng(seed).standard_normal((width, width))
    return np.asarray(torch.linalg.qr(torch.from_numpy(values))[0].numpy())


def main_directions(unit: np.ndarray, most: int, threads: int = 1) -> np.ndarray:
    """Return the main directions of unit rows about the origin, orthonormal, the longest last.

    (d, m) float64, m the smaller of d and ``most``.
    """
    import torch

    def moments(span: tuple[int, int]) -> Any:
        values = torch.from_numpy(unit[slice(*span)])
        return (values.T @ values).double()

    total: Any = sum(in_order(moments, plan_blocks(len(unit), MOMENT_ROWS), threads))
    return np.asarray(torch.linalg.eigh(total)[1].numpy()[:, -min(most, len(total)) :])
