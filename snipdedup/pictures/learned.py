"""Learned models of pictures: of open_clip, timm, ONNX and TorchScript files.

Weights are read from this machine; only ``--download`` fetches any. What a model makes of a picture
is scaled to norm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from snipdedup.config import THRESHOLD
from snipdedup.errors import SnipError, UsageError
from snipdedup.pictures.clip import encode_texts, fetching, first_line, open_clip_model
from snipdedup.pictures.preprocess import Preprocess, parse_preprocess, read_preprocess
from snipdedup.storage.atomic import sha256

if TYPE_CHECKING:
    from PIL import Image

BATCH = 32
SSCD = Preprocess((320, 320), resize="squash", interpolation="bilinear")  # of its README
SSCD_THRESHOLD = 0.75
CLIP_FROM = "the SNIP authors' ground truth for CLIP features"
SSCD_FROM = "its authors: 90 % precision of sscd_disc_mixup on DISC"
UNKNOWN = "none is known for this model: CLIP's stands in; choose one with snip threshold"
Run = Callable[[np.ndarray], np.ndarray]  # floats of a batch to (n, dim) floats


class Learned:
    """A model whose rows are what ``run`` makes of preprocessed pictures, with norm 1."""

    def __init__(
        self, name: str, run: Run, preprocess: Preprocess, weights: Path, threshold: float,
        threshold_from: str, texts: Callable[[list[str]], np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.run, self.preprocess, self.texts = name, run, preprocess, texts
        self.threshold, self.batch = threshold, BATCH
        sides = preprocess.scaled or preprocess.size
        self.size = 2 * max(sides)  # a JPEG drafted down to just what is needed would be blurred
        self.described: dict[str, Any] = {
            "name": name, "kind": name.partition(":")[0], "weights": weights.name,
            "weights_sha256": sha256(weights), "preprocess": preprocess.described(),
            "threshold_from": threshold_from,
        }  # fmt: skip
        probe = np.zeros((1, *preprocess.size, 3), np.uint8)
        self.dim = self.encode(probe).shape[1]

    @property
    def prepare(self) -> Callable[[Image.Image], np.ndarray]:
        """See `models.Model.prepare`."""
        return self.preprocess.apply

    def encode(self, prepared: np.ndarray) -> np.ndarray:
        """See `models.Model.encode`."""
        try:
            rows = self.run(self.preprocess.floats(prepared))
        except Exception as error:  # what a file of strangers does is not known
            raise SnipError(
                f"--model {self.name}: it fails on pictures of {self.preprocess.size}: "
                f"{first_line(error)}"
            ) from error
        if rows.ndim != 2 or len(rows) != len(prepared):
            raise SnipError(
                f"--model {self.name}: expected a vector a picture, ({len(prepared)}, dim), found "
                f"{rows.shape}; name another output, such as --preprocess output=NAME"
            )
        return unit(rows)

    def encode_texts(self, texts: list[str]) -> np.ndarray | None:
        """See `models.Model.encode_texts`."""
        return None if self.texts is None else unit(self.texts(texts))


def unit(rows: np.ndarray) -> np.ndarray:
    """Return rows with norm 1, float32; zero rows stay."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def torch_run(network: Any, device: str, call: Callable[[Any], Any] | None = None) -> Run:
    """Return what runs a network of torch; of several outputs, the first counts."""
    import torch
    from torch.jit import optimized_execution  # type: ignore[attr-defined]

    network = network.eval().to(device)
    call = call or network

    def run(floats: np.ndarray) -> np.ndarray:
        # without the optimiser of TorchScript, which changes last bits after some calls
        with torch.inference_mode(), optimized_execution(False):
            found = call(torch.from_numpy(floats).to(device))
            if isinstance(found, dict):
                found = next(iter(found.values()))
            while isinstance(found, list | tuple):
                found = found[0]
            return np.asarray(found.float().cpu().numpy())

    return run


