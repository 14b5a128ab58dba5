"""Groups decided a block at a time: a run writes the same bytes, whatever memory holds."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.config import Dedup
from snipdedup.deduplication.run import run
from snipdedup.groups.members import (
    Block,
    Members,
    Nearest,
    blocks_of_groups,
    cut_groups,
    slices,
)
from snipdedup.join import forest as forests
from snipdedup.join.forest import join_edges, make_edges, spanning_forest
from snipdedup.storage import external_sort

CUTS = [400, 1500]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows with many groups, and metadata whose columns decide, in files of their own cuts."""
    folder = tmp_path_factory.mktemp("blocks") / "set"
    x = truth.clustered(2000, 12, 3, clusters=500, noise=0.5, copies=0.15, dtype=np.float16)
    truth.save_shards(folder / "img_emb", x, CUTS)
    (folder / "metadata").mkdir()
    rng = np.random.default_rng(0)
    table = pa.table({
        "key": [f"k{row}" for row in range(2000)],
        "url": [f"u{row % 90}" for row in range(2000)],
        "caption": [f"c{row % 300}" if row % 7 else None for row in range(2000)],
        "width": rng.integers(0, 9, 2000),
        "score": rng.random(2000).round(2),
    })  # fmt: skip
    for part, (low, high) in enumerate(((0, 400), (400, 1500), (1500, 2000))):
        path = folder / "metadata" / f"m_{part}.parquet"
        pq.write_table(table.slice(low, high - low), path, row_group_size=150)
    return folder


def narrow():
    """Let memory hold next to nothing."""
    return (
        mock.patch.multiple(external_sort, HELD=60, PARTS=5, READ=37),
        mock.patch.object(forests, "HELD_EDGES", 60),
    )


def contents(out):
    """The bytes of all files but the manifest."""
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if name.name != "snip.json"}


WAYS = [
    {},
    {"grouping": "components"},
    {"method": "exact", "pairs": True},
    {"method": "semdedup", "clusters": 3, "borders": False},
    {"keep": "max:width,min:score,random", "seed": 3},
    {"keep": "last", "weights": True},
    {"merge_captions": 3, "export": "keys"},
    pytest.param({"keep_fraction": 0.8}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way) or "plain")
def test_what_memory_holds_changes_no_byte(folder, tmp_path, way):
    def write(name):
        asked = {"features": str(folder), "threshold": 0.9, "out": str(tmp_path / name), **way}
        return str(run(Dedup(**asked))).partition("seconds:")[0]

    said = write("whole")
    first, second = narrow()
    with first, second:
        assert write("cut") == said
    found, expected = contents(tmp_path / "cut"), contents(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert found[name] == data, name
    assert pq.read_metadata(tmp_path / "whole" / "groups.parquet").num_rows > 500


@pytest.mark.parametrize("grouping", ["star", "components"])
def test_rows_of_references_too(folder, tmp_path, grouping):
    first, shards = tmp_path / "first", folder / "img_emb"
    run(Dedup(features=str(shards / "img_emb_0.npy"), threshold=0.9, out=str(first)))

    def write(name):
        asked = {"reference": str(first), "threshold": 0.9, "grouping": grouping}
        asked["features"] = [str(shards / f"img_emb_{part}.npy") for part in (1, 2)]
        run(Dedup(**asked, out=str(tmp_path / name)))

    write("whole")
    one, other = narrow()
    with one, other:
        write("cut")
    names = ("is_dup.npy", "forest.parquet", "groups.parquet", "histogram.parquet")
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    groups = pq.read_table(tmp_path / "whole" / "groups.parquet")
    assert groups["reference"].null_count < groups.num_rows


@given(
    pairs=st.lists(
        st.tuples(st.integers(0, 59), st.integers(0, 59)).filter(lambda e: e[0] != e[1]),
        max_size=70,
    ),
    held=st.integers(1, 30),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_blocks_hold_whole_groups_and_lose_nothing(tmp_path_factory, pairs, held, seed):
    rng = np.random.default_rng(seed)
    a, b = np.array(pairs, np.int64).reshape(-1, 2).T
    forest = spanning_forest(make_edges(a, b, rng.choice([0.9, 0.95, 1], len(a))))
    firsts, near = rng.integers(0, 60, 9), np.unique(rng.integers(0, 70, 6))
    known = Block(
        forest,
        np.arange(60, 69),
        firsts,
        Nearest(near, np.arange(len(near)) + (5 << 32), np.full(len(near), 0.97, np.float32)),
    )
    linked = [
        *zip(*known.forest.at(0.95)[:2], strict=True),
        *zip(firsts, known.copies, strict=True),
    ]
    label = truth.components(70, [tuple(map(int, pair)) for pair in linked])
    with mock.patch.multiple(external_sort, HELD=held, PARTS=3, READ=5):
        found = list(blocks_of_groups(known, 0.95, 70, tmp_path_factory.mktemp("b")))
    seen = set()
    for block in found:
        rows = np.concatenate([*block.forest[:2], block.copies, block.originals, block.nearest.row])
        here = set(label[rows].tolist())
        assert not here & seen
        assert not seen or min(here, default=99) > max(seen)
        seen |= here
    whole = known.at(0.95)
    forest = join_edges([block.forest for block in found])
    assert sorted(zip(*forest, strict=True)) == sorted(zip(*whole.forest, strict=True))
    for name in ("copies", "originals"):
        parts = [getattr(block, name) for block in found]
        order = np.argsort(np.concatenate([block.copies for block in found]))
        assert np.concatenate(parts)[order].tolist() == getattr(known, name).tolist()
    nearest = np.concatenate([np.stack(block.nearest[:2]) for block in found], axis=1)
    assert sorted(nearest.T.tolist()) == np.stack(known.nearest[:2]).T.tolist()


@given(sizes=st.lists(st.integers(1, 9), max_size=30), held=st.integers(1, 12))
def test_slices_cut_no_group(sizes, held):
    group = np.repeat(np.arange(len(sizes)) * 3, sizes)
    members = Members(np.arange(len(group)), group, group, group * 1.0, group > 3)
    with mock.patch.object(external_sort, "HELD", held):
        cuts, parts = cut_groups(group), list(slices(members))
    assert (cuts[0], cuts[-1]) == (0, len(group))
    assert np.concatenate([part.row for part in parts]).tolist() == list(range(len(group)))
    ends = [set(part.group.tolist()) for part in parts]
    assert sum(map(len, ends)) == len(sizes)
    assert all(len(part.row) <= held or len(set(part.group.tolist())) == 1 for part in parts)
