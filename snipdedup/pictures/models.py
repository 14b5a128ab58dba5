"""What makes features of pictures: the models that ``--model`` names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from snipdedup.errors import UsageError
from snipdedup.parallel import pick_device
from snipdedup.pictures.hashes import BITS, KEPT, LARGEST, SIDE, pdq_bits, phash_bits

if TYPE_CHECKING:
    from PIL import Image


class Hash(NamedTuple):
    """A perceptual hash, and the distance up to which two pictures are copies."""

    bits: Callable[[Image.Image], np.ndarray]
    size: int  # pixels of the shorter side that it needs
    distance: int
    source: str  # of the distance


HASHES = {
    "phash": Hash(phash_bits, 2 * SIDE, 31, "scripts/bench_pictures.py"),
    "pdq": Hash(pdq_bits, LARGEST, 31, "its authors' recommendation"),
}


class Model(Protocol):
    """What ``snip embed`` needs of a model."""

    name: str  # as given to --model, canonical
    dim: int  # width of a row
    threshold: float  # the cosine that is usual for it
    described: dict[str, Any]  # for the manifest
    batch: int  # pictures of a call of `encode`
    size: int  # pixels of the shorter side that `prepare` needs

    @property
    def prepare(self) -> Callable[[Image.Image], np.ndarray]:
        """What makes an upright RGB picture an array of one shape; it can be pickled."""
        ...

    def encode(self, prepared: np.ndarray) -> np.ndarray:
        """Return the features of (n, ...) prepared pictures: (n, dim) float32, unit rows."""
        ...

    def encode_texts(self, texts: list[str]) -> np.ndarray | None:
        """Return the features of texts, (n, dim); None if the model reads none."""
        ...


class HashModel:
    """A perceptual hash: rows of 256 values ±1/16, whose cosine is 1 − 2 · distance / 256."""

    def __init__(self, name: str) -> None:
        made = HASHES[name]
        self.name, self.dim, self.batch, self.size = name, BITS, 1024, made.size
        self.prepare, self.threshold = made.bits, 1 - 2 * made.distance / BITS
        self.described: dict[str, Any] = {
            "name": name, "kind": "hash", "bits": BITS, "plain": "sha256, of shapes too",
            "distance": made.distance, "threshold_from": made.source,
        }  # fmt: skip

    def encode(self, prepared: np.ndarray) -> np.ndarray:
        """See `Model.encode`."""
        bits = np.unpackbits(prepared, axis=1)
        return np.where(bits, 1 / KEPT, -1 / KEPT).astype(np.float32)

    def encode_texts(self, texts: list[str]) -> np.ndarray | None:
        """Return None: a hash reads no text."""
        del texts
        return None


def open_model(
    spec: str, *, device: str = "auto", threads: int = 0, preprocess: str | None = None,
    download: bool = False,
) -> Model:  # fmt: skip
    """Open the model that ``spec`` names: a hash, or ``KIND:NAME`` of a learned one.

    ``threads`` are those of a call of `Model.encode` where the model has its own, 0 for all;
    ``preprocess`` is a JSON file or words for `preprocess.parse_preprocess`.
    """
    kind, colon, name = spec.partition(":")
    if not colon and spec in HASHES:
        if preprocess is not None:
            raise UsageError(f"--preprocess is for learned models; {spec} needs none")
        return HashModel(spec)
    from snipdedup.pictures.learned import KINDS

    if kind not in KINDS or not name:
        forms = [f"{each}:NAME" for each in KINDS]
        known = ", ".join([*HASHES, *forms])
        raise UsageError(f"--model must be one of {known}, found {spec!r}")
    opened = KINDS[kind]
    return opened(name, pick_device(device), preprocess, download=download, threads=threads)
