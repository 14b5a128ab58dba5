"""From a picture to the input of a learned model: resize, crop, scale, and where that is written.

It is what torchvision's ``Resize``, ``CenterCrop``, ``ToTensor`` and ``Normalize`` do to a Pillow
picture. Worker processes resize and crop; the floats are made where the model runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from snipdedup.errors import SnipError, UsageError

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZES = ("shortest", "squash", "longest")
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # as Pillow counts
CHANNELS, LAYOUTS = ("rgb", "bgr"), ("nchw", "nhwc")
WORDS = "size=224 mean=0.5,0.5,0.5 std=0.5,0.5,0.5 resize=squash"  # an example
LARGEST_SIDE = 8192  # pixels of what a model takes
WHOLE_PIXELS = 1 << 24  # of a resized picture; of a larger one only the part that is kept is made
REACH = 3  # pixels on each side that the widest interpolation reads, lanczos
THEIRS = {
    "mean": "image_mean", "std": "image_std", "scale": "rescale_factor",
    "interpolation": "resample",
}  # fmt: skip


@dataclass(frozen=True)
class Preprocess:
    """What is done to a picture before a model.

    Attributes
    ----------
    size : (int, int)
        Height and width of what the model takes.
    resize : str
        ``shortest``: scale to cover ``scaled``, then cut out the middle; ``squash``: scale each
        side to ``scaled``, then the same; ``longest``: fit into ``scaled``, then add borders.
    scaled : (int, int) or None
        Height and width before the middle is cut out; None: ``size``.
    mean, std : (3,) float
        Of each colour, after bytes were multiplied by ``scale``.
    input, output : str or None
        Names in an ONNX file; None: the first.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: str = "shortest"
    scaled: tuple[int, int] | None = None
    interpolation: str = "bicubic"
    scale: float = 1 / 255
    fill: tuple[int, ...] = (0, 0, 0)
    channels: str = "rgb"
    layout: str = "nchw"
    input: str | None = None
    output: str | None = None

    def apply(self, picture: Image.Image) -> np.ndarray:
        """Return an RGB picture resized and cut, (height, width, 3) uint8."""
        from PIL import Image

        way = Image.Resampling[self.interpolation.upper()]
        high, wide = self.size
        goal = self.resized(picture.size, self.scaled or self.size)
        left, top = middle(goal[0], wide), middle(goal[1], high)
        part = max(left, 0), max(top, 0), min(left + wide, goal[0]), min(top + high, goal[1])
        canvas = Image.new("RGB", (wide, high), self.fill)
        canvas.paste(resize_part(picture, goal, part, way), (max(-left, 0), max(-top, 0)))
        pixels = np.asarray(canvas)
        return pixels[:, :, ::-1].copy() if self.channels == "bgr" else pixels

    def resized(self, size: tuple[int, int], goal: tuple[int, int]) -> tuple[int, int]:
        """Return the (width, height) that a picture of ``size`` is scaled to."""
        (wide, high), (goal_high, goal_wide) = size, goal
        if self.resize == "squash":
            return goal_wide, goal_high
        if self.resize == "longest":
            ratio = max(wide / goal_wide, high / goal_high)
            return max(1, round(wide / ratio)), max(1, round(high / ratio))
        if goal_high == goal_wide:  # torchvision cuts the longer side off to a whole number
            if wide <= high:
                return goal_wide, int(goal_wide * high / wide)
            return int(goal_high * wide / high), goal_high
        ratio = min(wide / goal_wide, high / goal_high)
        return round(wide / ratio), round(high / ratio)

    def floats(self, prepared: np.ndarray) -> np.ndarray:
        """Return what the model takes, float32, of (n, height, width, 3) uint8."""
        values = prepared.astype(np.float32) * np.float32(self.scale)
        values -= np.asarray(self.mean, np.float32)
        values /= np.asarray(self.std, np.float32)
        if self.layout == "nchw":
            values = values.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(values)

    def described(self) -> dict[str, Any]:
        """Return all settings as JSON values, for a manifest."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found


def resize_part(
    picture: Image.Image, goal: tuple[int, int], part: tuple[int, int, int, int],
    way: Image.Resampling,
) -> Image.Image:  # fmt: skip
    """Return a part, (left, top, right, bottom), of a picture resized to ``goal``.

    Of a long and thin picture that would become huge, only what the part needs is resized.
    """
    if goal[0] * goal[1] <= WHOLE_PIXELS:
        return picture.resize(goal, way).crop(part)
    ratios = [old / new for old, new in zip(picture.size, goal, strict=True)]
    box = [edge * ratios[n % 2] for n, edge in enumerate(part)]
    near = [REACH * max(ratio, 1) + 1 for ratio in ratios]
    left, top = (max(int(box[n] - near[n]), 0) for n in (0, 1))
    right, bottom = (min(math.ceil(box[n + 2] + near[n]), picture.size[n]) for n in (0, 1))
    inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    size = part[2] - part[0], part[3] - part[1]
    return picture.crop((left, top, right, bottom)).resize(size, way, box=inner)


def middle(length: int, kept: int) -> int:
    """Return where the middle begins, as torchvision does; below 0 if there is less than kept."""
    return round((length - kept) / 2) if length >= kept else -((kept - length) // 2)


def parse_preprocess(given: str, base: Preprocess | None = None) -> Preprocess:
    """Return what a JSON file, or words such as `WORDS`, say; ``base`` holds what they do not."""
    path = Path(given).expanduser()
    if "=" not in given or path.is_file():
        return read_preprocess(path, base)
    values: dict[str, Any] = {}
    for word in given.split():
        name, equals, text = word.partition("=")
        if not equals or not text:
            raise UsageError(f"--preprocess: expected NAME=VALUE, such as {WORDS}, found {word!r}")
        values[name] = text.split(",") if "," in text else text
    return checked(values, "--preprocess", base, UsageError)


def read_preprocess(path: Path, base: Preprocess | None = None) -> Preprocess:
    """Return what a JSON file says: our own names, or those of Hugging Face's image processors."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SnipError(f"{path}: expected JSON with the preprocessing: {error}") from error
    if not isinstance(body, dict):
        raise SnipError(f"{path}: expected a JSON object, found {type(body).__name__}")
    theirs = any(name.startswith(("do_", "image_")) for name in body)
    if not theirs:
        return checked(body, str(path), base, SnipError)
    values, names = from_processor(body, path)
    return checked(values, str(path), base, SnipError, names)


