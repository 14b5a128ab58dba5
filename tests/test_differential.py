"""Random small worlds: what the tool decides against a page of plain numpy.

A world is drawn from one number, its seed, which a failure names. ``SNIP_FUZZ_SECONDS=1800`` runs
the slow test for half an hour, ``SNIP_FUZZ_SEED`` says where it begins.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup import dedup, native
from snipdedup.features import scan
from snipdedup.groups import pairs, star
from snipdedup.join import (
    brute_force,
    calibration,
    encoding,
    forest,
    hubs,
    lists,
    model,
    tasks,
    tiles,
    verify,  # fmt: skip
)
from snipdedup.storage import external_sort

SECONDS = float(os.environ.get("SNIP_FUZZ_SECONDS", "75"))
SEED = int(os.environ.get("SNIP_FUZZ_SEED", "1000"))
KINDS = (np.float16, np.float32, np.float64)
HAZY = 1e-12  # so near to where float32 rounds up, float64 may fall on either side
# Sizes at which the tool changes its ways, and what a world may set them to.
SIZES = [
    ((model,), {"SINGLE_LIST_ROWS": [0]}),
    ((model,), {"LISTS_A_ROOT": [0.6, 2.0], "ROWS_A_CENTROID": [2, 48]}),
    ((model,), {"DIRECTION_ROWS": [16, 100], "CALIBRATION_ROWS": [(20, 60)]}),
    ((hubs,), {"HUB_ROWS": [4, 20, 60], "SAMPLE_COPIES": [2, 5], "SAMPLE_ROWS": [(30, 300)]}),
    ((tiles,), {"ROW_TILE": [8, 32], "CROWDED": [1 / 64, 0.3, 2.0]}),
    ((tiles, tasks), {"COLUMN_TILE": [16, 64]}),
    ((model,), {"PAIR_NS": [0.0, 1e9], "CHOICE_ROWS": [(16, 100)]}),  # wide codes or none
    ((verify, tiles), {"GATHER_PAIRS": [3, 50]}),
    ((brute_force, pairs), {"TILE": [4, 20, 32]}),  # pairs lays tiles of its size on those of exact
    ((brute_force,), {"DENSE": [0.0, 2.0]}),
    ((lists, calibration), {"ASSIGN_BLOCK": [5, 64]}),
    ((lists,), {"TABLE_LISTS": [0, 4]}),
    ((calibration,), {"PAIR_BLOCK": [9, 64]}),
    ((star,), {"TABLE_GROUP": [2, 10], "TABLE_BLOCK": [3, 20]}),
    ((star,), {"CODED_BLOCK": [3, 16]}),
    ((pairs,), {"LISTED_GROUP": [1, 5], "LISTED_PAIRS": [4, 90], "GATHER_PAIRS": [1, 30]}),
    ((external_sort,), {"HELD": [5, 50], "PARTS": [2, 8], "READ": [3, 40]}),
    ((forest,), {"HELD_EDGES": [5, 60], "BLOCK_EDGES": [3, 30], "BUFFER_EDGES": [4, 40]}),
    ((scan,), {"COMPARE_ROWS": [3, 20], "SORT_ROWS": [20, 200]}),
]  # fmt: skip


# The rules, as the documents say them.


def cosines(x):
    """All cosines, float64; 1 for rows equal bit for bit, -2 for rows that cannot be compared."""
    wide = x.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        wide = wide / np.abs(wide).max(1, keepdims=True, initial=0)
        norms = np.sqrt((wide * wide).sum(1))
        bad = ~(np.isfinite(norms) & (norms > 0))
        wide[bad], norms[bad] = 0, 1
        table = np.clip((wide @ wide.T) / np.outer(norms, norms), -1, 1)
    words = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")
    table[(words[:, None, :] == words[None, :, :]).all(2)] = 1
    table[bad], table[:, bad] = -2, -2
    return table


def is_hazy(cosine):
    """Whether float64 arithmetic could round these to another float32."""
    near = np.float32(cosine)
    up, down = (np.nextafter(near, np.float32(side)).astype(float) for side in (2, -3))
    middle = np.stack([(up + near) / 2, (down + near) / 2])
    return (np.abs(middle - cosine) < HAZY).any(0)


def plain_star(cosine, match, frozen, order):
    """Row by row: a row stays unless a row that stays is its pair; the first ``frozen`` stay."""
    staying = list(range(frozen))
    for row in order:
        if not match[row, staying].any():
            staying.append(int(row))
    stays = np.zeros(len(match), bool)
    stays[staying] = True
    named = np.arange(len(match))
    for row in np.flatnonzero(~stays):
        others = [other for other in staying if match[row, other]]
        best = max(cosine[row, others])
        named[row] = min(other for other in others if cosine[row, other] == best)
    return named, stays


def plain_components(cosine, match, frozen, order):
    """One row a component stays; none where a row of it matches one of the first ``frozen``."""
    label = labels(match[frozen:, frozen:]) + frozen
    stays, named = np.zeros(len(match), bool), np.arange(len(match))
    stays[:frozen] = True
    keeper = {}
    for row in np.arange(frozen, len(match)):
        if match[row, :frozen].any():
            best = np.where(match[row, :frozen], cosine[row, :frozen], -2)
            named[row] = int(np.argmax(best))
            group = label[row - frozen]
            keeper[group] = min(keeper.get(group, frozen), named[row])
    for row in order:
        group = label[row - frozen]
        if group not in keeper:
            keeper[group], stays[row] = row, True
        if not match[row, :frozen].any():
            named[row] = keeper[group]
    return named, stays


def labels(match):
    """The smallest row of each row's component, found breadth first."""
    label = np.full(len(match), -1)
    for row in range(len(match)):
        front = np.arange(row, row + 1) if label[row] < 0 else np.empty(0, int)
        while len(front):
            label[front] = row
            front = np.flatnonzero(match[front].any(0) & (label < 0))
    return label


