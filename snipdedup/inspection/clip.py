"""A text as a vector beside the features, by the CLIP model that made them (extra ``clip``).

Nothing is downloaded unless that is asked for: weights are looked for where open_clip keeps them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.errors import SnipError, UsageError

INSTALL = "pip install 'snipdedup-toolkit[clip]'"
EXAMPLE = "ViT-B-32/laion2b_s34b_b79k"


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
        raise UsageError(f"--model must be ARCHITECTURE/WEIGHTS, {EXAMPLE} say, found {model!r}")
    open_clip = import_open_clip()
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


def import_open_clip() -> Any:
    """Return the library, or say how to install it."""
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # torchvision that does not fit torch
        raise SnipError(
            f"searching by text needs open_clip, which cannot be imported ({error}); install it "
            f"with: {INSTALL}"
        ) from error
    return open_clip


def find_weights(open_clip: Any, known: dict[str, Any], model: str, download: bool) -> Path:
    """Return the file with a model's weights: cached, or fetched if that is asked for."""
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
