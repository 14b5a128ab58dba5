"""The losses of training: how far descriptors' similarities are from those of the features.

``snip`` (the default) compares each row's similarities within a batch as softmax distributions,
``mse`` as numbers. The temperature of the softmax is given, or fitted by `fitting_temperature`.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from snipdedup.encoder.network import Network

SELF = -1e4  # logit of a row with itself: no weight after a softmax, and no NaN as -inf gives
NEIGHBOURS = 10.0  # rows over which a row's softmax spreads, unless a temperature is given
TEMPERATURES = (1e-3, 1.0)  # where the one that does so is looked for


class SnipLoss(nn.Module):
    """Kullback-Leibler divergence of the descriptors' softmaxes from the features', nats a row.

    A row's similarities to the other rows of the batch, over the temperature, are its logits.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, x: torch.Tensor, *descriptors: torch.Tensor) -> torch.Tensor:
        """Return the loss of descriptors of unit rows ``x``, summed over the kinds given."""
        with torch.no_grad():
            teacher = functional.softmax(self.logits(x), dim=1)
            negative_entropy = torch.xlogy(teacher, teacher).sum(dim=1)
        total = x.new_zeros(len(x))
        for y in descriptors:
            logits = self.logits(y)  # log-probabilities are these less one number a row
            cross = (teacher * logits).sum(dim=1)
            total = total + negative_entropy + logits.logsumexp(dim=1) - cross
        return total.mean()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return similarities over the temperature, each row itself excluded."""
        return without_self(x @ x.T / self.temperature)


class MseLoss(nn.Module):
    """Squared errors of similarities within a batch, near and far pairs alike.

    A loss that rebuilds the features by a decoder loses neighbours as it learns
    (docs/internals/codes.md).
    """

    def forward(self, x: torch.Tensor, *descriptors: torch.Tensor) -> torch.Tensor:
        """Return the loss of descriptors of unit rows ``x``: a sum over kinds and a row's pairs."""
        similarity = x @ x.T
        total = x.new_zeros(len(x))
        for y in descriptors:
            total = total + (y @ y.T - similarity).square().sum(dim=1)
        return total.mean()


class TextLoss(nn.Module):
    """As `SnipLoss`, from each image to all texts of the batch and from each text to all images.

    A row's own partner counts like any other.
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


class TrainingLoss(nn.Module):
    """What a training step makes small: the loss of all outputs, and of texts where given.

    ``temperature`` is of the ``snip`` loss; None means the ``mse`` loss.
    """

    def __init__(self, temperature: float | None, text_temperature: float) -> None:
        super().__init__()
        self.images = MseLoss() if temperature is None else SnipLoss(temperature)
        self.texts = TextLoss(text_temperature)

    def forward(self, network: Network, x: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        """Return the loss of unit rows ``x`` and of the texts ``t`` that belong to them."""
        if t is not None and isinstance(self.images, MseLoss):
            x, t = torch.cat([x, t]), None
        images = network.all_outputs(x)
        loss = self.images(x, *images)
        if t is not None:
            for y, u in zip(images, network.all_outputs(t), strict=True):
                loss = loss + self.texts(x, t, y, u)
        return loss


def without_self(similarity: torch.Tensor) -> torch.Tensor:
    """Return the logits of rows with one another, each row itself excluded."""
    itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    return similarity.masked_fill(itself, SELF)


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of softmaxes over rows, in nats a row."""
    return functional.kl_div(
        functional.log_softmax(student, dim=1),
        functional.log_softmax(teacher, dim=1),
        reduction="batchmean",
        log_target=True,
    )


@torch.no_grad()
def fitting_temperature(x: torch.Tensor, neighbours: float = NEIGHBOURS) -> float:
    """Return the temperature at which softmaxes of unit rows spread over so many others.

    The cosines of one model's features lie closer together than those of another's. The spread is
    the perplexity, e to the mean entropy, as in t-SNE (van der Maaten and Hinton, 2008, section
    2). The result lies within `TEMPERATURES` and has three digits, which hide how sums round.
    """
    similarity = without_self(x @ x.T)
    low, high = TEMPERATURES
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        teacher = functional.softmax(similarity / middle, dim=1)
        entropy = -float(torch.xlogy(teacher, teacher).sum(dim=1).mean())
        low, high = (middle, high) if entropy < math.log(neighbours) else (low, middle)
    return float(f"{math.sqrt(low * high):.3g}")