def heaviest(cosine, match):
    """The cosines of a maximum spanning forest, ascending: Prim's method."""
    found, best, outside = [], np.full(len(match), -3.0), np.ones(len(match), bool)
    for _ in range(len(match)):
        row = int(np.argmax(np.where(outside, best, -4.0)))
        found.append(best[row])
        outside[row] = False
        best = np.maximum(best, np.where(match[row], cosine[row], -3.0))
    return np.sort([cosine_ for cosine_ in found if cosine_ > -3])


# Worlds.


def draw_rows(rng, rows, dim):
    """Rows of one of several kinds, float64, with copies, multiples, and zeros of either sign."""
    kind = rng.integers(5)
    if kind == 0:
        x = truth.clustered(rows, dim, rng.integers(1 << 30), clusters=int(rng.integers(1, 20)),
                            noise=rng.choice([0.1, 0.4, 1.0]), dtype=np.float64)  # fmt: skip
    elif kind == 1:  # small numbers: equal cosines, and right angles
        x = rng.integers(-2, 3, (rows, dim)).astype(float)
        x[~x.any(1), 0] = 1
    elif kind == 2:  # a chain along an arc
        turn = np.cumsum(rng.uniform(0, 0.3, rows))
        x = np.zeros((rows, dim))
        x[:, 0], x[:, -1] = np.cos(turn), np.sin(turn)
        x += 0.01 * rng.standard_normal(x.shape)
    else:  # masses, with rows around them
        centres = rng.standard_normal((int(rng.integers(1, 4)), dim))
        x = centres[rng.integers(0, len(centres), rows)]
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        away = rng.standard_normal(x.shape)
        radius = rng.choice([0.02, 0.1, 0.15, 0.5, 1.5], (rows, 1), p=[0.2, 0.6, 0.1, 0.05, 0.05])
        x = x + radius * away / np.linalg.norm(away, axis=1, keepdims=True)
    if rng.random() < 0.5:
        x *= rng.choice([1, 2, 3, 0.25, 100], (rows, 1))
    for factor in (1, 1, 2, 1.5):
        if rng.random() < 0.4:
            copy = rng.random(rows) < rng.choice([0.05, 0.3])
            x[copy] = factor * x[rng.integers(0, rows, copy.sum())]
    if rng.random() < 0.1:
        x[rng.random(rows) < 0.2, rng.integers(dim)] = -0.0
    return x[rng.permutation(rows)]


def spoil(rng, x):
    """Make some rows such that they cannot be compared."""
    x[rng.random(len(x)) < 0.1] = rng.choice([0, np.nan, np.inf])


def draw_threshold(rng, cosine):
    """A threshold: a usual one, 1, or the very cosine of two rows, or the next above it."""
    usual = [0.5, 0.8, 0.9, 0.95, 0.95, 0.99, 1.0]
    some = cosine[(cosine > 0.4) & (cosine < 1)]
    if not len(some) or rng.random() < 0.6:
        return float(rng.choice(usual))
    tie = np.float32(rng.choice(some))
    return float(tie if rng.random() < 0.7 else np.nextafter(tie, np.float32(1)))