def open_clip_pictures(
    spec: str, device: str, preprocess: str | None, *, download: bool, **_: Any
) -> Learned:
    """Open ``ARCHITECTURE/WEIGHTS`` of open_clip; it reads texts too."""
    if not all(spec.partition("/")[::2]):
        raise UsageError(
            f"--model clip:{spec}: expected clip:ARCHITECTURE/WEIGHTS, such as "
            "clip:ViT-B-32/laion2b_s34b_b79k"
        )
    name, clip = f"clip:{spec}", open_clip_model(spec, download=download, use="--model clip:")
    says: dict[str, Any] = {**clip.network.visual.preprocess_cfg, **clip.known}
    size = says["size"] if isinstance(says["size"], list | tuple) else (says["size"],) * 2
    base = Preprocess(
        tuple(size[-2:]), triple(says["mean"]), triple(says["std"]), says["resize_mode"],
        interpolation=says["interpolation"], fill=(says["fill_color"],) * 3,
    )  # fmt: skip
    base = parse_preprocess(preprocess, base) if preprocess else base
    run = torch_run(clip.network, device, clip.network.encode_image)

    def texts(given: list[str]) -> np.ndarray:
        return encode_texts(clip, spec, given, device)

    return Learned(name, run, base, clip.weights, THRESHOLD, CLIP_FROM, texts)


def triple(values: Any) -> tuple[float, ...]:
    """Return a value for each colour."""
    return tuple(values) if isinstance(values, list | tuple) else (values,) * 3


def open_timm(
    spec: str, device: str, preprocess: str | None, *, download: bool, **_: Any
) -> Learned:
    """Open a model of timm, ``NAME``, or with a checkpoint of one's own, ``NAME/FILE``."""
    try:
        import timm
        from timm.data.config import resolve_data_config
    except (ImportError, RuntimeError) as error:
        raise missing("timm", error) from error
    on_hub = spec.startswith(("hf-hub:", "hf_hub:"))
    if on_hub and not download:
        raise SnipError(f"--model timm:{spec}: it lies on Hugging Face's hub: needs --download")
    name, own = (spec, "") if on_hub else [*spec.split("/", 1), ""][:2]
    try:
        with fetching(download):
            network = timm.create_model(name, pretrained=False, num_classes=0)
    except Exception as error:
        raise SnipError(f"--model timm:{spec}: timm cannot make it: {first_line(error)}") from error
    weights = existing(f"timm:{spec}", own) if own else timm_weights(network, spec, download)
    try:
        if own:
            load_own(network, weights)
        else:
            overlay: Any = {"file": str(weights)}
            network = timm.create_model(
                name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay
            )
    except Exception as error:
        raise SnipError(
            f"--model timm:{spec}: {weights} does not fit: {first_line(error)}"
        ) from error
    says: dict[str, Any] = resolve_data_config({}, model=network)
    (high, wide), part = says["input_size"][1:], says["crop_pct"]
    base = Preprocess(
        (high, wide), says["mean"], says["std"],
        {"center": "shortest", "border": "longest"}.get(says["crop_mode"], says["crop_mode"]),
        (int(high / part), int(wide / part)),
        says["interpolation"], fill=tuple(round(255 * value) for value in says["mean"]),
    )  # fmt: skip
    base = parse_preprocess(preprocess, base) if preprocess else base
    return Learned(f"timm:{spec}", torch_run(network, device), base, weights, THRESHOLD, UNKNOWN)


def load_own(network: Any, weights: Path) -> None:
    """Load a checkpoint, whose last layer may be left over; all that the features need is there."""
    from timm.models import load_state_dict

    lost, left = network.load_state_dict(load_state_dict(str(weights)), strict=False)
    classifier = network.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    other = [key for key in left if not key.startswith(tuple(f"{each}." for each in names))]
    if lost or other:
        found = f"it lacks {lost[0]}" if lost else f"it has {other[0]}"
        raise ValueError(f"{found}, {len(lost)} tensors missing and {len(other)} too many")


def timm_weights(network: Any, spec: str, download: bool) -> Path:
    """Return the file of timm's own weights: cached, or downloaded if that is asked for."""
    import torch
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    known, failed = network.pretrained_cfg, ""
    repository, url = known.get("hf_hub_id"), known.get("url")
    names = ("model.safetensors", "pytorch_model.bin")
    for file in names if repository else ():
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    path = Path(torch.hub.get_dir()) / "checkpoints" / str(url or "none").rpartition("/")[2]
    if path.is_file():
        return path
    if not (repository or url):
        raise SnipError(f"--model timm:{spec}: timm has no weights for it; give timm:NAME/FILE")
    for file in names if download and repository else ():
        try:
            return Path(hf_hub_download(repository, file))
        except Exception as error:
            failed = first_line(error)
    if download and url and not repository:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
        return path
    raise SnipError(
        f"--model timm:{spec}: its weights cannot be downloaded: {failed}" if failed else
        f"--model timm:{spec}: its weights are not on this machine; fetch them with --download, or "
        f"name a file: timm:{spec}/FILE"
    )  # fmt: skip


