"""The SNIP network: a feature in, a short descriptor of length 1 out; and its folder on disk.

Weights are a plain state dict beside a JSON description, never a pickled module: reading an
encoder runs no code of its own. A descriptor depends on its row and the row's global number only,
since blocks of fixed size, aligned to global rows, are each computed by one thread.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from snipdedup.errors import SnipError
from snipdedup.features.cosine import unit_rows
from snipdedup.features.shards import Features
from snipdedup.parallel import in_aligned_blocks, library_threads, pick_device
from snipdedup.storage import atomic
from snipdedup.storage.out_folder import MANIFEST, read_manifest, short_json, write_manifest

WEIGHTS = "weights.pt"
LAYOUT = 2  # of the network below; a change that old weights do not fit counts it up
BITS_A_DIMENSION = 2  # of a code; more are better spent on a wider descriptor
# What torch's reader of pickles, which builds tensors only, raises for one that is damaged.
BROKEN_PICKLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError,
    AttributeError, MemoryError, ArithmeticError, AssertionError,
)  # fmt: skip


class Output(nn.Module):
    """A linear path plus the last layer of an MLP, normalised.

    The linear path can start as PCA; the MLP's last layer starts at zero, so that training begins
    at PCA and only adds to it.
    """

    def __init__(self, dim_in: int, hidden: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(dim_in, width)
        self.outer = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return descriptors, (n, width), from rows and their hidden layer."""
        return functional.normalize(self.linear(x) + self.outer(hidden))

    @torch.no_grad()
    def rotate(self, rotation: torch.Tensor) -> None:
        """Fold an orthonormal matrix into the last layers: lengths and distances stay."""
        self.linear.weight.copy_(rotation @ self.linear.weight)
        self.linear.bias.copy_(rotation @ self.linear.bias)
        self.outer.weight.copy_(rotation @ self.outer.weight)


