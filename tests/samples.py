"""Inputs that several test files make, and how they call the adc method."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import truth
from PIL import Image

from snipdedup import config
from snipdedup.adc.pairs import Rule, candidate_pairs
from snipdedup.features.shards import Features
from snipdedup.index.build import build
from snipdedup.index.folder import Index

CUTS = [300, 300, 900]  # one shard is empty


def metadata(rows, begin, columns):
    number = np.arange(begin, begin + rows)
    every = {
        "Key": pa.array([f"k{i:06d}" for i in number]),
        "uid": pa.array([f"u{i}" for i in number]),
        "n": pa.array(number, pa.int16()),
        "tags": pa.array([[str(i)] * (i % 3) for i in number], pa.list_(pa.string())),
    }
    table = pa.table({name: every[name] for name in columns})
    return table.replace_schema_metadata({"origin": "a crawl"})


def write_laion(folder, x, cuts=tuple(CUTS), columns=("n", "Key", "uid", "tags")):
    """A folder in the LAION layout: img_emb/ and metadata/, file for file."""
    truth.save_shards(folder / "img_emb", x, list(cuts))
    (folder / "metadata").mkdir()
    starts = [0, *cuts, len(x)]
    for part, (low, high) in enumerate(itertools.pairwise(starts)):
        table = metadata(high - low, low, columns)
        pq.write_table(table, folder / "metadata" / f"metadata_{part}.parquet", row_group_size=99)
    return folder


def clustered(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((20, dim))
    x = centres[rng.integers(0, 20, rows)] + 0.3 * rng.standard_normal((rows, dim))
    return x.astype(np.float32)


def with_copies(rows: int = 2000, copies: int = 300) -> np.ndarray:
    """Random directions; `copies` rows equal row 5, and each of rows 10 to 59 has a near copy."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((rows, 16)).astype(np.float32)
    x[rng.choice(np.arange(1000, rows), copies, replace=False)] = x[5]
    x[500:550] = x[10:60] + 0.02 * rng.standard_normal((50, 16))
    return x


def make(features: Features, out: Path, **given: object) -> Index:
    given = {"nlist": 16, "m": 4, "nbits": 8, "threads": 1, **given}
    return build(features, out, config.BuildIndex(features="x", out=str(out), **given))


def adc_settings(**given: object) -> config.Dedup:
    given = {"threshold": 0.95, "threads": 1, **given}
    return config.Dedup(features="x", index="x", method="adc", **given)


class Found(NamedTuple):
    """What `candidate_pairs` finds: its rule, all pairs (2, n), which rows are flagged."""

    rule: Rule
    pairs: np.ndarray
    flags: np.ndarray


def candidates(index: Index, features: Features | None, **given: object) -> Found:
    """`candidate_pairs`, by the row's own difference unless another rule is given."""
    options = adc_settings(**{"rule": "difference", **given})
    names = ("rule", "margin", "precision", "threshold", "calibration_rows", "k", "nprobe")
    rule, found = candidate_pairs(
        index, features, **{name: getattr(options, name) for name in names}, seed=0, encoder=None,
        work=index.folder.parent / "work", threads=options.threads,
    )  # fmt: skip
    flags, blocks = np.zeros(index.rows, bool), [np.empty((2, 0), np.int64)]
    for block in found:
        assert (block.a < block.b).all()
        blocks.append(np.stack([block.a, block.b]))
        assert len(np.unique(blocks[-1], axis=1).T) == len(block.a)
        flags[block.flagged] = True
    return Found(rule, np.unique(np.concatenate(blocks, axis=1), axis=1), flags)


def labels(pairs: np.ndarray, rows: int) -> np.ndarray:
    label = np.arange(rows)
    while (label[pairs[0]] != label[pairs[1]]).any():
        low = np.minimum(label[pairs[0]], label[pairs[1]])
        np.minimum.at(label, pairs[0], low)
        np.minimum.at(label, pairs[1], low)
    return label


def png(picture):
    """A picture, (height, width, 3) floats from 0 to 1, as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray((255 * picture).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
