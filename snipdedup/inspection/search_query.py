"""What ``snip search`` looks for, as vectors: a stored row, the vectors of a file, or a text.

A text becomes a vector by the CLIP model that made the features (extra ``clip``); its weights are
downloaded only if that is asked for. torch is loaded only for an encoder or a CLIP model.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.config import Search
from snipdedup.errors import InputError, SnipError, UsageError
from snipdedup.features.cosine import unit_rows64
from snipdedup.features.formats import load_npz, map_npy
from snipdedup.features.shards import Features
from snipdedup.index.folder import Index, Space, held_encoder
from snipdedup.index.search import MappedLists
from snipdedup.storage.out_folder import read_manifest

VECTORS = (".npy", ".npz")
MODEL = "ViT-B-32/laion2b_s34b_b79k"  # an example


@dataclass(frozen=True)
class Query:
    """One query.

    Attributes
    ----------
    name : str
        As a person would call it.
    row : int or None
        The stored row that it is.
    x : (dim,) float32
        What the lists are searched with.
    raw : (d,) float or None
        What features are compared with.
    """

    name: str
    row: int | None
    x: np.ndarray
    raw: np.ndarray | None


def parse_query(
    index: Index, lists: MappedLists, features: Features | None, options: Search
) -> list[Query]:
    """Return what is asked: a row number, the vectors of a file or an array, or a text.

    Raises
    ------
    SnipError
        If there is no such row or file, or vectors do not fit the index.
    """
    query = options.query
    if isinstance(query, int | np.integer) or (
        isinstance(query, str) and query.isdecimal() and not options.text
    ):
        return [row_query(index, lists, features, int(query))]
    name = query if isinstance(query, str) else "QUERY"
    if not isinstance(query, str):
        vectors = checked_vectors(np.asarray(query), name)
    elif Path(query).suffix.lower() in VECTORS and not options.text:
        vectors = read_vectors(Path(query).expanduser(), options.array)
    else:
        model = model_of(index, options)
        vectors = text_vector(query, model, download=options.download)[None]
    x = search_vectors(index, vectors, name, options.encoder)
    comparable = features is not None and features.dim == vectors.shape[1]
    return [
        Query(
            name if len(x) == 1 else f"{name} [{i}]", None, x[i], vectors[i] if comparable else None
        )
        for i in range(len(x))
    ]


def row_query(index: Index, lists: MappedLists, features: Features | None, row: int) -> Query:
    """Return a stored row as a query; torch is not loaded."""
    if not 0 <= row < index.rows:
        raise SnipError(
            f"row {row} is not in {index.folder}: it has {index.rows:,} rows, numbered from 0 (a "
            "text of digits only needs --text)"
        )
    if features is None:
        return Query(f"row {row}", row, lists.vector_of(row), None)
    rows = features.read(row, row + 1)
    if not usable(rows).all():
        raise SnipError(f"row {row} is NaN, infinite or zero: it is near to nothing")
    # With an encoder, or where the features are not what was indexed, q(x) stands for x.
    same = held_encoder(index.folder) is None and features.dim == index.dim
    x = plain_vectors(index, rows)[0] if same else lists.vector_of(row)
    return Query(f"row {row}", row, x, rows[0])


def read_vectors(path: Path, array: str | None) -> np.ndarray:
    """Return the vectors of a ``.npy`` or ``.npz`` file, (n, d); a single one may be 1-D."""
    if not path.is_file():
        raise SnipError(f"no such file: {path} (a text that ends like a file needs --text)")
    try:
        packed = zipfile.is_zipfile(path)
        found = load_npz(path, [array] if array else None) if packed else {"": map_npy(path)}
    except (OSError, InputError) as error:
        raise SnipError(f"{path}: cannot be read as vectors: {error}") from error
    if len(found) != 1:
        raise SnipError(f"{path} holds {', '.join(found) or 'none'}; choose one with --array")
    (vectors,) = found.values()
    return checked_vectors(vectors, str(path))


def checked_vectors(given: np.ndarray, name: str) -> np.ndarray:
    """Return vectors, (n, d) of this machine's floats; refuse what is none, or near to nothing."""
    vectors = np.array(given, given.dtype.newbyteorder("="), order="C")
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not len(vectors) or vectors.dtype.kind != "f":
        raise SnipError(
            f"{name}: expected vectors, (n, d) of floats, found {vectors.shape} of {vectors.dtype}"
        )
    bad = np.flatnonzero(~usable(vectors))
    if len(bad):
        raise SnipError(f"{name} row {bad[0]}: NaN, infinite or zero; it is near to nothing")
    return vectors


def usable(rows: np.ndarray) -> np.ndarray:
    """Return which rows can be compared, (n,) bool: `cosine.bad_rows` without torch."""
    return np.asarray(np.isfinite(rows).all(axis=1) & rows.any(axis=1))


