"""Codes of the SNIP encoder's descriptors, in the place of a projection's.

A projection bounds the cosine, so its codes lose no pair. Descriptors of a learned network bound
nothing: how near they must be is learnt from pairs of a sample, so that the share asked for passes.
They are float32 arithmetic of a network: another processor may round a coordinate otherwise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from snipdedup.features.cosine import Directions, unit_rows
from snipdedup.features.scan import BLOCK
from snipdedup.features.shards import plan_blocks
from snipdedup.join.forest import Edges
from snipdedup.join.lists import (
    Asked,
    counted,
    drawn_pairs,
    easiest,
    edge_weights,
    pair_products,
    row_products,
    weighted_quantile,
)
from snipdedup.join.projection import PEAK, Projection, random_rotation, to_codes
from snipdedup.parallel import ordered_map

if TYPE_CHECKING:
    from snipdedup.encoder.network import Encoder

LEARNED = "float32 1"  # what such a code is, as `projection.ARITHMETIC` for others


@dataclass(frozen=True)
class Learned(Projection):
    """How rows become codes by an encoder: descriptors, rotated, scaled, and rounded to int8.

    Attributes
    ----------
    matrix : (dim, dim) float32
        A rotation, which makes all coordinates alike in size.
    residual : (dim,) float32
        Zeros.
    scale : float
    unit : float
        1.
    encoder : Encoder
    path : Path
        Its folder.
    lowest : float
        Product of two codes from which their rows may be a pair.
    """

    encoder: Encoder
    path: Path
    lowest: float = 0.0

    @property
    def length(self) -> float:
        """What the norm of a descriptor is."""
        return 1.0

    def encode_directions(self, rows: Directions) -> tuple[np.ndarray, np.ndarray]:
        """See `Projection.encode_directions`; rows that cannot be compared become zeros."""
        import torch

        with torch.inference_mode():
            unit = (rows.values * rows.factor[:, None]).to(self.encoder.device)
            found = self.encoder.network(unit, self.encoder.output).cpu()
            turned = found @ torch.from_numpy(self.matrix)
            turned[torch.from_numpy(rows.bad)] = 0
            return to_codes(turned, self.scale)

    def limit(self, threshold: float) -> float:
        """Return the product that was learnt, whatever the threshold: the one it was learnt at."""
        del threshold
        return self.lowest

    def distance(self, threshold: float) -> float:
        """Return the largest distance of the codes of two rows that may be a pair."""
        del threshold
        return float(np.sqrt(max(0.0, 2 * (self.norm**2 - self.lowest))))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the parts as arrays, to be saved."""
        learnt = {"encoder": np.array(str(self.path)), "lowest": np.array(self.lowest)}
        return {**super().arrays(), **learnt, "arithmetic": np.array(LEARNED)}

    @classmethod
    def of(cls, path: Path, seed: int, device: str) -> Learned:
        """Return the codes of a finished encoder, without what pairs must tell."""
        from snipdedup.encoder.network import Encoder

        encoder = Encoder.load(path, device)
        rotation = random_rotation(encoder.dim, seed).astype(np.float32)
        # a rotated unit vector has coordinates of about dim^-1/2; six times that is hardly passed
        scale = PEAK / min(1.0, 6 * encoder.dim**-0.5)
        nothing = np.zeros(encoder.dim, np.float32)
        return cls(rotation, nothing, scale, 1.0, encoder, path.resolve())


def learn_codes(codes: Learned, sample: np.ndarray, pairs: Edges, asked: Asked) -> Learned:
    """Return the codes with the product that joins the wanted share of rows with their groups.

    As for τ (`lists.calibrate_tau`): the forest of a sample's pairs that asks for the least, each
    pair of two rows for as many as it stands for; and rows of the sample moved as pairs lie, some
    of them by the largest distance of a pair.

    Parameters
    ----------
    codes : Learned
    sample : (n, d)
        Distinct rows.
    pairs : Edges
        True pairs among them, as places.
    asked : Asked
    """
    if not len(pairs.a) or asked.recall >= 1:  # nothing to learn from: nothing is ruled out
        return dataclasses.replace(codes, lowest=-(codes.norm**2))
    z = encode_blocks(codes, sample, asked.threads)
    product = pair_products(z, pairs.a, pairs.b)
    places = easiest(pairs, -product, asked.threshold)
    forest = pairs.where(places)
    weight = edge_weights(forest, asked.sampled)
    groups = counted(weight, asked.sampled)
    lowest = -weighted_quantile(-product[places], weight, asked.sure(groups))
    if asked.few(groups):
        unit = unit_rows(sample)
        drawn, times = drawn_pairs(forest, weight, len(unit), asked)
        step = (unit[drawn.b] - unit[drawn.a]) * times[:, None]
        moved = encode_blocks(codes, unit + step, asked.threads)
        found = np.quantile(row_products(z, moved), 1 - asked.cautious, method="lower")
        lowest = min(lowest, float(found))
    return dataclasses.replace(codes, lowest=lowest)


def encode_blocks(codes: Projection, rows: np.ndarray, threads: int) -> np.ndarray:
    """Return the codes of rows, (n, w) int8."""
    blocks = [rows[start:stop] for start, stop in plan_blocks(len(rows), BLOCK)]
    found = [found for found, _ in ordered_map(codes.encode, blocks, threads)]
    return np.concatenate([np.empty((0, codes.width), np.int8), *found])
