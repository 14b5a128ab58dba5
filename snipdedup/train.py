"""Training: an encoder whose descriptors keep the neighbours that features have.

Rows are drawn from all shards into memory, a subset at a time; some are held out and only
reported on. The ``snip`` loss asks that a batch's similarities between descriptors, as a softmax,
be those between features; ``mse`` asks that features can be rebuilt from descriptors.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from snipdedup import progress, settings, store
from snipdedup.compute import cores, library_threads, pick_device
from snipdedup.cosine import unit_rows
from snipdedup.encoder import WEIGHTS, Encoder, Network
from snipdedup.errors import SnipError
from snipdedup.scan import refuse_bad, row_hashes
from snipdedup.shards import Features, open_features, plan_blocks, request_of

K = 10  # neighbours whose recall is reported
LEAST_ROWS = 64  # distinct rows to learn anything from
QUERIES = 2048  # held-out rows whose neighbours are looked up among all held-out rows
READ_ROWS = 65_536  # rows gathered at a time
SUBSET_PASSES = 4  # over rows in memory before others are drawn
EVALUATIONS = 20  # a run, at the most
PATIENCE = 5  # evaluations without a better validation loss before it stops
BETTER = 1e-3  # share of the loss that counts as better
INNER_SD = 0.3  # of the first layer's weights; inputs have norm 1 (keyframes: 1 loses .02 recall)
WARMUP = 20  # steps, and the least between evaluations
CLIP = 1.0  # norm of the gradient
WEIGHT_DECAY = 0.01
SELF = -1e4  # logit of a row with itself: no weight after a softmax, and no NaN as -inf gives
ROTATION_ROWS = 20_000  # that OPQ looks at
ROTATION_LEAST = 10_000  # fewer do not fill the codebooks of 256 it fits
ROTATION_PARTS = 16  # bytes of the code it is made for; others gain as well
ROTATION_ROUNDS = 20
# Settings that say how training is carried out, not what comes out of it.
HOW = {"features", "out", "overwrite", "device", "threads"}


@dataclass(frozen=True)
class History:
    """What a training run did.

    Attributes
    ----------
    rows, held_out : int
        Distinct rows in the first subset, and rows held out.
    batch : int
        Rows a step, after any shrinking.
    curve : list of dict
        ``step``, ``validation_loss``, ``recall`` (of the 10 nearest held-out rows, against exact
        cosine of the features) and ``loss`` (mean since the point before). The first point is
        the start: PCA of the same width.
    """

    rows: int
    held_out: int
    batch: int
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, float]:
        """The point with the lowest validation loss: these weights are kept."""
        return min(self.curve, key=lambda point: point["validation_loss"])

    @property
    def steps(self) -> int:
        """How far training went."""
        return int(self.curve[-1]["step"])

    def stalled(self) -> bool:
        """Tell whether the last points brought no better validation loss."""
        earlier, last = self.curve[:-PATIENCE], self.curve[-PATIENCE:]
        if not earlier:
            return False
        lowest = min(point["validation_loss"] for point in earlier)
        return all(point["validation_loss"] > lowest * (1 - BETTER) for point in last)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values for the manifest."""
        return {
            **asdict(self),
            "steps": self.steps,
            "best_step": self.best["step"],
            "recall": self.best["recall"],
            "pca_recall": self.curve[0]["recall"],
        }


def run(options: settings.Train) -> str:
    """Train an encoder and write it; return the summary."""
    started = time.monotonic()
    features = open_input(options)
    out = Path(options.out).expanduser()
    store.refuse_output_inside(out, features.inputs())
    kept = {k: v for k, v in options.as_dict().items() if k not in HOW}
    request = {**kept, **request_of(features)}
    if store.claim(out, "encoder", request, overwrite=options.overwrite, late=True) == "done":
        return f"{out} is finished already with these settings; --overwrite makes it anew"
    try:
        encoder, history = fit(features, options)
        seconds = time.monotonic() - started
        body = {
            "command": "train",
            "settings": options.as_dict(),
            "request": request,
            "shards": features.describe(),
            "history": history.as_dict(),
            "threads": cores(options.threads),
            "seconds": {"all": round(seconds, 3)},
        }
        store.clear(out, keep_work=True)
        encoder.save(out, body)
    finally:
        if not (out / store.MANIFEST).is_file():  # weights that nothing vouches for are no use
            (out / WEIGHTS).unlink(missing_ok=True)
        store.release(out)
    return summary(history, encoder, features, options, seconds)