def plain_vectors(index: Index, rows: np.ndarray) -> np.ndarray:
    """Return rows as an index without an encoder takes them, (n, dim) float32."""
    as_stored = bool(index.manifest["request"]["as_stored"])
    return (rows if as_stored else unit_rows64(rows)).astype(np.float32)


def search_vectors(index: Index, vectors: np.ndarray, name: str, encoder: str | None) -> np.ndarray:
    """Return what the lists are searched with: descriptors where the index holds such."""
    held, width = held_encoder(index.folder), vectors.shape[1]
    given = held or (Path(encoder).expanduser() if encoder is not None else None)
    takes = None if given is None else read_manifest(given, "encoder")["encoder"]["dim_in"]
    if given is not None and width == takes:
        space = Space.encoded(given).of_width(index.dim)
        if space.dim == index.dim:
            return space.vectors(vectors)
    if width != index.dim:
        also = "" if given is None else f", or {takes} for the encoder {given}"
        raise SnipError(
            f"{name}: vectors {width} wide, {index.folder} expects {index.dim} wide{also}; use "
            "features of the model that was indexed (--encoder, if it holds descriptors)"
        )
    return vectors.astype(np.float32) if held else plain_vectors(index, vectors)


def model_of(index: Index, options: Search) -> str:
    """Return the CLIP model to make a text's vector with: the flag's, or a manifest's."""
    held = held_encoder(index.folder)
    manifests = [index.manifest, read_manifest(held, "encoder") if held else {}]
    named = [manifest.get("settings", {}).get("model") for manifest in manifests]
    model = options.model or next((name for name in named if name), None)
    if model is None:
        raise UsageError(
            f"{options.query!r} is no row and no .npy or .npz file; to search by text, name the "
            f"CLIP model that made the features, such as --model {MODEL}"
        )
    return str(model)


def text_vector(text: str, model: str, *, download: bool = False) -> np.ndarray:
    """Return the feature of a text, (d,) float32, not scaled.

    Parameters
    ----------
    text : str
    model : str
        ``ARCHITECTURE/WEIGHTS`` as open_clip names them; WEIGHTS may be a file.
    download : bool
        Fetch weights that are not cached.

    Raises
    ------
    UsageError
        If ``model`` is no such name.
    SnipError
        If open_clip is not installed, does not know the model, or its weights are not cached.
    """
    name, _, tag = model.partition("/")
    if not name or not tag:
        raise UsageError(f"--model must be ARCHITECTURE/WEIGHTS, such as {MODEL}, found {model!r}")
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # torchvision that does not fit torch
        raise SnipError(
            f"searching by text needs open_clip, which cannot be imported ({error}); install it "
            "with: pip install 'snipdedup-toolkit[clip]'"
        ) from error
    import torch

    known = open_clip.pretrained.get_pretrained_cfg(name, tag) or {}
    weights = Path(tag) if Path(tag).is_file() else find_weights(open_clip, known, model, download)
    try:
        network = open_clip.create_model(
            name, pretrained=str(weights), force_quick_gelu=bool(known.get("quick_gelu"))
        )
        tokens = open_clip.get_tokenizer(name)([text])
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise SnipError(f"--model {model}: open_clip cannot load it: {reason}") from error
    with torch.inference_mode():
        return np.asarray(network.eval().encode_text(tokens)[0].float().cpu().numpy())


def find_weights(open_clip: Any, known: dict[str, Any], model: str, download: bool) -> Path:
    """Return the file with a model's weights: cached, or downloaded if that is asked for."""
    name = model.partition("/")[0]
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(name)
        found = f"of {name} it knows {', '.join(tags)}" if tags else f"it knows no model {name}"
        raise SnipError(f"--model {model}: neither a file nor weights that open_clip has; {found}")
    if download:
        try:
            return Path(open_clip.pretrained.download_pretrained(known))
        except (RuntimeError, OSError) as error:
            raise SnipError(f"--model {model}: cannot be downloaded: {error}") from error
    cached = cached_weights(known)
    if cached is None:
        raise SnipError(
            f"--model {model}: its weights are not on this machine; fetch them with --download, or "
            f"name a file: --model {name}/FILE"
        )
    return cached


def cached_weights(known: dict[str, Any]) -> Path | None:
    """Return where open_clip would find downloaded weights, None if they are not there."""
    repository, _, file = str(known.get("hf_hub") or "").rpartition("/")
    if repository:
        from huggingface_hub import try_to_load_from_cache

        names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        for name in (*(str(Path(name).with_suffix(".safetensors")) for name in names), *names):
            found = try_to_load_from_cache(repository, name)
            if isinstance(found, str):
                return Path(found)
    url = str(known.get("url") or "")
    path = Path("~/.cache/clip").expanduser() / url.rpartition("/")[2]
    return path if url and path.is_file() else None