@contextlib.contextmanager
def sizes(rng):
    """Set some of the sizes at which the tool changes its ways."""
    with contextlib.ExitStack() as stack:
        for modules, names in SIZES:
            if rng.random() < 0.5:
                for name, values in names.items():
                    value = values[rng.integers(len(values))]
                    for module in modules:
                        stack.enter_context(mock.patch.object(module, name, value))
        if rng.random() < 0.5:
            rows = int(rng.choice([7, 64, 300]))
            stack.enter_context(mock.patch.object(encoding, "task_rows", return_value=rows))
        stack.callback(native.use, native.used())
        native.use(str(rng.choice(native.names())))
        yield


class World:
    """One world: rows in parts, how they are compared, and where they lie."""

    def __init__(self, seed, folder):
        self.rng = rng = np.random.default_rng(seed)
        self.folder, self.kinds = folder, Counter()
        largest = 900 if rng.random() < 0.05 else 250
        parts = int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
        cuts = [int(np.exp(rng.uniform(0, np.log(largest)))) for _ in range(parts)]
        if rng.random() < 0.5:
            cuts = sorted(rng.integers(1, largest, parts).tolist(), reverse=True)
        dim = int(rng.choice([2, 3, 5, 8, 16, 24, 70]))
        x = draw_rows(rng, sum(cuts), dim)
        self.keeps_bad = rng.random() < 0.15
        if self.keeps_bad:
            spoil(rng, x)
        kind, other = rng.choice(KINDS), rng.choice(KINDS)
        same = rng.random() < 0.7
        self.parts = [part.astype(kind if same or rng.random() < 0.5 else other)
                      for part in np.split(x, np.cumsum(cuts)[:-1])]  # fmt: skip
        self.earlier = parts > 1 and rng.random() < 0.6  # references are earlier runs
        cosine = cosines(joined(self.parts))
        self.threshold = draw_threshold(rng, cosine)
        self.recall = float(rng.choice([1.0, 0.9], p=[0.9, 0.1]))
        self.text = None
        if parts == 1 and rng.random() < 0.25:
            self.text = draw_rows(rng, len(x), int(rng.choice([2, 6, 20]))).astype(
                rng.choice(KINDS)
            )
            if self.keeps_bad:
                spoil(rng, self.text)
            self.text_threshold = draw_threshold(rng, cosines(self.text))

        everything = [*self.parts, *([] if self.text is None else [self.text])]
        self.keeps_bad |= any((np.diag(cosines(part)) < 0).any() for part in everything)

    def how(self, number):
        """Settings of the run over one part."""
        rng = self.rng
        method = str(rng.choice(["join", "exact"], p=[0.75, 0.25]))
        how = {
            "threshold": self.threshold,
            "grouping": str(rng.choice(["star", "components"], p=[0.65, 0.35])),
            "keep": str(
                rng.choice(["first", "last", "max:q", "min:q,last"], p=[0.5, 0.3, 0.1, 0.1])
            ),
            "method": method,
            "threads": int(rng.choice([1, 2])),
            "bad_rows": "keep" if self.keeps_bad else "refuse",
            "chunk_rows": int(rng.choice([1, 50, 8192])),
            "seed": 3,
        }
        if method == "join":
            how["recall"] = self.recall
        if self.text is not None:
            how |= {"text_features": self.text, "text_threshold": self.text_threshold}
        on_disk = self.earlier or how["keep"] not in ("first", "last") or rng.random() < 0.3
        source = self.parts[number]
        if on_disk:
            source = str(self.save(number, source, how))
            if self.text is not None:
                np.save(self.folder / "text.npy", self.text)
                how["text_features"] = str(self.folder / "text.npy")
        if self.earlier or (on_disk and rng.random() < 0.3):
            how["out"] = str(self.folder / f"out{number}")
            how["keep_work"] = bool(rng.random() < 0.8)
        return source, how

    def save(self, number, x, how):
        """Write a part as shards, with a column to keep rows by where that is asked for."""
        folder = self.folder / f"part{number}"
        cuts = np.sort(self.rng.integers(0, len(x) + 1, self.rng.integers(0, 4)))
        truth.save_shards(folder / "img_emb", x, cuts)
        if ":" in how["keep"]:
            self.quality = self.rng.integers(0, 5, len(x))
            how["metadata"] = str(folder / "metadata")
            (folder / "metadata").mkdir()
            for place, part in enumerate(np.split(self.quality, cuts)):
                pq.write_table(
                    pa.table({"q": part}), folder / "metadata" / f"metadata_{place}.parquet"
                )
        return folder / "img_emb"

    def order(self, keep, rows):
        """The rows of a part in keep order."""
        if keep == "first":
            return np.arange(rows)
        if keep == "last":
            return np.arange(rows)[::-1]
        if keep == "max:q":
            return np.argsort(-self.quality, kind="stable")
        return np.lexsort((-np.arange(rows), self.quality))

    def run(self):
        """Run the tool over all parts, and hold each result against the plain rules."""
        fixed = [] if self.earlier else self.parts[:-1]
        numbers = range(len(self.parts)) if self.earlier else [len(self.parts) - 1]
        live, out = list(fixed), None
        for number in numbers:
            source, how = self.how(number)
            if out is not None:
                how["reference"] = out
            elif fixed:
                how["reference"] = list(fixed)
            if any(not np.isfinite(cosines(part)).all() or not len(part) for part in live):
                return
            with sizes(self.rng):
                found = dedup(source, **how)
                expected = self.judge(found, live, number, how)
                if expected is None:
                    return
                level = self.rng.choice([how["threshold"], (how["threshold"] + 1) / 2, 1.0])
                rule = str(self.rng.choice(["star", "components"]))
                later = how | {"threshold": float(level), "grouping": rule}
                self.judge(found.at(float(level), rule), live, number, later)
                on_disk = "out" in how and not fixed
                if on_disk and self.rng.random() < 0.4:
                    again = {"threshold": float(level), "grouping": rule,
                             "out": how["out"] + "again"}  # fmt: skip
                    self.judge(dedup(how["out"], **again), live, number, later)
            self.count(found, how)
            staying = self.parts[number][~found.is_dup & (np.diag(cosines(self.parts[number])) > 0)]
            live, out = [*live, staying], how.get("out")
            if not len(staying):
                return

    def count(self, found, how):
        """Count what kinds of world there were."""
        notes = found.search.notes
        self.kinds.update(
            runs=1, **{how["method"]: 1, how["grouping"]: 1},
            lists=notes.get("nlist", 1) > 1, masses=notes.get("masses", 0) > 0,
            kept=notes.get("model") == "kept", references="reference" in how,
            kept_masses=notes.get("model") == "kept" and notes.get("masses", 0) > 0,
            captions=self.text is not None, exactly_one=self.threshold == 1, bad=self.keeps_bad,
            removed=found.removed > 0, rows=found.rows,
        )  # fmt: skip

    def judge(self, found, live, number, how):
        """Hold a result against the plain rules; None where float64 cannot tell."""
        own = self.parts[number]
        everything = joined([*live, own])
        frozen = len(everything) - len(own)
        table, limit = cosines(everything), np.float32(how["threshold"])
        if is_threshold_hazy(table, limit):
            return None
        cosine = np.float32(table)
        match = cosine >= limit
        if self.text is not None:
            text, low = cosines(self.text), np.float32(self.text_threshold)
            if is_threshold_hazy(text, low):
                return None
            match &= np.float32(text) >= low
            match &= (text > -2) & (table > -2)
        order = self.order(how["keep"], len(own)) + frozen
        error = forest_error(found)
        apart = error > 0 and found.threshold > self.threshold
        if apart and not np.array_equal(found_labels(found), labels(match[frozen:, frozen:])):
            self.kinds["apart"] += 1
        else:
            apart = False
        if apart or (self.recall < 1 and "recall" in how):
            check_sound(found, cosine, match, frozen, how)
            return True
        rule = plain_star if how["grouping"] == "star" else plain_components
        named, stays = rule(cosine, match, frozen, order)
        assert found.is_dup.tolist() == (~stays[frozen:]).tolist()
        check_members(found, table, cosine, match, frozen, named)
        check_forest(found, table, cosine, match[frozen:, frozen:], frozen, error)
        return True


