"""Where training starts, and what is done at its end: PCA directions, and OPQ rotations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from snipdedup.encoder.network import Network
from snipdedup.features.cosine import unit_rows
from snipdedup.features.shards import plan_blocks

READ_ROWS = 65_536  # rows whose products are added up at a time
INNER_SD = 0.3  # of the first layer's weights; inputs have norm 1 (keyframes: 1 loses .02 recall)
ROTATION_LEAST = 10_000  # rows; fewer do not fill the codebooks of 256 that OPQ fits
ROTATION_PARTS, ROTATION_LEAST_WIDTH = 16, 4  # bytes of the code it is made for, and dimensions
ROTATION_ROUNDS, ROTATION_START = 5, 10  # more leave errors as they are, and take a minute


def principal_directions(
    rows: np.ndarray, dim: int, texts: np.ndarray | None = None
) -> torch.Tensor:
    """Return the orthonormal directions that hold most of the unit rows, (dim, d) float32.

    About the origin, not the mean: cosine is measured from there (recall@10 on keyframes .79,
    against .73 about the mean). With texts, of both together.
    """
    moments = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in (rows,) if texts is None else (rows, texts):
        for start, stop in plan_blocks(len(part), READ_ROWS):
            x = torch.from_numpy(unit_rows(part[start:stop]))
            moments += (x.T @ x).double()
    vectors = torch.linalg.eigh(moments)[1]
    return vectors.flip(1)[:, :dim].T.float().contiguous()


def pca_network(
    directions: torch.Tensor, hidden: int, heads: Sequence[int] = (), seed: int = 0
) -> Network:
    """Return a network whose outputs are PCA, (dim, d) ``directions``, with an MLP to be learnt."""
    dim, dim_in = directions.shape
    network = Network(dim_in, hidden, dim, heads)
    with torch.no_grad():
        for output in network.outputs:
            output.linear.weight.copy_(directions[: output.width])
            output.linear.bias.zero_()
        generator = torch.Generator().manual_seed(seed)
        network.inner.weight.normal_(std=INNER_SD, generator=generator)
        network.inner.bias.zero_()
    return network


def rotate_for_codes(network: Network, rows: np.ndarray) -> None:
    """Fold into each output the rotation that product quantisation likes best (OPQ).

    It changes no distance and costs nothing later. Without enough rows to fit its codebooks the
    network stays as it is.
    """
    if len(rows) < ROTATION_LEAST:
        return
    x = torch.from_numpy(unit_rows(rows)).to(network.inner.weight.device)
    with torch.no_grad():
        descriptors = network.all_outputs(x)
    for output, y in zip(network.outputs, descriptors, strict=True):
        most = min(ROTATION_PARTS, max(output.width // ROTATION_LEAST_WIDTH, 1))
        parts = max(m for m in range(1, most + 1) if output.width % m == 0)
        if parts > 1:
            rotation = opq_rotation(y.cpu().numpy(), parts, ROTATION_ROUNDS, ROTATION_START)
            output.rotate(torch.from_numpy(rotation).to(y.device))


def opq_rotation(y: np.ndarray, m: int, rounds: int, start_rounds: int) -> np.ndarray:
    """Return the rotation that splits vectors best into ``m`` equal parts, (dim, dim) float32.

    Ge et al., Optimized Product Quantization, 2013, by faiss; ``start_rounds`` iterations of
    k-means before the first rotation.
    """
    import faiss

    dim = y.shape[1]
    matrix, codebooks = faiss.OPQMatrix(dim, m), faiss.ProductQuantizer(dim, m, 8)
    codebooks.cp.min_points_per_centroid = 1  # no warnings from C++; small sets are meant
    matrix.niter, matrix.niter_pq_0, matrix.pq = rounds, start_rounds, codebooks
    matrix.train(np.ascontiguousarray(y))
    return np.asarray(faiss.vector_to_array(matrix.A).reshape(dim, dim))
