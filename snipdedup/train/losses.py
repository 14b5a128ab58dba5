"""What training makes small: similarities that differ from the features', or badly rebuilt rows."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from snipdedup.train.encoder import Network

SELF = -1e4  # logit of a row with itself: no weight after a softmax, and no NaN as -inf gives
INNER_SD = 0.3  # of the first layer's weights; inputs have norm 1 (keyframes: 1 loses .02 recall)


def start_network(
    directions: torch.Tensor, hidden: int, generator: torch.Generator, head: int = 0
) -> Network:
    """Return a network that is PCA so far, with an MLP ready to learn."""
    dim, dim_in = directions.shape
    network = Network(dim_in, hidden, dim, head)
    with torch.no_grad():
        for linear in (network.linear, *((network.head_linear,) if head else ())):
            linear.weight.copy_(directions[: len(linear.weight)])
            linear.bias.zero_()
        network.inner.weight.normal_(std=INNER_SD, generator=generator)
        network.inner.bias.zero_()
    return network


class SnipLoss(nn.Module):
    """How far the descriptors' similarities are from the features', within a batch.

    Each row's similarities to the others, over a temperature, become a distribution; the loss is
    the Kullback-Leibler divergence of the descriptors' from the features', in nats a row.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the loss of descriptors ``y`` of unit rows ``x``."""
        with torch.no_grad():
            teacher = self.logits(x)
        return functional.kl_div(self.logits(y), teacher, reduction="batchmean", log_target=True)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities of each row's neighbours, itself excluded."""
        similarity = x @ x.T / self.temperature
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        return functional.log_softmax(similarity.masked_fill(itself, SELF), dim=1)


class MseLoss(nn.Module):
    """How badly the features are rebuilt from descriptors, by a decoder that learns as well.

    The decoder mirrors the network: a linear path that starts as PCA's, plus a GELU MLP whose
    last layer starts at zero.
    """

    def __init__(self, directions: torch.Tensor, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.decoder = start_network(directions.T, hidden, generator)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean squared distance of unit rows ``x`` and what ``y`` gives back."""
        return (x - self.decoder(y)).square().sum(dim=1).mean()


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