def joined(parts):
    """Parts as one array of the widest type."""
    return np.concatenate([part.astype(np.result_type(*parts)) for part in parts])


def is_threshold_hazy(table, limit):
    """Whether a cosine lies where float64 arithmetic may take it for a pair or not."""
    edge = (float(limit) + float(np.nextafter(limit, np.float32(-2)))) / 2
    return bool((np.abs(table - edge) < HAZY).any())


def numbers_of(members, frozen):
    """Representatives as places among reference rows and own ones."""
    named = members.representative
    return np.where(named < 0, ~named, named + frozen)


def check_members(found, table, cosine, match, frozen, named):
    """Groups, representatives, cosines and counts, row for row."""
    members, rows = found.members, len(match) - frozen
    label = labels(match[frozen:, frozen:])
    sizes = np.bincount(label, minlength=rows)
    beside = match[frozen:, :frozen].any(1)
    assert sorted(members.row) == np.flatnonzero((sizes[label] > 1) | beside).tolist()
    assert members.group.tolist() == label[members.row].tolist()
    row, other = members.row + frozen, numbers_of(members, frozen)
    wrong = other != named[row]
    wrong &= ~(is_hazy(table[row, other]) | is_hazy(table[row, named[row]]))
    assert not wrong.any(), (row[wrong] - frozen, other[wrong], named[row[wrong]])
    expected = np.where(members.is_dup, cosine[row, other], 1)
    differs = (members.similarity != expected) & ~is_hazy(table[row, other])
    assert not differs.any(), (members.row[differs], members.similarity[differs])
    limit = np.float32(found.threshold)
    assert found.chained == (members.similarity[members.is_dup] < limit).sum()
    if frozen:
        best = np.where(match[:, :frozen], cosine[:, :frozen], np.nan)
        near = np.array([np.nanmax(r) if ~np.isnan(r).all() else np.nan for r in best[row]])
        at = np.array([int(np.nanargmax(r)) if ~np.isnan(r).all() else 0 for r in best[row]], int)
        same = (found.near == near) | (np.isnan(found.near) & np.isnan(near))
        assert (same | is_hazy(table[row, at])).all()