def open_input(options: settings.Train) -> Features:
    """Open the features that the settings name."""
    return open_features(
        options.features, parts=options.parts, array=options.array, column=options.column
    )


def summary(
    history: History,
    encoder: Encoder,
    features: Features,
    options: settings.Train,
    seconds: float,
) -> str:
    """Say what was trained, on what, and how good it is."""
    best, start = history.best, history.curve[0]
    lines = [
        f"{options.loss} loss, {encoder.dim_in} wide to {encoder.dim}: {history.steps:,} steps of "
        f"{history.batch:,} rows in {seconds:.1f} s",
        f"validation recall@{K} {best['recall']:.3f}, PCA's {start['recall']:.3f} "
        f"({history.held_out:,} of {features.rows:,} rows, held out)",
    ]
    if history.batch < options.batch:
        lines.append(
            f"few rows: only {history.rows:,} distinct ones to train on, so batches shrank from "
            f"{options.batch:,} to {history.batch:,}"
        )
    if history.steps < options.steps:
        lines.append(f"stopped early: no better since step {best['step']:,}")
    return "\n".join([*lines, f"encoder in {options.out}"])


def train(features: Any, **given: Any) -> tuple[Encoder, History]:
    """Train an encoder on features.

    Parameters
    ----------
    features : (n, d) float array, path, or a sequence of either
        As `snipdedup.shards.open_features` takes them.
    **given
        Any setting of ``snip train`` but ``out``: ``loss``, ``dim``, ``steps``, ``seed``, ...

    Raises
    ------
    SnipError
        Before the first step, if there are too few rows, rows that cannot be compared, or a
        descriptor wider than the features.
    """
    options = settings.Train(features=features, out="", **given)
    return fit(open_input(options), options)


def fit(features: Features, options: settings.Train) -> tuple[Encoder, History]:
    """Train on opened features; the threads are fixed, since sums depend on their number."""
    check_shape(features, options.dim)
    device = pick_device(options.device)
    with library_threads(cores(options.threads)):
        training = Training(features, options, device)
        history = training.train()
        rotate(training.network, training.rows, options.seed)
    return Encoder(training.network, device), history


def check_shape(features: Features, dim: int) -> None:
    """Refuse what no encoder can be trained on, before any row is read."""
    if dim > features.dim:
        raise SnipError(
            f"--dim {dim}: a descriptor cannot be wider than the features, which are "
            f"{features.dim} wide; choose --dim {features.dim} or less"
        )
    if features.rows < LEAST_ROWS:
        raise SnipError(
            f"{features.place(0)[0]}: expected at least {LEAST_ROWS} rows to train on, found "
            f"{features.rows}; an encoder of the same model's features, trained on more, will do"
        )


