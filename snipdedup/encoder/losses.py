"""What training makes small: similarities that differ from the features'."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from snipdedup.encoder.network import Network

SELF = -1e4  # logit of a row with itself: no weight after a softmax, and no NaN as -inf gives
NEIGHBOURS = 10.0  # rows over which a row's softmax spreads, unless a temperature is given
TEMPERATURES = (1e-3, 1.0)  # where the one that does so is looked for
INNER_SD = 0.3  # of the first layer's weights; inputs have norm 1 (keyframes: 1 loses .02 recall)


def start_network(
    directions: torch.Tensor, hidden: int, generator: torch.Generator, heads: Sequence[int] = ()
) -> Network:
    """Return a network that is PCA so far, with an MLP ready to learn."""
    dim, dim_in = directions.shape
    network = Network(dim_in, hidden, dim, heads)
    with torch.no_grad():
        for output in network.outputs:
            output.linear.weight.copy_(directions[: output.width])
            output.linear.bias.zero_()
        network.inner.weight.normal_(std=INNER_SD, generator=generator)
        network.inner.bias.zero_()
    return network


def without_self(similarity: torch.Tensor) -> torch.Tensor:
    """Return the logits of rows with one another, each row itself excluded."""
    itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    return similarity.masked_fill(itself, SELF)


@torch.no_grad()
def fitting_temperature(x: torch.Tensor, neighbours: float = NEIGHBOURS) -> float:
    """Return the temperature at which the rows' softmaxes spread over so many others.

    Cosines crowd more in one model's space than in another's. The spread is the perplexity, e to
    the mean entropy, as in t-SNE (van der Maaten and Hinton, 2008, section 2).

    Parameters
    ----------
    x : (n, d) float tensor of unit rows
    neighbours : float

    Returns
    -------
    float
        Within `TEMPERATURES`, to three digits: what sums round does not show.
    """
    similarity = without_self(x @ x.T)
    low, high = TEMPERATURES
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        teacher = functional.softmax(similarity / middle, dim=1)
        entropy = -float(torch.xlogy(teacher, teacher).sum(dim=1).mean())
        low, high = (middle, high) if entropy < math.log(neighbours) else (low, middle)
    return float(f"{math.sqrt(low * high):.3g}")


class SnipLoss(nn.Module):
    """How far the descriptors' similarities are from the features', within a batch.

    Each row's similarities to the others, over a temperature, become a distribution; the loss is
    the Kullback-Leibler divergence of the descriptors' from the features', in nats a row.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, x: torch.Tensor, *descriptors: torch.Tensor) -> torch.Tensor:
        """Return the loss of descriptors of unit rows ``x``, summed over the kinds given."""
        with torch.no_grad():
            teacher = functional.softmax(self.logits(x), dim=1)
            known = torch.xlogy(teacher, teacher).sum(dim=1)  # minus the entropy
        total = x.new_zeros(len(x))
        for y in descriptors:
            logits = self.logits(y)  # log-probabilities are these less one number a row
            total = total + known + logits.logsumexp(dim=1) - (teacher * logits).sum(dim=1)
        return total.mean()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return similarities over the temperature, each row itself excluded."""
        return without_self(x @ x.T / self.temperature)


class MseLoss(nn.Module):
    """How far the descriptors' similarities are from the features', as squared errors.

    The same similarities as in `SnipLoss`, near and far pairs alike. What rebuilds features by a
    decoder instead loses neighbours as it learns (docs/internals/codes.md).
    """

    def forward(self, x: torch.Tensor, *descriptors: torch.Tensor) -> torch.Tensor:
        """Return the loss of descriptors of unit rows ``x``: a sum over kinds and a row's pairs."""
        similarity = x @ x.T
        total = x.new_zeros(len(x))
        for y in descriptors:
            total = total + (y @ y.T - similarity).square().sum(dim=1)
        return total.mean()


class TextLoss(nn.Module):
    """How far similarities between images and texts are from those of the features.

    As `SnipLoss`, from each image to all texts of the batch and from each text to all images; a
    row's own partner counts like any other.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, u: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of descriptors ``y`` and ``u`` of unit images ``x`` and texts ``t``."""
        with torch.no_grad():
            teacher = x @ t.T / self.temperature
        student = y @ u.T / self.temperature
        return (divergence(student, teacher) + divergence(student.T, teacher.T)) / 2


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of softmaxes over rows, in nats a row."""
    return functional.kl_div(
        functional.log_softmax(student, dim=1),
        functional.log_softmax(teacher, dim=1),
        reduction="batchmean",
        log_target=True,
    )
