"""CLIP models of open_clip (extra ``clip``): found on this machine, opened, texts to vectors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.errors import SnipError

MODEL = "ViT-B-32/laion2b_s34b_b79k"  # an example


class Clip(NamedTuple):
    """An opened model."""

    library: Any  # open_clip
    network: Any
    known: dict[str, Any]  # what open_clip knows of the weights
    weights: Path
    download: bool  # whether more may be fetched


def open_clip_model(model: str, *, download: bool, use: str) -> Clip:
    """Open ``ARCHITECTURE/WEIGHTS``, on the CPU; WEIGHTS may be a file.

    Weights that are not cached are fetched with ``download`` only. ``use`` is what needs it.
    """
    name, _, tag = model.partition("/")
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # torchvision that does not fit torch
        raise SnipError(
            f"{use} needs open_clip, which cannot be imported ({error}); install it "
            "with: pip install 'snipdedup-toolkit[clip]'"
        ) from error
    known = open_clip.pretrained.get_pretrained_cfg(name, tag) or {}
    weights = Path(tag) if Path(tag).is_file() else find_weights(open_clip, known, model, download)
    try:
        with fetching(download):
            network = open_clip.create_model(
                name, pretrained=str(weights), force_quick_gelu=bool(known.get("quick_gelu"))
            )
    except Exception as error:  # damaged files fail in many ways
        raise SnipError(
            f"--model {model}: open_clip cannot load it: {first_line(error)}"
        ) from error
    return Clip(open_clip, network.eval(), known, weights, download)


@contextmanager
def fetching(allowed: bool) -> Iterator[None]:
    """Let libraries fetch from Hugging Face only if that is allowed."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def first_line(error: BaseException) -> str:
    """Return the first line of what another library says."""
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


def text_vector(text: str, model: str, *, download: bool) -> np.ndarray:
    """Return the feature of a text, (d,) float32, not scaled."""
    clip = open_clip_model(model, download=download, use="searching by text")
    return encode_texts(clip, model, [text])[0]


def encode_texts(clip: Clip, model: str, texts: list[str], device: str = "cpu") -> np.ndarray:
    """Return the features of texts, (n, d) float32, not scaled."""
    import torch

    try:
        with fetching(clip.download):
            tokens = clip.library.get_tokenizer(model.partition("/")[0])(texts)
        with torch.inference_mode():
            tokens = tokens.to(device) if hasattr(tokens, "to") else tokens
            return np.asarray(clip.network.encode_text(tokens).float().cpu().numpy())
    except Exception as error:  # of a library that is missing, a file, the network
        hint = "" if clip.download else "; if its files are not on this machine, give --download"
        raise SnipError(
            f"--model {model}: its tokenizer fails: {first_line(error)}{hint}"
        ) from error


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
    repository, _, file = str(known.get("hf_hub") or "").rpartition("/")
    if repository:
        from huggingface_hub import try_to_load_from_cache

        names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        for each in (*(str(Path(one).with_suffix(".safetensors")) for one in names), *names):
            cached = try_to_load_from_cache(repository, each)
            if isinstance(cached, str):
                return Path(cached)
    path = Path("~/.cache/clip").expanduser() / str(known.get("url") or "").rpartition("/")[2]
    if path.is_file():
        return path
    raise SnipError(
        f"--model {model}: its weights are not on this machine; fetch them with --download, or "
        f"name a file: --model {name}/FILE"
    )
