"""Work in order, whatever the threads; progress that a log file can hold."""

from __future__ import annotations

import threading
import time

import faiss
import numpy as np
import pytest
import torch

from snipdedup import parallel, progress
from snipdedup.errors import SnipError
from snipdedup.parallel import cores, library_threads, ordered_map, pick_device


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(threads):
    def work(item):
        time.sleep(0.003 * (item % 3))
        return item * item

    assert list(ordered_map(work, range(20), threads)) == [i * i for i in range(20)]


def test_no_items():
    assert list(ordered_map(lambda item: item, [], 2)) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_items_are_taken_only_as_fast_as_results_are(threads):
    taken = []

    def items():
        for item in range(100):
            taken.append(item)
            yield item

    results = ordered_map(lambda item: item, items(), threads)
    for done in range(10):
        assert next(results) == done
        assert len(taken) <= done + 2 * threads
    results.close()
    assert len(taken) <= 9 + 2 * threads


def test_no_more_than_that_many_run_at_once():
    lock, running, most = threading.Lock(), 0, 0

    def work(item):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1

    list(ordered_map(work, range(12), 3))
    assert most <= 3


def test_an_error_in_the_work_comes_out_and_stops_the_rest():
    seen = []

    def work(item):
        seen.append(item)
        if item == 3:
            raise SnipError("row 3 is bad")
        return item

    results = ordered_map(work, range(1000), 2)
    with pytest.raises(SnipError, match="row 3 is bad"):
        list(results)
    assert len(seen) < 20


def test_libraries_run_single_threaded_inside_and_as_before_afterwards():
    before = torch.get_num_threads(), faiss.omp_get_max_threads()

    def look(_):
        return torch.get_num_threads(), faiss.omp_get_max_threads()

    assert set(ordered_map(look, range(6), 2)) == {(1, 1)}
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == before
    with library_threads(3):
        assert look(0) == (3, 3)
    assert look(0) == before


def test_cores(monkeypatch):
    assert cores(7) == 7
    assert cores() >= 1


def test_devices(monkeypatch):
    assert isinstance(parallel.has_cuda_driver(), bool)
    monkeypatch.setattr(parallel, "has_cuda_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    assert pick_device("cpu") == "cpu"
    with pytest.raises(SnipError, match="--device cuda: torch sees no CUDA device"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for driver in (True, False):
        monkeypatch.setattr(parallel, "has_cuda_driver", lambda driver=driver: driver)
        assert pick_device("auto") == ("cuda" if driver else "cpu")
    assert pick_device("cuda") == "cuda"


def test_short_work_prints_nothing_and_long_work_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.bar(40, "reading", "rows") as bar:
        for _ in range(40):
            now[0] += 1.0
            bar.update(1)
            bar.set_postfix_str("loss 0.1")
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 4
    assert lines[0] == "reading [loss 0.1]: 10 of 40 rows, 1 rows/s, 30 s left"
    assert list(progress.track("abc", "reading", "rows", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_block_sees_each_row_at_its_place_whatever_is_around_it():
    seen = []

    def work(block):
        seen.append(block)
        return (block[:, 0] * 10, np.arange(parallel.ALIGNED_ROWS))

    rows = np.arange(1, 2001, dtype=np.float32)[:, None]
    value, place = parallel.in_aligned_blocks(work, rows, parallel.ALIGNED_ROWS - 3)
    assert [block.shape for block in seen] == [(parallel.ALIGNED_ROWS, 1)] * 3
    np.testing.assert_array_equal(value, rows[:, 0] * 10)
    np.testing.assert_array_equal(place, (np.arange(2000) - 3) % parallel.ALIGNED_ROWS)
    assert (seen[0][: parallel.ALIGNED_ROWS - 3] == 0).all()
