"""What makes features of pictures: the models that ``--model`` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from snipdedup.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

SIDE, KEPT = 64, 16  # pixels of the grey picture, frequencies of its cosine transform


class Model(Protocol):
    """What ``snip embed`` needs of a model."""

    name: str  # as given to --model, canonical
    dim: int  # width of a row
    threshold: float  # the cosine that is usual for it
    described: dict[str, Any]  # for the manifest
    batch: int  # pictures of a call of `encode`
    size: int  # pixels of the shorter side that `prepare` needs

    def prepare(self, picture: Image.Image) -> np.ndarray:
        """Return an upright RGB picture as an array of one shape; in a worker process."""
        ...

    def encode(self, prepared: np.ndarray) -> np.ndarray:
        """Return the features of (n, ...) prepared pictures: (n, dim) float32, unit rows."""
        ...

    def encode_texts(self, texts: list[str]) -> np.ndarray | None:
        """Return the features of texts, (n, dim); None if the model reads none."""
        ...


class PHash:
    """The 256 lowest frequencies of the cosine transform, each above or below their median."""

    def __init__(self) -> None:
        self.name, self.dim, self.batch, self.size = "phash", KEPT * KEPT, 256, 2 * SIDE
        self.threshold = 0.8
        self.described: dict[str, Any] = {"kind": "hash", "bits": self.dim}

    def prepare(self, picture: Image.Image) -> np.ndarray:
        """See `Model.prepare`."""
        from PIL import Image

        grey = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        return np.asarray(grey)

    def encode(self, prepared: np.ndarray) -> np.ndarray:
        """See `Model.encode`."""
        place = np.arange(SIDE)
        waves = np.cos(np.pi / SIDE * (place + 0.5) * place[:KEPT, None])
        low = (waves @ prepared.astype(np.float64) @ waves.T).reshape(len(prepared), -1)
        middle = np.median(low[:, 1:], axis=1)[:, None]
        return np.where(low > middle, 1 / KEPT, -1 / KEPT).astype(np.float32)

    def encode_texts(self, texts: list[str]) -> np.ndarray | None:
        """See `Model.encode_texts`."""
        return None


def open_model(
    spec: str, *, device: str = "auto", threads: int = 0, preprocess: Any = None
) -> Model:
    """Open the model that ``spec`` names."""
    if spec != "phash":
        raise UsageError(f"--model must be phash, found {spec!r}")
    return PHash()