def forest_error(found):
    """By how much the edges of a search may be below those of a maximum spanning forest.

    A mass has edges to its hub and within lists, and may fall apart at a higher threshold.
    """
    return np.inf if found.search.notes.get("masses", 0) else 0.0


def edges_at(found):
    """The forest of a result at its threshold: (a, b, similarity)."""
    edges = found.forest.to_pydict()
    a, b, similarity = (np.array(edges[name]) for name in ("a", "b", "similarity"))
    near = similarity >= np.float32(found.threshold)
    return a[near].astype(int), b[near].astype(int), similarity[near]


def found_labels(found):
    """The smallest row of each row's group, by the forest."""
    a, b, _ = edges_at(found)
    return truth.components(found.rows, zip(a, b, strict=True))


def check_forest(found, table, cosine, match, frozen, error):
    """The forest joins what pairs join, by their cosines; at most ``error`` below Kruskal's."""
    own = cosine[frozen:, frozen:]
    a, b, similarity = edges_at(found)
    assert match[a, b].all()
    assert labels(match).tolist() == found_labels(found).tolist()
    exactly = (similarity == own[a, b]) | is_hazy(table[a + frozen, b + frozen])
    assert exactly.all()
    below = heaviest(own, match) - np.sort(similarity)
    assert np.abs(below).max(initial=0) <= max(error, 2e-7), np.abs(below).max()


def check_sound(found, cosine, match, frozen, how):
    """What is removed goes rightly, whatever was missed."""
    members = found.members
    gone = members.is_dup
    row, other = members.row[gone] + frozen, numbers_of(members, frozen)[gone]
    assert np.array_equal(np.sort(members.row[gone]), np.flatnonzero(found.is_dup))
    own = other >= frozen
    assert not found.is_dup[other[own] - frozen].any()
    if how["grouping"] == "star":
        assert match[row, other].all()
    a, b, _ = edges_at(found)
    assert match[a + frozen, b + frozen].all()
    assert (np.abs(members.similarity[gone] - cosine[row, other]) < 1e-7).all()


def live_in(seed, folder):
    """Draw a world and live in it; what fails says which it was."""
    folder.mkdir()
    world = World(seed, folder)
    try:
        world.run()
    except Exception as error:
        raise AssertionError(f"world of seed {seed}: {type(error).__name__}: {error}") from error
    return world.kinds


def test_small_worlds(tmp_path: Path) -> None:
    for seed in range(12):
        live_in(seed, tmp_path / str(seed))


@pytest.mark.slow
def test_worlds_for_a_while(tmp_path: Path) -> None:
    start, kinds, seed = time.monotonic(), Counter(), SEED
    while time.monotonic() - start < SECONDS:
        kinds += live_in(seed, tmp_path / str(seed))
        shutil.rmtree(tmp_path / str(seed))
        seed += 1
    spent = time.monotonic() - start
    print(f"\n{seed - SEED:,} worlds, {(seed - SEED) / spent:.1f} a second: {dict(kinds)}")
    assert kinds["removed"]
