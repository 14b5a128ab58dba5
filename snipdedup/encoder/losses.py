"""What the encoder learns from: the ``snip`` loss with its temperature, and the ``mse`` loss.

Both compare the similarities of descriptors within a batch with those of the unit rows themselves.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.nn import functional

from snipdedup.encoder.network import Network

SELF = -1e4  # logit of a row with itself: no weight after a softmax, and no NaN as -inf gives
NEIGHBOURS = 10.0  # rows over which a row's softmax spreads, unless a temperature is given
TEMPERATURES = (1e-3, 1.0)  # where the one that does so is looked for


def training_loss(
    network: Network, x: torch.Tensor, t: torch.Tensor | None,
    temperature: float | None, text_temperature: float,
) -> torch.Tensor:  # fmt: skip
    """Return the loss of all outputs for unit rows ``x``, and for the texts ``t`` beside them.

    It is the ``snip`` loss at a temperature, the ``mse`` loss for None.
    """
    if t is not None and temperature is None:
        x, t = torch.cat([x, t]), None
    images = network.all_outputs(x)
    loss = mse_loss(x, *images) if temperature is None else snip_loss(temperature, x, *images)
    if t is not None:
        for y, u in zip(images, network.all_outputs(t), strict=True):
            loss = loss + text_loss(text_temperature, x, t, y, u)
    return loss


def snip_loss(temperature: float, x: torch.Tensor, *descriptors: torch.Tensor) -> torch.Tensor:
    """Return the divergence of descriptors' softmaxes from those of unit rows ``x``, nats a row.

    Logits are similarities within the batch over the temperature. The Kullback-Leibler divergence
    is summed over the kinds of descriptors.
    """
    with torch.no_grad():
        teacher = functional.softmax(without_self(x @ x.T / temperature), dim=1)
        negative_entropy = torch.xlogy(teacher, teacher).sum(dim=1)
    total = x.new_zeros(len(x))
    for y in descriptors:
        logits = without_self(y @ y.T / temperature)  # log-probabilities but for one number a row
        cross = (teacher * logits).sum(dim=1)
        total = total + negative_entropy + logits.logsumexp(dim=1) - cross
    return total.mean()


def without_self(similarity: torch.Tensor) -> torch.Tensor:
    """Return the logits of rows with one another, each row itself excluded."""
    itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    return similarity.masked_fill(itself, SELF)


def mse_loss(x: torch.Tensor, *descriptors: torch.Tensor) -> torch.Tensor:
    """Return the squared errors of similarities to unit rows, summed over kinds and a row's pairs.

    A loss that rebuilds the features by a decoder loses neighbours as it learns
    (docs/internals/codes.md).
    """
    similarity = x @ x.T
    total = x.new_zeros(len(x))
    for y in descriptors:
        total = total + (y @ y.T - similarity).square().sum(dim=1)
    return total.mean()


def text_loss(
    temperature: float, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    """Return the loss of descriptors ``y`` and ``u`` of unit images ``x`` and texts ``t``.

    As `snip_loss`, from images to all texts and from texts to all images, own partners included.
    """
    with torch.no_grad():
        teacher = x @ t.T / temperature
    student = y @ u.T / temperature
    divergence = partial(functional.kl_div, reduction="batchmean", log_target=True)
    forth = divergence(student.log_softmax(dim=1), teacher.log_softmax(dim=1))
    back = divergence(student.T.log_softmax(dim=1), teacher.T.log_softmax(dim=1))
    return (forth + back) / 2


@torch.no_grad()
def fitting_temperature(x: torch.Tensor, neighbours: float = NEIGHBOURS) -> float:
    """Return the temperature at which softmaxes of unit rows spread over so many others.

    The spread is the perplexity, e to the mean entropy, as in t-SNE (van der Maaten and Hinton,
    2008, section 2). Three digits hide how sums round.
    """
    similarity = without_self(x @ x.T)
    low, high = TEMPERATURES
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        teacher = functional.softmax(similarity / middle, dim=1)
        entropy = -float(torch.xlogy(teacher, teacher).sum(dim=1).mean())
        low, high = (middle, high) if entropy < math.log(neighbours) else (low, middle)
    return float(f"{math.sqrt(low * high):.3g}")