def open_torchscript(spec: str, device: str, preprocess: str | None, **_: Any) -> Learned:
    """Open a TorchScript file; without other words, one named ``sscd`` is prepared as SSCD."""
    import torch

    weights, name = existing(f"torchscript:{spec}", spec), f"torchscript:{Path(spec).name}"
    is_sscd = "sscd" in weights.name.lower()
    how = preprocessing(name, weights, preprocess, SSCD if is_sscd else None)
    try:
        network = torch.jit.load(str(weights), map_location=device)
    except Exception as error:
        raise SnipError(f"--model {name}: torch cannot load it: {first_line(error)}") from error
    threshold = (SSCD_THRESHOLD, SSCD_FROM) if is_sscd else (THRESHOLD, UNKNOWN)
    return Learned(name, torch_run(network, device), how, weights, *threshold)


def open_onnx(spec: str, device: str, preprocess: str | None, *, threads: int, **_: Any) -> Learned:
    """Open an ONNX file; its weights must be inside it."""
    try:
        import onnxruntime
    except (ImportError, RuntimeError) as error:
        raise missing("onnx", error) from error
    weights, name = existing(f"onnx:{spec}", spec), f"onnx:{Path(spec).name}"
    how = preprocessing(name, weights, preprocess, None)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    wanted = [*(["CUDAExecutionProvider"] if device == "cuda" else []), "CPUExecutionProvider"]
    have = onnxruntime.get_available_providers()
    try:
        session = onnxruntime.InferenceSession(
            str(weights), options, [each for each in wanted if each in have]
        )
    except Exception as error:
        raise SnipError(
            f"--model {name}: onnxruntime cannot load it: {first_line(error)}"
        ) from error
    inputs, outputs = (
        [each.name for each in some()] for some in (session.get_inputs, session.get_outputs)
    )
    for kind, asked, there in (("input", how.input, inputs), ("output", how.output, outputs)):
        if asked is not None and asked not in there:
            raise SnipError(f"--model {name}: it has no {kind} {asked}; it has {', '.join(there)}")
    taken, made = how.input or inputs[0], how.output or outputs[0]
    half = session.get_inputs()[inputs.index(taken)].type == "tensor(float16)"

    def run(floats: np.ndarray) -> np.ndarray:
        given = floats.astype(np.float16) if half else floats
        return np.asarray(session.run([made], {taken: given})[0])

    return Learned(name, run, how, weights, THRESHOLD, UNKNOWN)


def preprocessing(
    name: str, weights: Path, given: str | None, base: Preprocess | None
) -> Preprocess:
    """Return the preprocessing that is given, else that of a JSON file beside the weights."""
    beside = (
        weights.with_name(f"{weights.name}.json"),
        weights.with_name("preprocessor_config.json"),
    )
    found = next((path for path in beside if path.is_file()), None)
    if found is not None:
        base = read_preprocess(found, base)
    if given is not None:
        base = parse_preprocess(given, base)
    if base is None:
        raise SnipError(
            f"--model {name}: how its pictures are prepared is not known; give --preprocess, or "
            f"write {beside[0].name} beside it"
        )
    return base


def existing(model: str, text: str) -> Path:
    """Return the path of a file that must be there."""
    path = Path(text).expanduser()
    if not path.is_file():
        raise SnipError(f"--model {model}: no such file: {path}")
    return path


def missing(extra: str, error: BaseException) -> SnipError:
    """Return the refusal of a model whose library is not installed."""
    library = {"onnx": "onnxruntime"}.get(extra, extra)
    return SnipError(
        f"--model {extra}: needs {library}, which cannot be imported ({error}); install it with: "
        f"pip install 'snipdedup-toolkit[{extra}]'"
    )


KINDS: dict[str, Callable[..., Learned]] = {
    "clip": open_clip_pictures, "timm": open_timm, "onnx": open_onnx,
    "torchscript": open_torchscript,
}  # fmt: skip
