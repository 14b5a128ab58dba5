"""Let torchvision be imported beside a torch that is not of the same build.

PyPI's torchvision needs CUDA's libraries for its operators. Beside a torch for CPUs only it cannot
load them, and its import ends where it describes one of them. open_clip and timm import it, but use
none of its operators for what is tested here.
"""

from __future__ import annotations

import importlib
import sys

import torch

KEPT = []  # a library's definitions end with it
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def define_missing() -> None:
    """Define the operators that torchvision describes on import, where it lacks its own."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(operator)
        KEPT.append(library)
        importlib.import_module("torchvision")
