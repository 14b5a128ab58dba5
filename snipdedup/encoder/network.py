"""The SNIP network: a feature in, a short descriptor of length 1 out; and its folder on disk.

Weights are a plain state dict beside a JSON description, never a pickled module: reading an
encoder runs no code of its own. A descriptor depends on its row and the row's global number only,
since blocks of fixed size, aligned to global rows, are each computed by one thread.
"""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from snipdedup import config, progress
from snipdedup.errors import InputError, SnipError
from snipdedup.features.cosine import unit_rows
from snipdedup.features.hashing import Checksums, checksum_text, sum_checksums
from snipdedup.features.scan import refuse_bad
from snipdedup.features.shards import Features, accept_dates, open_features, request_of
from snipdedup.parallel import (
    ALIGNED_ROWS,
    cores,
    in_aligned_blocks,
    library_threads,
    ordered_map,
    pick_device,
)
from snipdedup.storage import locks, store

WEIGHTS = "weights.pt"
LAYOUT = 2  # of the network below; a change that old weights do not fit counts it up
BITS_A_DIMENSION = 2  # of a code; more are better spent on a wider descriptor
READ_ROWS = 8 * ALIGNED_ROWS  # rows read and encoded by one thread at a time
DESCRIPTORS = "descriptors"
# What torch's reader of pickles, which builds tensors only, says of one that is damaged.
BROKEN_PICKLE = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, MemoryError,
    ArithmeticError, AssertionError,
)  # fmt: skip
FILES = "files"  # below the work folder: what is written before all of it is whole


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

    def all(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return all kinds of descriptors, for the price of one hidden layer."""
        hidden = functional.gelu(self.inner(x))
        return [output(x, hidden) for output in self.outputs]


class Encoder:
    """A trained network, ready to use.

    Attributes
    ----------
    dim_in, dim : int
        Width of features and of descriptors.
    output : int
        Which output of the network makes them: 0, or a head.
    device : str
    """

    def __init__(self, network: Network, device: str = "cpu", output: int = 0) -> None:
        self.network = network.to(device).float().eval().requires_grad_(False)
        self.device, self.output = device, output
        self.hidden, self.dim_in = self.network.inner.weight.shape
        self.dim = self.network.widths[output]

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

    def encode(self, rows: np.ndarray, first: int = 0) -> np.ndarray:
        """Return descriptors, in this thread.

        Parameters
        ----------
        rows : (n, dim_in) float16, float32 or float64
            Any norm. A row that cannot be compared (`cosine.bad_rows`) gets zeros.
        first : int
            Global row of ``rows[0]``: the last bits depend on a row's place in its block.

        Returns
        -------
        (n, dim) float32, of length 1
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
        x = torch.from_numpy(unit).to(self.device)
        found = self.network(x, self.output).cpu().numpy()
        found[~unit.any(axis=1)] = 0
        return found

    def weights(self) -> bytes:
        """Return the state dict as bytes, the same for the same weights."""
        buffer = io.BytesIO()  # a file's own name would end up in the archive
        torch.save({k: v.cpu() for k, v in self.network.state_dict().items()}, buffer)
        return buffer.getvalue()

    def save(self, folder: Path, body: dict[str, Any]) -> None:
        """Write weights, then the manifest with ``body`` (settings, shards, curves)."""
        with store.replacing(folder / WEIGHTS) as part:
            part.write_bytes(self.weights())
        described = {
            "layout": LAYOUT,
            "dim_in": self.dim_in,
            "hidden": self.hidden,
            "dim": self.network.widths[0],
            "heads": self.network.widths[1:],
        }
        store.write_manifest(folder, "encoder", {"encoder": described, **body}, [folder / WEIGHTS])

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> Encoder:
        """Read an encoder folder.

        Raises
        ------
        SnipError
            If it is not one that ``snip train`` finished, or its weights were changed.
        """
        path = Path(folder).expanduser()
        if path.is_file():
            raise SnipError(
                f"{path}: expected an encoder folder that snip train wrote, found a file. Pickled "
                "modules, as upstream published, are not read: unpickling runs any code they hold. "
                "Train one with: snip train FEATURES --out encoder"
            )
        manifest = store.read_manifest(path, "encoder")
        shape, state = described_shape(path, manifest), read_weights(path, manifest)
        check_weight(path / WEIGHTS, *shape)
        network = Network(*shape)
        try:
            network.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise SnipError(
                f"{path / WEIGHTS}: its layers do not fit {store.MANIFEST}: {first_line(error)}; "
                "train the encoder again"
            ) from error
        return cls(network, pick_device(device))


def described_shape(folder: Path, manifest: dict[str, Any]) -> tuple[int, int, int, list[int]]:
    """Return (dim_in, hidden, dim, heads) that a manifest promises."""
    described = manifest.get("encoder")
    described = described if isinstance(described, dict) else {}
    if described.get("layout") != LAYOUT:
        raise SnipError(
            f"{folder / store.MANIFEST}: expected an encoder of layout {LAYOUT}, found "
            f"{described.get('layout')!r}; train it with this version of snip"
        )
    heads = described.get("heads")
    heads = heads if isinstance(heads, list) else [None]
    shape = tuple(described.get(name) for name in ("dim_in", "hidden", "dim"))
    if not all(type(width) is int and width > 0 for width in (*shape, *heads)):
        raise SnipError(
            f"{folder / store.MANIFEST}: expected the widths dim_in, hidden, dim and heads, found "
            f"{store.short([*shape, described.get('heads')])}"
        )
    dim_in, hidden, dim = cast("tuple[int, int, int]", shape)
    return dim_in, hidden, dim, heads


def check_weight(path: Path, dim_in: int, hidden: int, dim: int, heads: list[int]) -> None:
    """Refuse widths that need more bytes than the weights have, before memory is taken."""
    need = 4 * (dim_in + hidden) * (dim + sum(heads)) + 4 * dim_in * hidden
    have = path.stat().st_size
    if have < need:
        raise SnipError(
            f"{path}: its layers do not fit {store.MANIFEST}: {have} bytes, which promises {need}; "
            "train the encoder again"
        )


def read_weights(folder: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the state dict, if it is the file that the manifest vouches for."""
    path = folder / WEIGHTS
    expected = weights_sha256(folder, manifest)
    if not path.is_file():
        raise SnipError(f"no such file: {path}; copy the whole encoder folder, or train it again")
    if store.sha256(path) != expected:
        raise SnipError(
            f"{path}: changed since {store.MANIFEST} was written (its SHA-256 differs); copy the "
            "encoder folder again, or train it again"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *BROKEN_PICKLE) as error:
        raise SnipError(
            f"{path}: expected a plain state dict of tensors, found something else; pickled "
            "modules are not read, since unpickling runs any code they hold"
        ) from error


def weights_sha256(folder: Path, manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of the weights as the manifest holds it."""
    try:
        return str(manifest["outputs"][WEIGHTS]["sha256"])
    except (KeyError, TypeError):
        raise SnipError(f"{folder / store.MANIFEST}: names no {WEIGHTS}; train it again") from None


def first_line(error: Exception) -> str:
    """Return the first line of a library's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else str(error)


@locks.given_up()
def run(options: config.Compress) -> str:
    """Write descriptors, shard for shard; return the summary."""
    started = time.monotonic()
    features = open_features(
        options.features, parts=options.parts, array=options.array, column=options.column
    )
    encoder = Encoder.load(options.encoder, options.device)
    check_width(encoder, features, options.encoder)
    names = descriptor_names(features)
    out = Path(options.out).expanduser()
    store.refuse_output_inside(out, [*features.inputs(), Path(options.encoder).expanduser()])
    request = describe_request(options, features)
    if claim(out, request, features, options.overwrite) == "done":
        return f"{out} is finished already with these settings; --overwrite makes it anew"
    try:
        checksums = write_shards(features, encoder, out / store.WORK, names, options)
        features.refuse_changed()
    except InputError:
        store.release(out)  # what stood there before, stands
        raise
    shards = [
        {**shard, "checksum": checksum_text(checksum)}
        for shard, checksum in zip(features.describe(), checksums, strict=True)
    ]
    seconds = time.monotonic() - started
    body = {
        "command": "compress",
        "settings": options.as_dict(),
        "request": request,
        "encoder_sha256": request["encoder"],
        "shards": shards,
        "counts": {"rows": features.rows, "dim": encoder.dim},
        "seconds": {"all": round(seconds, 3)},
    }
    store.publish(out, DESCRIPTORS, body, [out / store.WORK / FILES / name for name in names])
    size = features.rows * encoder.dim * np.dtype(options.dtype).itemsize
    return (
        f"{features.rows:,} rows in {len(names)} shards: {encoder.dim_in} wide to {encoder.dim} "
        f"({size / 1e6:,.1f} MB {options.dtype}) in {seconds:.1f} s, in {out}"
    )


def describe_request(options: config.Compress, features: Features) -> dict[str, Any]:
    """Return what the descriptors depend on, by name."""
    folder = Path(options.encoder).expanduser()
    return {
        "encoder": weights_sha256(folder, store.read_manifest(folder, "encoder")),
        "dtype": options.dtype,
        "array": options.array,
        "column": options.column,
        **request_of(features),
    }


def check_width(encoder: Encoder, features: Features, name: str) -> None:
    """Refuse features of another width, naming the file."""
    if encoder.dim_in != features.dim:
        raise SnipError(
            f"{features.place(0)[0]}: rows are {features.dim} wide, --encoder {name} expects "
            f"{encoder.dim_in}; use features of the model that it was trained on"
        )


def descriptor_names(features: Features) -> list[str]:
    """Return the file name of each shard's descriptors; refuse two shards of one name."""
    names: dict[str, Path] = {}
    for shard in features.shards:
        name = f"{shard.path.stem}.npy"
        if name in names:
            raise SnipError(
                f"{names[name]} and {shard.path} would both be written as {name}; compress them "
                "into two folders"
            )
        names[name] = shard.path
    return list(names)


def claim(out: Path, request: dict[str, Any], features: Features, overwrite: bool) -> str:
    """Take ``out`` as `store.claim` does; other dates of the same rows are no matter."""
    if store.is_finished(out):
        accept_dates(request, features, store.read_manifest(out, DESCRIPTORS))
    return store.claim(out, DESCRIPTORS, request, overwrite=overwrite, late=True)


def write_shards(
    features: Features, encoder: Encoder, work: Path, names: list[str], options: config.Compress
) -> list[int]:
    """Write the shards that are not there yet; return the checksum of each input shard."""
    threads = cores(options.threads) if encoder.device == "cpu" else 1
    checksums = []
    with progress.bar(features.rows, "compressing", "rows") as bar:
        for number, name in enumerate(names):
            path, done = work / FILES / name, work / f"{name}.json"
            if not store.is_sealed(done, path.parent):
                checksum = write_shard(features, number, encoder, path, options.dtype, threads)
                store.seal(done, [path], {"checksum": checksum})  # after the shard
            checksums.append(int(store.load_json(done)["checksum"]))
            bar.update(features.shards[number].rows)
    return checksums


def write_shard(
    features: Features, number: int, encoder: Encoder, path: Path, dtype: str, threads: int
) -> int:
    """Write one shard's descriptors as they are made; return the checksum of the input shard.

    Raises
    ------
    InputError
        If a row cannot be compared: file and row; nothing is written then.
    """
    rows, checksums = features.shards[number].rows, []
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, encoder.dim)}
    with store.replacing(path) as part, part.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block, read in encoded_spans(features, number, encoder, threads):
            block.astype(dtype).tofile(file)
            checksums.append(read)
    return sum_checksums(checksums, len(features.shards))[number]


def encoded_spans(
    features: Features, number: int, encoder: Encoder, threads: int
) -> Iterator[tuple[np.ndarray, Checksums]]:
    """Yield one shard's descriptors in row order, with the checksums of what was read."""
    first, stop = (int(row) for row in features.offsets[number : number + 2])
    cuts = range(first - first % READ_ROWS, stop, READ_ROWS)
    spans = [(max(cut, first), min(cut + READ_ROWS, stop)) for cut in cuts]

    def work(span: tuple[int, int]) -> tuple[np.ndarray, Checksums]:
        rows = features.read(*span)
        refuse_bad(features, np.arange(*span), rows)
        return encoder.encode(rows, span[0]), features.checksums(span[0], rows)

    return ordered_map(work, spans, threads)