class Training:
    """One run: rows in memory, the network, and what it is judged by."""

    def __init__(self, features: Features, options: settings.Train, device: str) -> None:
        self.features, self.options, self.device = features, options, device
        rows, hashes = self.draw(0, options.subset_rows + options.validation_rows)
        if len(rows) < LEAST_ROWS:
            raise SnipError(
                f"expected at least {LEAST_ROWS} distinct rows to train on, found {len(rows)} "
                f"among {features.rows:,}; train on more features"
            )
        held = min(options.validation_rows, len(rows) // 5)
        self.held_hashes, self.rows = hashes[:held], rows[held:]
        self.batch = min(options.batch, len(self.rows))
        self.validation = Validation(self.tensor(rows[:held]))
        generator = torch.Generator().manual_seed(options.seed)
        directions = principal_directions(self.rows, options.dim)
        self.network = start_network(directions, options.hidden, generator).to(device)
        self.loss = (
            SnipLoss(options.temperature)
            if options.loss == "snip"
            else MseLoss(directions, options.hidden, generator)
        ).to(device)
        self.optimiser = torch.optim.AdamW(
            [*self.network.parameters(), *self.loss.parameters()], weight_decay=WEIGHT_DECAY
        )

    def draw(self, number: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """Return random distinct rows and their hashes; the same ones for the same number."""
        rng = np.random.default_rng([self.options.seed, number])
        wanted = min(wanted, self.features.rows)
        picked = rng.choice(self.features.rows, wanted, replace=False, shuffle=False)
        rows, hashes = load_distinct(self.features, np.sort(picked))
        order = rng.permutation(len(rows))
        return rows[order], hashes[order]

    def tensor(self, rows: np.ndarray) -> torch.Tensor:
        """Return unit rows on the device."""
        return torch.from_numpy(unit_rows(rows)).to(self.device)

    def batches(self) -> Iterator[torch.Tensor]:
        """Yield batches without end; other rows are loaded where not all fit into memory."""
        options = self.options
        whole = self.features.rows <= options.subset_rows + options.validation_rows
        rng = np.random.default_rng(options.seed)
        for number in itertools.count(1):
            for _ in range(SUBSET_PASSES):
                order = rng.permutation(len(self.rows))
                for start in range(0, max(len(order) - self.batch, 0) + 1, self.batch):
                    yield self.tensor(self.rows[order[start : start + self.batch]])
            if not whole:
                rows, hashes = self.draw(number, options.subset_rows)
                self.rows = rows[~np.isin(hashes, self.held_hashes)]

    def train(self) -> History:
        """Train, keep the weights with the best validation loss, return what happened."""
        steps = self.options.steps
        every = max(WARMUP, steps // EVALUATIONS)
        history = History(len(self.rows), len(self.validation.rows), self.batch)
        history.curve.append(self.evaluate(0, []))
        weights, losses = copy.deepcopy(self.network.state_dict()), []
        with progress.bar(steps, "training", "steps") as bar:
            for step, x in enumerate(itertools.islice(self.batches(), steps), 1):
                losses.append(self.step(x, learning_rate(step, self.options)))
                bar.update(1)
                if step % every and step != steps:
                    continue
                point = self.evaluate(step, losses)
                history.curve.append(point)
                losses = []
                bar.set_postfix_str(f"loss {point['loss']:.3f}, recall@{K} {point['recall']:.3f}")
                if history.best is point:
                    weights = copy.deepcopy(self.network.state_dict())
                if history.stalled():
                    break
        self.network.load_state_dict(weights)
        return history

    def step(self, x: torch.Tensor, rate: float) -> float:
        """Take one step of AdamW on a batch; return its loss."""
        group = self.optimiser.param_groups[0]
        group["lr"] = rate
        loss = self.loss(x, self.network(x))
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(group["params"], CLIP)
        self.optimiser.step()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self, step: int, losses: list[float]) -> dict[str, float]:
        """Return a point of the curve: how the network does on the held-out rows.

        Raises
        ------
        SnipError
            If the loss is no longer a number.
        """
        held = self.validation.rows
        y = self.network(held)
        spans = plan_blocks(len(held), self.batch)
        parts = [float(self.loss(held[a:b], y[a:b])) * (b - a) for a, b in spans]
        point = {"step": step, "validation_loss": sum(parts) / len(held)}
        if not math.isfinite(point["validation_loss"]):
            raise SnipError(
                f"the loss is not a number at step {step}; lower --learning_rate "
                f"({self.options.learning_rate:g})"
            )
        point["recall"] = self.validation.recall(y)
        return {**point, "loss": float(np.mean(losses))} if losses else point


def load_distinct(features: Features, picked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Load rows, each distinct one once.

    Copies would be drawn more often, and be each other's only neighbour.

    Parameters
    ----------
    features : Features
    picked : (n,) int64
        Global rows, ascending.

    Returns
    -------
    (m, d) float16 as stored, or float32 of norm 1
    (m,) uint64, their hashes

    Raises
    ------
    SnipError
        If a row cannot be compared: file and row.
    """
    parts, hashes = [], []
    for start, stop in plan_blocks(len(picked), READ_ROWS):
        rows = features.gather(picked[start:stop])
        refuse_bad(features, picked[start:stop], rows)
        hashes.append(row_hashes(rows))
        # Half the memory as float16; wider types are scaled first, so that none overflows.
        parts.append(rows if rows.dtype == np.float16 else unit_rows(rows))
    keys = np.concatenate(hashes)
    first = np.sort(np.unique(keys, return_index=True)[1])
    return np.concatenate(parts)[first], keys[first]


def principal_directions(rows: np.ndarray, dim: int) -> torch.Tensor:
    """Return the orthonormal directions that hold most of the unit rows, (dim, d) float32.

    About the origin, not the mean: cosine is measured from there (recall@10 on keyframes .79,
    against .73 about the mean).
    """
    moments = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for start, stop in plan_blocks(len(rows), READ_ROWS):
        x = torch.from_numpy(unit_rows(rows[start:stop]))
        moments += (x.T @ x).double()
    vectors = torch.linalg.eigh(moments)[1]
    return vectors.flip(1)[:, :dim].T.float().contiguous()


def start_network(directions: torch.Tensor, hidden: int, generator: torch.Generator) -> Network:
    """Return a network that is PCA so far, with an MLP ready to learn."""
    dim, dim_in = directions.shape
    network = Network(dim_in, hidden, dim)
    with torch.no_grad():
        network.linear.weight.copy_(directions)
        network.linear.bias.zero_()
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


class Validation:
    """Held-out rows, and which of them are nearest to which by exact cosine."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.nearest = nearest(rows)

    def recall(self, y: torch.Tensor) -> float:
        """Return the share of the true nearest rows that descriptors find."""
        found = nearest(y)
        hits = (found[:, :, None] == self.nearest[:, None, :]).any(dim=2)
        return float(hits.float().mean())


def nearest(x: torch.Tensor) -> torch.Tensor:
    """Return the `K` nearest other rows of the first `QUERIES` unit rows, (q, K) int64."""
    similarity = x[:QUERIES] @ x.T
    similarity.fill_diagonal_(-math.inf)
    return similarity.topk(min(K, len(x) - 1), dim=1).indices


def learning_rate(step: int, options: settings.Train) -> float:
    """Return the rate of a step, counted from 1: a short rise, then half a cosine down to 0."""
    rise = min(1.0, step / min(WARMUP, options.steps))
    return options.learning_rate * rise * (1 + math.cos(math.pi * (step - 1) / options.steps)) / 2


def rotate(network: Network, rows: np.ndarray, seed: int) -> None:
    """Fold in the rotation of descriptors that product quantisation likes best (OPQ).

    It changes no distance and costs nothing later (Ge et al., Optimized Product Quantization,
    2013). Without enough rows to fit its codebooks the network stays as it is.
    """
    import faiss

    dim = network.linear.out_features
    parts = max(m for m in range(1, ROTATION_PARTS + 1) if dim % m == 0)
    if len(rows) < ROTATION_LEAST or parts == 1:
        return
    picked = np.random.default_rng(seed).choice(len(rows), min(ROTATION_ROWS, len(rows)), False)
    device = network.linear.weight.device
    with torch.no_grad():
        y = network(torch.from_numpy(unit_rows(rows[np.sort(picked)])).to(device))
    opq = faiss.OPQMatrix(dim, parts)
    opq.niter = ROTATION_ROUNDS
    opq.train(np.ascontiguousarray(y.cpu().numpy()))
    rotation = faiss.vector_to_array(opq.A).reshape(dim, dim)
    network.rotate(torch.from_numpy(rotation).to(device))
