"""Fingerprints: equal for equal keys only, whatever the type, the batch and the neighbours."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snipdedup.errors import SnipError
from snipdedup.metadata.join_by_key import fingerprints, number_equal

FILE = SimpleNamespace(path="m.parquet")


def marks_of(**columns):
    return fingerprints(FILE, pa.RecordBatch.from_pydict(columns))


def as_pairs(marks):
    return list(zip(*marks.tolist(), strict=True))


@given(st.lists(st.one_of(st.none(), st.text(max_size=40)), min_size=1, max_size=60))
def test_two_texts_have_one_fingerprint_exactly_if_they_are_equal(texts):
    marks, known = marks_of(url=pa.array(texts, pa.string()))
    assert known.tolist() == [bool(text) for text in texts]
    pairs = as_pairs(marks)
    for a, mark in zip(texts, pairs, strict=True):
        for b, other in zip(texts, pairs, strict=True):
            assert (mark == other) == ((a or "") == (b or ""))


def test_each_lane_alone_tells_300_000_texts_apart():
    texts = pa.array([f"https://example{i % 97}.org/{i:x}.jpg" for i in range(300_000)])
    marks, _ = marks_of(url=texts)
    assert [len(np.unique(lane)) for lane in marks] == [300_000, 300_000]
    bits = np.unpackbits(np.ascontiguousarray(marks[:, :100_000]).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 1e-3


@pytest.mark.parametrize("length", [*range(1, 26), 1000])
def test_every_byte_counts(length):
    base = bytes(range(1, 200)) * 6
    texts = [base[:length]]
    for place in range(length):
        changed = bytearray(base[:length])
        changed[place] ^= 0x80
        texts.append(bytes(changed))
    texts += [base[:length] + b"\0", base[: length - 1] + b"\0"]
    marks, _ = marks_of(hash=pa.array(texts, pa.binary()))
    assert len(set(as_pairs(marks))) == len(set(texts)) == len(texts)


def test_a_row_has_one_fingerprint_whatever_batch_and_type_it_is_in():
    texts = [f"t{'x' * (i % 37)}{i}" for i in range(500)]
    whole = marks_of(a=pa.array(texts))[0]
    for start, stop in ((0, 500), (7, 8), (100, 321)):
        part = marks_of(a=pa.array(texts)[start:stop])[0]
        np.testing.assert_array_equal(part, whole[:, start:stop])
    for kind in (pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())):
        np.testing.assert_array_equal(marks_of(a=pa.array(texts).cast(kind))[0], whole)
    numbers = pa.array([7, 12345678901, -3])
    np.testing.assert_array_equal(
        marks_of(a=numbers)[0], marks_of(a=pa.array(["7", "12345678901", "-3"]))[0]
    )


def test_columns_are_not_run_together():
    marks, known = marks_of(a=pa.array(["ab", "a", "x", None]), b=pa.array(["c", "bc", "", "y"]))
    assert len(set(as_pairs(marks))) == 4
    assert known.tolist() == [True, True, False, False]
    swapped, _ = marks_of(b=pa.array(["c"]), a=pa.array(["ab"]))
    assert as_pairs(swapped) != as_pairs(marks[:, :1])  # the order of the columns counts


def test_what_has_no_text_is_refused():
    with pytest.raises(SnipError, match=r"m\.parquet: column 'box' is struct"):
        marks_of(box=pa.array([{"x": 1}]))


def test_equal_fingerprints_have_one_number():
    high, low = np.array([[1, 1, 2, 1, 2], [5, 6, 5, 5, 5]], np.uint64)
    number = number_equal(high, low)
    assert number[0] == number[3]
    assert number[2] == number[4]
    assert sorted(np.unique(number)) == [0, 1, 2]
    assert number_equal(high[:0], low[:0]).tolist() == []
