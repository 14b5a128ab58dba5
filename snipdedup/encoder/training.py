"""``snip train``: an encoder whose descriptors keep the neighbours that features have.

`fit` is the whole of it: data, model, loss, loop. The model and its losses are in `network`, the
choice of rows in `batches`.
"""

from __future__ import annotations

import copy
import io
import math
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from snipdedup import config, progress
from snipdedup.encoder.batches import LEAST_ROWS, Batches
from snipdedup.encoder.losses import fitting_temperature, training_loss
from snipdedup.encoder.network import (
    BROKEN,
    Encoder,
    Network,
    pca_network,
    principal_directions,
    rotate_for_codes,
)
from snipdedup.errors import SnipError, WriteError
from snipdedup.features.cosine import unit_rows
from snipdedup.features.shards import (
    Features,
    open_features,
    plan_blocks,
    request_of,
    source_name,
)
from snipdedup.parallel import cores, library_threads, pick_device
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.out_folder import put_in_place, read_manifest

K = 10  # neighbours whose recall is reported
QUERIES = 2048  # held-out rows whose neighbours are looked up among all held-out rows
EVALUATIONS = 20  # a run, at the most
PATIENCE = 5  # evaluations without a better validation loss before it stops
BETTER = 1e-3  # share of the loss that counts as better
WARMUP = 20  # steps, and the least between evaluations
CLIP = 1.0  # norm of the gradient
WEIGHT_DECAY = 0.01
HEADS, HEAD_LEAST = (2, 4), 4  # so many times less wide than --dim, for small codes; the least
ROTATION_ROWS = 10_000  # that the rotation at the end is fitted to
CHECKPOINT, CHECKPOINT_S = "checkpoint.pt", 30.0  # in the work folder; seconds between two
# Settings that say how training is carried out, not what comes out of it.
NOT_IN_REQUEST = {"features", "text_features", "out", "overwrite", "device", "threads"}
Loss = Callable[[Network, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class History:
    """How a training run went.

    A point of the curve has ``step``, ``validation_loss``, ``recall`` (of the 10 nearest held-out
    rows by exact cosine) and ``loss`` (mean since the point before). The first is PCA.
    """

    rows: int  # distinct ones in the first subset
    held_out: int
    batch: int  # rows a step, after any shrinking
    temperature: float | None = None  # of the snip loss, as given or as fitted to the first rows
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
        losses = [point["validation_loss"] for point in self.curve]
        earlier, last = losses[:-PATIENCE], losses[-PATIENCE:]
        return bool(earlier) and min(last) > min(earlier) * (1 - BETTER)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values for the manifest."""
        found = {"steps": self.steps, "best_step": self.best["step"], "recall": self.best["recall"]}
        return {**asdict(self), **found, "pca_recall": self.curve[0]["recall"]}


@locks.released()
def run(options: config.Train) -> Encoder:
    """Train an encoder and write it; a stopped run goes on from its checkpoint."""
    started = time.monotonic()
    features, texts = open_pair(options)
    out = Path(options.out).expanduser()
    out_folder.refuse_output_inside(out, [*features.inputs(), *(texts.inputs() if texts else [])])
    request = {
        **{k: v for k, v in options.as_dict().items() if k not in NOT_IN_REQUEST},
        **request_of(features),
        **({f"text_{k}": v for k, v in request_of(texts).items()} if texts else {}),
    }
    if out_folder.claim(out, "encoder", request, overwrite=options.overwrite) == "done":
        encoder, again = Encoder.load(out, options.device), "--overwrite makes it anew"
        encoder.summary = f"{out} is finished already with these settings; {again}"
        return encoder
    with out_folder.released_on(SnipError, out, WriteError):
        encoder, history = fit(features, texts, options, out / locks.WORK / CHECKPOINT)
        for source in filter(None, (features, texts)):
            source.refuse_changed()
    seconds = time.monotonic() - started
    paths = {
        "features": source_name(options.features),
        "text_features": source_name(options.text_features),
    }
    body = {
        "command": "train",
        "settings": {**options.as_dict(), **paths},
        "request": request,
        "shards": features.describe(),
        "history": history.as_dict(),
        "threads": cores(options.threads),
        "seconds": {"all": round(seconds, 3)},
    }
    files = out / locks.WORK / out_folder.FILES
    encoder.save(files, body)
    put_in_place(out, files)
    encoder.manifest = read_manifest(out, "encoder")
    encoder.summary = train_summary(history, encoder, features.rows, options, seconds)
    return encoder


def open_pair(options: config.Train) -> tuple[Features, Features | None]:
    """Open features, and texts beside them; refuse what no encoder can be trained on."""
    features = open_features(options.features, **options.some("parts", "array", "column"))
    if options.dim > features.dim:
        raise SnipError(
            f"--dim {options.dim}: a descriptor cannot be wider than the features, which are "
            f"{features.dim} wide; choose --dim {features.dim} or less"
        )
    if features.rows < LEAST_ROWS:
        raise SnipError(
            f"{features.place(0)[0]}: expected at least {LEAST_ROWS} rows to train on, found "
            f"{features.rows}; an encoder of the same model's features, trained on more, will do"
        )
    texts = options.text_features
    return features, None if texts is None else open_texts(texts, features)


def open_texts(source: Any, features: Features) -> Features:
    """Open text features; they must have the rows and the width of the image features."""
    texts = open_features(source)
    if (texts.rows, texts.dim) != (features.rows, features.dim):
        raise SnipError(
            f"{texts.place(0)[0]}: --text_features are {texts.rows:,} rows {texts.dim} wide, "
            f"FEATURES are {features.rows:,} rows {features.dim} wide; give the text features of "
            "the same items and the same model"
        )
    return texts


def train_summary(
    history: History, encoder: Encoder, rows: int, options: config.Train, seconds: float
) -> str:
    """Return what the command prints."""
    best, start = history.best, history.curve[0]
    lines = [
        f"{options.loss} loss, {encoder.dim_in} wide to {encoder.dim}: {history.steps:,} steps of "
        f"{history.batch:,} rows in {seconds:.1f} s",
        f"validation recall@{K} {best['recall']:.3f}, PCA's {start['recall']:.3f} "
        f"({history.held_out:,} of {rows:,} rows, held out)",
    ]
    if history.batch < options.batch:
        lines.append(
            f"few rows: only {history.rows:,} distinct ones to train on, so batches shrank from "
            f"{options.batch:,} to {history.batch:,}"
        )
    if history.steps < options.steps:
        lines.append(f"stopped early: no better since step {best['step']:,}")
    return "\n".join([*lines, f"encoder in {options.out}"])


def train_encoder(features: Any, **settings: Any) -> tuple[Encoder, History]:
    """Train an encoder on features, arrays or paths, without a folder to write.

    ``settings`` are those of ``snip train`` but ``out``: ``loss``, ``dim``, ``steps``, ``seed``...
    """
    options = config.Train(features=features, out="", **settings)
    return fit(*open_pair(options), options)


def fit(
    features: Features, texts: Features | None, options: config.Train,
    checkpoint: Path | None = None,
) -> tuple[Encoder, History]:  # fmt: skip
    """Train on opened features; ``checkpoint`` is where a stopped run goes on from."""
    device = pick_device(options.device)
    with library_threads(cores(options.threads)):  # sums depend on their number
        # Data: distinct rows in memory, some of them held out.
        batches = Batches(
            features, texts, subset_rows=options.subset_rows,
            validation_rows=options.validation_rows, batch=options.batch, seed=options.seed,
        )  # fmt: skip
        rows = batches.rows
        rotation_rows = rows.images[:ROTATION_ROWS].copy()

        # Model: PCA at first, then what an MLP adds to it.
        directions = principal_directions(rows.images, options.dim, rows.texts)
        heads = [options.dim // part for part in HEADS if options.dim // part >= HEAD_LEAST]
        network = pca_network(directions, options.hidden, heads, options.seed).to(device)

        # Loss: the temperature is the one given, or fitted to a batch.
        temperature = options.temperature if options.loss == "snip" else None
        if options.loss == "snip" and temperature is None:
            # An image with several captions is several rows, and would be its own neighbour.
            images = np.unique(rows.images[: batches.batch], axis=0)
            temperature = fitting_temperature(torch.from_numpy(unit_rows(images)).to(device))
        loss_of = partial(
            training_loss, temperature=temperature, text_temperature=options.text_temperature
        )

        # The loop keeps the best weights; a rotation lets short codes keep more of them.
        history = History(
            len(rows.images), len(batches.held_out.images), batches.batch, temperature
        )
        train_loop(
            network, batches, loss_of, history, steps=options.steps,
            peak_rate=options.learning_rate, checkpoint=checkpoint,
        )  # fmt: skip
        rotate_for_codes(network, rotation_rows)
    return Encoder(network, device), history


def train_loop(
    network: Network, batches: Batches, loss_of: Loss, history: History, *,
    steps: int, peak_rate: float, checkpoint: Path | None,
) -> None:  # fmt: skip
    """Train until ``steps`` or a stall; the network is left with the best validation loss."""
    device = str(network.inner.weight.device)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    validation = Validation(*batches.held_out.tensors(device), loss_of, batches.batch)
    best, losses, done = copy.deepcopy(network.state_dict()), [], 0
    state = None if checkpoint is None else load_checkpoint(checkpoint, device)
    if state is not None:
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        best, losses, done = state["best"], state["losses"], state["done"]
        history.curve.extend(state["curve"])
    else:
        history.curve.append(validation.point(network, 0, losses))
    every, saved = max(WARMUP, steps // EVALUATIONS), time.monotonic()
    with progress.bar(steps, "training", "steps") as bar:
        bar.update(done)
        while done < steps and not history.stalled():
            x, t = batches.of_step(done + 1).tensors(device)
            optimiser.param_groups[0]["lr"] = learning_rate(done + 1, steps, peak_rate)
            loss = loss_of(network, x, t)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimiser.step()
            losses.append(float(loss.detach()))
            done += 1
            bar.update(1)
            if done % every == 0 or done == steps:
                point = validation.point(network, done, losses)
                history.curve.append(point)
                losses = []
                bar.set_postfix_str(f"loss {point['loss']:.3f}, recall@{K} {point['recall']:.3f}")
                if history.best is point:
                    best = copy.deepcopy(network.state_dict())
            elif time.monotonic() - saved < CHECKPOINT_S:
                continue
            if checkpoint is not None:
                save_checkpoint(
                    checkpoint, done=done, network=network.state_dict(), best=best,
                    optimiser=optimiser.state_dict(), curve=history.curve, losses=losses,
                )  # fmt: skip
            saved = time.monotonic()
    network.load_state_dict(best)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step, counted from 1: a short rise, then half a cosine down to 0."""
    rise = min(1.0, step / min(WARMUP, steps))
    return peak * rise * (1 + math.cos(math.pi * (step - 1) / steps)) / 2


class Validation:
    """Held-out unit rows, with texts if there are any, and which are nearest by exact cosine."""

    def __init__(self, x: torch.Tensor, t: torch.Tensor | None, loss_of: Loss, batch: int) -> None:
        self.x, self.t, self.loss_of, self.batch = x, t, loss_of, batch
        self.nearest = nearest_others(x)

    def recall(self, y: torch.Tensor) -> float:
        """Return the share of the true nearest rows that descriptors find."""
        found = nearest_others(y)
        hits = (found[:, :, None] == self.nearest[:, None, :]).any(dim=2)
        return float(hits.float().mean())

    @torch.no_grad()
    def point(self, network: Network, step: int, losses: list[float]) -> dict[str, float]:
        """Return a point of the curve, ``losses`` being those of the steps since the last one."""
        total, x, t = 0.0, self.x, self.t
        for a, b in plan_blocks(len(x), self.batch):
            total += float(self.loss_of(network, x[a:b], None if t is None else t[a:b])) * (b - a)
        if not math.isfinite(total):
            raise SnipError(f"the loss is not a number at step {step}; lower --learning_rate")
        point = {"step": step, "validation_loss": total / len(x)}
        point["recall"] = self.recall(network(x))
        return {**point, "loss": float(np.mean(losses))} if losses else point


def nearest_others(x: torch.Tensor) -> torch.Tensor:
    """Return the `K` nearest other rows of the first `QUERIES` unit rows, (q, K) int64."""
    similarity = x[:QUERIES] @ x.T
    similarity.fill_diagonal_(-math.inf)
    return similarity.topk(min(K, len(x) - 1), dim=1).indices


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write all that the next step depends on."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic.replacing(path) as part:
        part.write_bytes(buffer.getvalue())


def load_checkpoint(path: Path, device: str) -> dict[str, Any] | None:
    """Return what `save_checkpoint` wrote; None where there is no such file, or a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at checksums
            if archive.testzip() is not None:
                return None
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, zipfile.BadZipFile, *BROKEN):
        return None