def from_processor(body: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of a Hugging Face ``preprocessor_config.json`` by our names.

    Also return by which key of the file each of them is written, where that differs.
    """
    cut = body.get("crop_size") is not None and body.get("do_center_crop", False)
    size, shape = sides(body, "size", path)
    crop = sides(body, "crop_size", path)[0] if cut else size
    values: dict[str, Any] = {"resize": shape, "size": crop, "scaled": size}
    if body.get("do_normalize", True):
        values |= {"mean": body.get("image_mean"), "std": body.get("image_std")}
    else:
        values |= {"mean": (0, 0, 0), "std": (1, 1, 1)}
    scaled = body.get("do_rescale", True)
    values["scale"] = body.get("rescale_factor", 1 / 255) if scaled else 1
    way = body.get("resample", 3)
    numbered = isinstance(way, int) and 0 <= way < len(INTERPOLATIONS)
    values["interpolation"] = INTERPOLATIONS[way] if numbered else way
    names = THEIRS | {"size": "crop_size" if cut else "size", "scaled": "size"}
    return {name: value for name, value in values.items() if value is not None}, names


def sides(body: dict[str, Any], key: str, path: Path) -> tuple[Any, str]:
    """Return height and width, or one number, that a key has; and how a picture gets that size."""
    value = body.get(key)
    if not isinstance(value, dict):
        return value, "shortest"
    if "height" in value and "width" in value:
        return (value["height"], value["width"]), "squash"
    if "shortest_edge" in value:
        return value["shortest_edge"], "shortest"
    raise SnipError(
        f"{path}: {key}: expected height and width, or shortest_edge, found {value!r:.200}"
    )


def checked(
    values: dict[str, Any], where: str, base: Preprocess | None, refusal: type[SnipError],
    names: Mapping[str, str] = MappingProxyType({}),
) -> Preprocess:  # fmt: skip
    """Return settings by their names, each of its type.

    For refusals: ``where`` they stand, by which ``names`` if not by ours.
    """
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in READ:
            raise refusal(f"{where}: preprocessing has no {name!r}; it has {', '.join(READ)}")
        try:
            given[name] = READ[name](value)
        except (TypeError, ValueError) as error:
            label = names.get(name, name)
            raise refusal(f"{where}: {label}: expected {error}, found {value!r:.200}") from error
    if base is not None:
        return dataclasses.replace(base, **given)
    if "size" not in given:
        raise refusal(f"{where}: the preprocessing needs a size, such as size=224")
    return Preprocess(**given)


def numbers(
    kind: type, count: int, *, least: float = -np.inf, most: float = 1e30
) -> Callable[[Any], Any]:
    """Return what reads so many numbers; one is taken for all."""

    def read(value: Any) -> tuple[Any, ...]:
        many = list(value) if isinstance(value, list | tuple) else [value] * count
        try:
            found = tuple(kind(each) for each in many)
        except (TypeError, ValueError, OverflowError):
            found = ()
        if len(found) != count or not all(least <= each <= most for each in found):
            above = "" if least == -np.inf else f" from {least:g} on"
            below = "" if most > LARGEST_SIDE else f", {most:,} at most"
            raise ValueError(f"one or {count} numbers{above}{below}")
        return found

    return read


def choice(names: tuple[str, ...]) -> Callable[[Any], str]:
    """Return what reads one of some names."""

    def read(value: Any) -> str:
        if str(value).lower() not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return str(value).lower()

    return read


READ: dict[str, Callable[[Any], Any]] = {
    "size": numbers(int, 2, least=1, most=LARGEST_SIDE),
    "scaled": numbers(int, 2, least=1, most=LARGEST_SIDE),
    "mean": numbers(float, 3), "std": numbers(float, 3, least=1e-6),
    "scale": lambda value: numbers(float, 1)(value)[0], "fill": numbers(int, 3, least=0, most=255),
    "resize": choice(RESIZES), "interpolation": choice(INTERPOLATIONS),
    "channels": choice(CHANNELS), "layout": choice(LAYOUTS), "input": str, "output": str,
}  # fmt: skip
