"""Inputs that several test files make, and how they call the adc method."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import truth

from snipdedup import config
from snipdedup.deduplication import adc_method as chain
from snipdedup.deduplication.adc_method import adc_candidates
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


def make(features: Features, out: Path, **given: object) -> Index:
    given = {"nlist": 16, "m": 4, "nbits": 8, "threads": 1, **given}
    return build(features, out, config.Index(features="x", out=str(out), **given))


def wanted(**given: object) -> config.Dedup:
    return config.Dedup(**{"features": "x", "index": "x", "method": "adc", "threads": 1, **given})


def candidates(index: Index, features: Features | None, **given: object) -> chain.Adc:
    """`adc_candidates`, by the row's own difference unless told otherwise."""
    options = wanted(**{"rule": "difference", **given})
    return adc_candidates(index, features, options, index.folder.parent / "work")


def collected(adc: chain.Adc) -> np.ndarray:
    blocks = [np.stack(block) for block in adc.pairs()]
    for block in blocks:
        assert (block[0] < block[1]).all()
        assert len(np.unique(block, axis=1).T) == block.shape[1]
    return np.unique(np.concatenate(blocks, axis=1), axis=1)


def labels(pairs: np.ndarray, rows: int) -> np.ndarray:
    label = np.arange(rows)
    while (label[pairs[0]] != label[pairs[1]]).any():
        low = np.minimum(label[pairs[0]], label[pairs[1]])
        np.minimum.at(label, pairs[0], low)
        np.minimum.at(label, pairs[1], low)
    return label
