"""Short int8 codes of rows whose products bound the cosine from above.

A unit row x is projected by a matrix P that lengthens nothing, the main directions of a sample as
nearly as small integers say them; the norm of what is left, r = √(1 - ‖Px‖²), becomes one more
coordinate. z = (Px, r) has norm 1, and by Cauchy and Schwarz z·z' = Px·Px' + r r' ≥ x·x'. A fixed
rotation then makes all coordinates alike in size, and int8 rounds them. So rows whose codes'
product lies below ``limit`` cannot be a pair.

Rows are made integers first, and P is one. Its products and all sums of them fit the 24 bits of a
float32, so they are exact in whatever order and by whatever instructions; what follows is done
coordinate by coordinate in float32. So a row has the same code on every processor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from snipdedup import native
from snipdedup.features.cosine import LENGTH, integer_rows, longest, unit_rows
from snipdedup.features.scan import BLOCK
from snipdedup.features.shards import plan_blocks
from snipdedup.native.fallback import round_codes, row_sums
from snipdedup.parallel import library_threads, ordered_map

if TYPE_CHECKING:
    from snipdedup.encoder.network import Encoder

# Coordinates of a code: narrow ones, and wide ones to choose from. Fewer are cheaper, more rule out
# more pairs.
WIDTHS = (64, 128, 256)
PEAK = 127  # largest int8
COLUMN = (1 << 24) // LENGTH  # the norm of a column of P's: their product is below 2^24
OVERFLOW = 0.01  # share of a sample's rows of which some coordinate may be more than int8 holds
# Codes are a = x + e and b = y + f, so a·b = x·y + x·f + y·e + e·f. Assumed, of a random rotation
# that spreads coordinates over many integers: the errors of a row are uniform in ±1/2, independent
# of one another and of the weights x and y. Not assumed: that e is independent of f. Rows nearly
# equal round alike, and x·f + y·e has twice the variance that it has elsewhere.
# For u uniform in ±1/2, E exp(tu) <= exp(t²/24). So x·f < -s has probability at most
# exp(-6 s²/norm²), y·e < -s too, and e·f >= -w/4. `Projection.limit` allows 2 s + w/4, and s is
# such that the two together have `MISS_PROBABILITY`.
MISS_PROBABILITY = 1e-6
MISS_NORMS = 1.5551  # s / norm = √(ln(2 / MISS_PROBABILITY) / 6), rounded up
FLOAT_ERROR = 1e-5  # float32 arithmetic on coordinates
MOMENT_ROWS = 1 << 10  # whose products are added up at a time: of int8, below 2^24 in all
PEAK_ROWS = 1 << 8  # whose coordinates are computed at a time: they stay in the cache
STEPS = (2, 2)  # of the search for main directions, before each time they are made orthonormal
MOMENT_LENGTH = 360  # of a row: of 2^15 rows, sums of squares are below 2^33
DEPENDENT = 1e-12  # what is left of a direction, measured by its length before, is rounding
HAIR_BITS = 12  # of a singular value, that are kept


class Codes(NamedTuple):
    """Codes of rows."""

    values: np.ndarray  # (n, w) int8
    falls: np.ndarray  # (n,) int32: by how much each row's limit falls

    def where(self, places: Any) -> Codes:
        """Return the codes that a slice, mask or index array selects."""
        return Codes(self.values[places], self.falls[places])


def join_codes(parts: Sequence[Codes]) -> Codes:
    """Return codes one after another."""
    return Codes(*(np.concatenate(side) for side in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Projection:
    """How rows become codes."""

    arithmetic: ClassVar[str] = "integers 2"  # with another name, a row has another code

    matrix: np.ndarray  # (d, w) int8: main directions, rotated
    residual: np.ndarray  # (w,) float32: the rotated axis of the residual norm
    scale: float  # codes are coordinates times this, rounded
    unit: float  # of a product of a row's integers with the matrix's, as a coordinate

    @property
    def width(self) -> int:
        """Number of coordinates of a code."""
        return len(self.residual)

    @property
    def length(self) -> float:
        """What the norm of a row is at most once it is rounded to integers, 1 or a little more."""
        return 1 + rounding_error(len(self.matrix))

    @property
    def norm(self) -> float:
        """What the norm of a code is at most."""
        return float(self.scale * self.length + 0.5 * self.width**0.5)

    def encode(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the codes of a block of rows as stored; see `encode_block`."""
        return self.encode_block(rows, integer_rows(rows)[0])

    def encode_block(self, rows: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the codes of a block of rows, (n, w) int8, and their falls, (n,) int32.

        ``rows`` are as stored, ``whole`` the same as integers (`cosine.integer_rows`). By
        its fall a row's limit falls for what int8 could not hold (`fallback.round_codes`).
        """
        del rows
        return self.finish(native.project(whole, self.packed))

    def finish(self, products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the codes of a block and their falls, of its products with the matrix."""
        return native.finish_codes(products, self.unit, self.residual, self.length**2, self.scale)

    @cached_property
    def packed(self) -> Any:
        """The matrix, ready for products."""
        return native.matrix(self.matrix)

    def rotated(self, products: np.ndarray) -> np.ndarray:
        """Return rotated coordinates, (n, w) float32, of products of rows with the matrix.

        Products of coordinates bound cosines. Only sums of whole columns and single operations: no
        processor rounds them otherwise.
        """
        coordinates = products * np.float32(self.unit)
        inside = row_sums(coordinates * coordinates)
        along = row_sums(coordinates * self.residual)  # nearly 0: P is rounded; now the residual's
        square = np.float32(self.length**2) - (inside - along * along)
        rest = np.sqrt(np.maximum(square, np.float32(0)))
        return np.asarray(coordinates + (rest - along)[:, None] * self.residual)

    def limit(self, threshold: float) -> float:
        """Return the product of two codes from which their rows may be a pair."""
        rounding = 2 * self.norm * MISS_NORMS + self.width / 4
        return float(self.scale**2 * (np.float32(threshold) - self._lost) - rounding)

    def distance(self, threshold: float) -> float:
        """Return the largest distance of the codes of two rows that are a pair."""
        away = 2 * self.length**2 - 2 * (threshold - self._lost)
        return float(self.scale * np.sqrt(max(0.0, away)) + self.width**0.5)

    @property
    def _lost(self) -> float:
        """By how much two rows' product may fall when both are rounded to integers."""
        error = rounding_error(len(self.matrix))
        return 2 * error * self.length + error**2 + FLOAT_ERROR

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the parts as arrays, to be saved."""
        numbers = {"scale": np.array(self.scale), "unit": np.array(self.unit)}
        name = {"arithmetic": np.array(self.arithmetic)}
        return {"matrix": self.matrix, "residual": self.residual, **numbers, **name}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], **more: Any) -> Self:
        """Return the projection that `arrays` were made of; a subclass gives what it has besides.

        Raises ValueError if they name other arithmetic: it would make other codes of the same rows.
        """
        name = str(arrays["arithmetic"])
        if name != cls.arithmetic:
            raise ValueError(
                f"its codes are made by '{name}', this version makes them by '{cls.arithmetic}'"
            )
        parts = arrays["matrix"], arrays["residual"], float(arrays["scale"]), float(arrays["unit"])
        return cls(*parts, **more)


@dataclass(frozen=True)
class EncoderProjection(Projection):
    """Codes of the SNIP encoder's descriptors: rotated, scaled, and rounded to int8.

    Descriptors of a learned network bound no cosine: the limit of their products is calibrated on
    pairs of a sample (`calibration.calibrate_limit`), so that the share asked for passes. They are
    float32 arithmetic of a network: another processor may round a coordinate otherwise.

    ``matrix``, (dim, dim) float32, is a rotation; ``residual`` is 0 and ``unit`` is 1.
    """

    arithmetic: ClassVar[str] = "float32 1"

    encoder: Encoder
    path: Path  # its folder
    lowest: float = 0.0  # product of two codes from which their rows may be a pair

    @classmethod
    def of(cls, path: Path, seed: int, device: str) -> EncoderProjection:
        """Return the codes of a finished encoder, before their limit is calibrated."""
        from snipdedup.encoder.network import Encoder

        encoder = Encoder.load(path, device)
        rotation = random_rotation(encoder.dim, seed).astype(np.float32)
        # a rotated unit vector has coordinates of about dim^-1/2; hardly any are six times as large
        scale = PEAK / min(1.0, 6 * encoder.dim**-0.5)
        nothing = np.zeros(encoder.dim, np.float32)
        return cls(rotation, nothing, scale, 1.0, encoder, path.resolve())

    @property
    def length(self) -> float:
        """What the norm of a descriptor is."""
        return 1.0

    def encode_block(self, rows: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Projection.encode_block`; rows that cannot be compared become zeros."""
        import torch

        del whole
        rows = unit_rows(rows)
        with torch.inference_mode(), library_threads(1):
            unit = torch.from_numpy(rows).to(self.encoder.device)
            descriptors = self.encoder.network(unit, self.encoder.output).cpu()
            turned = descriptors @ torch.from_numpy(self.matrix)
            turned[torch.from_numpy(~rows.any(1))] = 0
            return round_codes(turned.numpy() * np.float32(self.scale))

    def limit(self, threshold: float) -> float:
        """Return the calibrated product."""
        del threshold
        return self.lowest

    def distance(self, threshold: float) -> float:
        """Return the largest distance of the codes of two rows that may be a pair."""
        del threshold
        return float(np.sqrt(max(0.0, 2 * (self.norm**2 - self.lowest))))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the parts as arrays, to be saved."""
        more = {"encoder": np.array(str(self.path)), "lowest": np.array(self.lowest)}
        return {**super().arrays(), **more}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], **more: Any) -> Self:
        """See `Projection.from_arrays`; reads the encoder from its folder."""
        from snipdedup.encoder.network import Encoder

        path, lowest = Path(str(arrays["encoder"])), float(arrays["lowest"])
        encoder = Encoder.load(path, "cpu")
        return super().from_arrays(arrays, encoder=encoder, path=path, lowest=lowest, **more)


def encode_rows(projection: Projection, rows: np.ndarray, threads: int) -> Codes:
    """Return the codes of any number of rows as stored."""
    blocks = [rows[start:stop] for start, stop in plan_blocks(len(rows), BLOCK)]
    found = [Codes(*part) for part in ordered_map(projection.encode, blocks, threads)]
    nothing = Codes(np.empty((0, projection.width), np.int8), np.empty(0, np.int32))
    return join_codes([nothing, *found])


def rounding_error(dim: int) -> float:
    """Return the largest distance between a unit row and its integers, in units of the row's."""
    return (dim**0.5 / 2 + 1) / longest(dim)


def fit_projection(sample: np.ndarray, width: int, seed: int) -> Projection:
    """Fit a projection of a width to a sample of distinct rows, (n, d), that can be compared."""
    main = main_directions(unit_rows(sample), width - 1)
    return project(main, integer_rows(sample)[0], width, seed)[0]


def project(
    main: np.ndarray, whole: np.ndarray, width: int, seed: int, threads: int = 1
) -> tuple[Projection, Codes]:
    """Return a projection on the last ``width`` - 1 main directions, and the codes of some rows.

    ``main`` is of `main_directions`; the rows, as integers, are a sample that gives the scale.
    """
    main, rotation = main[:, -(width - 1) :], random_rotation(width, seed)
    count = main.shape[1]
    matrix = small_integers(exact_product(main, rotation[:count]))
    unit = 1 / (longest(len(main)) * largest_singular(matrix))
    projection = Projection(matrix, rotation[count].astype(np.float32), 1.0, unit)

    def find_peaks(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        products = native.project(block, projection.packed)
        return products, np.abs(projection.rotated(products)).max(1)

    blocks = [whole[start:stop] for start, stop in plan_blocks(len(whole), PEAK_ROWS)]
    found = list(ordered_map(find_peaks, blocks, threads))
    peaks = np.sort(np.concatenate([part for _, part in found]))
    scale = PEAK / min(1.0, float(peaks[int((1 - OVERFLOW) * (len(peaks) - 1))]))
    projection = dataclasses.replace(projection, scale=scale)
    return projection, join_codes([Codes(*projection.finish(products)) for products, _ in found])


def small_integers(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix of columns no longer than 1 as int8, in the largest unit that fits.

    No column becomes longer than `COLUMN`.
    """
    room = max(1, COLUMN - int(np.ceil(len(matrix) ** 0.5 / 2)))
    largest = float(np.abs(matrix).max(initial=0))
    return np.rint(matrix * min(room, PEAK / max(largest, 1e-9))).astype(np.int8)


def random_rotation(width: int, seed: int) -> np.ndarray:
    """Return a random orthonormal matrix, (width, width) float64."""
    values = np.random.default_rng(seed).standard_normal((width, width))
    return native.orthonormal(in_steps(values, 1 << 10).T, DEPENDENT).T.copy()


def main_directions(unit: np.ndarray, most: int, threads: int = 1) -> np.ndarray:
    """Return the main directions of unit rows about the origin, orthonormal, the longest last.

    (d, m) float64, m the smaller of d and ``most``. By simultaneous iteration (Rutishauser, 1969)
    on integers: a library's eigenvectors differ between processors, and few steps take nearly as
    much of the rows' length. Directions in which no row lies are zeros. ``unit`` has at most 2^15
    rows.
    """
    total = moments(unit, threads)
    count = min(most, len(total))
    found = np.random.default_rng(0).integers(-1000, 1001, (len(total), count)).astype(float)
    for steps in STEPS:
        for _ in range(steps):
            found = exact_product(total, found, whole=True)
        found = native.orthonormal(found.T, DEPENDENT).T
    return np.ascontiguousarray(found[:, ::-1])


def moments(unit: np.ndarray, threads: int) -> np.ndarray:
    """Return the products of all columns of unit rows as integers of up to `PEAK`, (d, d)."""
    peak = max(1e-9, float(unit.max(initial=0)), -float(unit.min(initial=0)))
    scale = min(MOMENT_LENGTH, PEAK / peak)

    def part(span: tuple[int, int]) -> np.ndarray:
        digits = np.rint(unit[slice(*span)] * scale).astype(np.int8).T.copy()
        return native.products(digits, native.columns(digits)).astype(np.float64)

    return np.asarray(sum(ordered_map(part, plan_blocks(len(unit), MOMENT_ROWS), threads)))


def exact_product(x: np.ndarray, y: np.ndarray, whole: bool = False) -> np.ndarray:
    """Return x @ y in float64, rounded before and not after: sums are exact in any order.

    Rows of x are no longer than 1, taken in steps of 2^-26; if ``whole``, they are integers below
    2^33. y is taken in steps of a power of two, of which the length of a column has 2^26 (2^20
    if ``whole``).
    """
    size = np.sqrt(row_sums((y * y).T.copy()))
    right = in_steps(y, 2.0 ** ((20 if whole else 26) - np.frexp(size)[1]))
    left = x if whole else in_steps(x, 2.0**26)
    return np.asarray(left @ right)


def in_steps(values: np.ndarray, unit: Any) -> np.ndarray:
    """Return values rounded to multiples of 1 / ``unit``, a power of two or one a column."""
    return np.asarray(np.rint(values * unit) / unit)


def largest_singular(matrix: np.ndarray) -> float:
    """Return the largest singular value of integers, (d, w) int8, rounded up by a hair.

    By more than a library's last bits, so that these do not show, not even where it is whole.
    """
    values = matrix.astype(np.float64)
    gram = exact_product(np.ascontiguousarray(values.T), values, whole=True)
    root = max(1.0, float(np.linalg.eigvalsh(gram)[-1])) ** 0.5 * (1 + 2.0**-36)
    step = 2.0 ** (np.floor(np.log2(root)) - HAIR_BITS)
    return float((np.floor(root / step) + 1) * step)