class Network(nn.Module):
    """A two-layer GELU MLP beside a linear path, with one hidden layer for several outputs.

    The first output is the descriptor. Heads, where there are any, make shorter ones for small
    codes: few bytes say more about few dimensions.
    """

    def __init__(self, dim_in: int, hidden: int, dim: int, heads: Sequence[int] = ()) -> None:
        super().__init__()
        self.inner = nn.Linear(dim_in, hidden)
        outputs = nn.ModuleList(Output(dim_in, hidden, width) for width in (dim, *heads))
        self.outputs = cast("Sequence[Output]", outputs)

    @property
    def widths(self) -> list[int]:
        """Widths of the outputs: of the descriptor, then of each head."""
        return [output.width for output in self.outputs]

    def forward(self, x: torch.Tensor, output: int = 0) -> torch.Tensor:
        """Return one kind of descriptors of unit rows: (n, dim_in) to (n, width)."""
        return self.outputs[output](x, functional.gelu(self.inner(x)))

    def all_outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return all kinds of descriptors, for the price of one hidden layer."""
        hidden = functional.gelu(self.inner(x))
        return [output(x, hidden) for output in self.outputs]


class Encoder:
    """A trained network, ready to use; `str` of it is what ``snip train`` prints.

    ``dim_in`` and ``dim`` are the widths of features and descriptors; ``output`` is 0, or the
    head that makes them; ``manifest`` is of the folder (``history``, ...), empty without one.
    """

    def __init__(self, network: Network, device: str = "cpu", output: int = 0) -> None:
        self.network = network.to(device).float().eval().requires_grad_(False)
        self.device, self.output = device, output
        self.hidden, self.dim_in = self.network.inner.weight.shape
        self.dim = self.network.widths[output]
        self.manifest: dict[str, Any] = {}
        self.summary = f"an encoder of features {self.dim_in} wide to descriptors {self.dim} wide"

    def __str__(self) -> str:
        return self.summary

    def of_width(self, dim: int) -> Encoder:
        """Return the encoder whose descriptors are ``dim`` wide: a head, or this one."""
        widths = self.network.widths
        return Encoder(self.network, self.device, widths.index(dim)) if dim in widths else self

    def for_codes(self, m: int, nbits: int = 8) -> Encoder:
        """Return the encoder that a code of ``m`` sub-quantisers keeps most of.

        A code does best on the narrowest output with at most two bits a dimension.
        """
        fits = [w for w in self.network.widths if m * nbits <= BITS_A_DIMENSION * w and w % m == 0]
        return self.of_width(min(fits)) if fits else self

    def check_width(self, features: Features, folder: str) -> None:
        """Refuse features of another width than the encoder of ``folder`` expects."""
        if self.dim_in != features.dim:
            raise SnipError(
                f"{features.place(0)[0]}: rows are {features.dim} wide, --encoder {folder} expects "
                f"{self.dim_in}; use features of the model that it was trained on"
            )

    def encode(self, rows: np.ndarray, first: int = 0) -> np.ndarray:
        """Return descriptors of length 1, (n, dim) float32, computed in this thread.

        Rows, (n, dim_in) floats, may have any norm; those that cannot be compared get zeros.
        ``first`` is the global row of ``rows[0]``: last bits depend on a row's place in its block.
        """
        if rows.ndim != 2 or rows.shape[1] != self.dim_in:
            raise SnipError(
                f"the encoder expects rows {self.dim_in} wide, found an array of {rows.shape}; "
                "use features of the model that it was trained on"
            )
        if not len(rows):
            return np.empty((0, self.dim), np.float32)
        with library_threads(1):
            return in_aligned_blocks(lambda block: (self._block(block),), rows, first)[0]

    @torch.inference_mode()
    def _block(self, block: np.ndarray) -> np.ndarray:
        unit = unit_rows(block)
        descriptors = self.network(torch.from_numpy(unit).to(self.device), self.output)
        y = descriptors.cpu().numpy()
        y[~unit.any(axis=1)] = 0
        return y

    def weights(self) -> bytes:
        """Return the state dict as bytes, the same for the same weights."""
        buffer = io.BytesIO()  # a file's own name would end up in the archive
        torch.save({k: v.cpu() for k, v in self.network.state_dict().items()}, buffer)
        return buffer.getvalue()

    def save(self, folder: Path, body: dict[str, Any]) -> None:
        """Write weights, then the manifest with ``body`` (settings, shards, curves)."""
        with atomic.replacing(folder / WEIGHTS) as part:
            part.write_bytes(self.weights())
        described = {
            "layout": LAYOUT,
            "dim_in": self.dim_in,
            "hidden": self.hidden,
            "dim": self.network.widths[0],
            "heads": self.network.widths[1:],
        }
        write_manifest(folder, "encoder", {"encoder": described, **body}, [folder / WEIGHTS])

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> Encoder:
        """Read a folder that ``snip train`` finished; refuse one whose weights were changed."""
        path = Path(folder).expanduser()
        if path.is_file():
            raise SnipError(
                f"{path}: expected an encoder folder that snip train wrote, found a file. Pickled "
                "modules, as upstream published, are not read: unpickling runs any code they hold. "
                "Train one with: snip train FEATURES --out encoder"
            )
        manifest = read_manifest(path, "encoder")
        dim_in, hidden, dim, heads = read_widths(path / MANIFEST, manifest)
        state = read_weights(path / WEIGHTS, manifest)
        need = 4 * ((dim_in + hidden) * (dim + sum(heads)) + dim_in * hidden)
        have = (path / WEIGHTS).stat().st_size
        if have < need:  # before memory is taken
            raise damaged_weights(path / WEIGHTS, f"{have} bytes do not fit {need} of its layers")
        network = Network(dim_in, hidden, dim, heads)
        try:
            network.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            why = f"its layers do not fit {MANIFEST}"
            raise damaged_weights(path / WEIGHTS, why) from error
        encoder = cls(network, pick_device(device))
        encoder.manifest = manifest
        return encoder


def read_widths(path: Path, manifest: dict[str, Any]) -> tuple[int, int, int, list[int]]:
    """Return (dim_in, hidden, dim, heads) of a manifest, or refuse it."""
    described = manifest.get("encoder", {})
    if described.get("layout") != LAYOUT:
        raise SnipError(
            f"{path}: expected an encoder of layout {LAYOUT}, found "
            f"{described.get('layout')!r}; train it with this version of snip"
        )
    dim_in, hidden, dim, heads = (described.get(n) for n in ("dim_in", "hidden", "dim", "heads"))
    widths = (dim_in, hidden, dim, *(heads if isinstance(heads, list) else [None]))
    if not all(type(width) is int and width > 0 for width in widths):
        raise SnipError(
            f"{path}: expected the widths dim_in, hidden, dim and heads, found "
            f"{short_json([dim_in, hidden, dim, heads])}; copy the encoder again, or train it anew"
        )
    return dim_in, hidden, dim, heads


def read_weights(path: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the state dict, if it is the file that the manifest vouches for."""
    try:
        expected = manifest["outputs"][WEIGHTS]["sha256"]
    except (KeyError, TypeError):
        raise damaged_weights(path, f"{MANIFEST} names no {WEIGHTS}") from None
    if not path.is_file():
        raise damaged_weights(path, "no such file")
    if atomic.sha256(path) != expected:
        raise damaged_weights(path, f"changed since {MANIFEST} was written (SHA-256 differs)")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN_PICKLE as error:
        raise SnipError(
            f"{path}: expected a plain state dict of tensors, found something else; pickled "
            "modules are not read, since unpickling runs any code they hold"
        ) from error


def damaged_weights(path: Path, why: str) -> SnipError:
    """Return the refusal of an encoder's weights."""
    return SnipError(f"{path}: {why}; copy the whole encoder folder again, or train it again")
