"""Workers: their order, their bounds, and pictures that end them."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
from odd_files import encoded, photo

from snipdedup.errors import SnipError
from snipdedup.pictures import workers
from snipdedup.pictures.items import Item
from snipdedup.pictures.reading import Failure, ReadSettings, Row
from snipdedup.pictures.workers import Workers

BOUND = 10**6


def corner(picture):
    """Stands for a model's `prepare`, with faults where a picture's first pixel asks for them."""
    red, green, _ = picture.getpixel((0, 0))
    if (red, green) == (255, 0):
        os.kill(os.getpid(), signal.SIGSEGV)
    if (red, green) == (0, 255):
        os._exit(3)
    if (red, green) == (1, 1):
        time.sleep(0.4)
    if (red, green) == (2, 2):
        raise ValueError("not today")
    return np.full((5,), red, np.int32)


def item(number, colour=None):
    picture = photo(number, (8, 8))
    if colour:
        picture.putpixel((0, 0), colour)
    return Item(f"k{number}", {"path": f"/p{number}"}, encoded(picture, "PNG"))


@pytest.fixture(params=[1, 3])
def pool(request):
    made = Workers(ReadSettings(corner, 16, BOUND, None), request.param)
    yield made
    made.close()


def test_results_come_in_order_whoever_is_faster(pool):
    items = [item(n, (1, 1, 0) if n in (0, 9) else (n, 7, 7)) for n in range(40)]
    found = list(pool.results(iter(items)))
    assert [row.values["key"] for row in found] == [f"k{n}" for n in range(40)]
    reds = [1 if n in (0, 9) else n for n in range(40)]
    assert [row.prepared.tolist() for row in found] == [[red] * 5 for red in reds]
    assert list(pool.results(iter([]))) == []
    assert [row.values["key"] for row in pool.results(iter(items[:3]))] == ["k0", "k1", "k2"]


def test_a_picture_that_ends_its_process_costs_that_picture_only(pool):
    ends = {3: (255, 0, 0), 4: (255, 0, 0), 11: (0, 255, 0), 19: (255, 0, 9)}
    items = [item(n, ends.get(n, (n, 7, 7))) for n in range(20)]
    found = list(pool.results(iter(items)))
    assert [type(result) is Failure for result in found] == [n in ends for n in range(20)]
    assert found[3] == Failure("/p3", "k3", "ended the decoder: SIGSEGV")
    assert found[11].reason == "ended the decoder: exit status 3"


def test_a_process_that_is_killed_from_outside_costs_nothing(pool):
    items = [item(n, (1, 1, 0) if n % 4 == 0 else (n, 7, 7)) for n in range(24)]
    results = pool.results(iter(items))
    found = [next(results)]
    for worker in pool.processes:
        if worker is not None:
            worker.process.kill()
    found += results
    assert all(isinstance(result, Row) for result in found)
    assert [row.values["key"] for row in found] == [f"k{n}" for n in range(24)]


def test_a_fault_of_the_model_is_a_reason(pool):
    assert list(pool.results([item(0, (2, 2, 0))])) == [
        Failure("/p0", "k0", "fault: ValueError: not today")
    ]


def test_a_picture_that_takes_forever_fails(pool, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE_S", 0.2)
    found = list(pool.results([item(0), item(1, (1, 1, 0)), item(2)]))
    assert found[1].reason.startswith("ended the decoder: nothing came for 0.2 s")
    assert [type(result) for result in found] == [Row, Failure, Row]


def test_what_waits_for_its_turn_is_bounded(pool, monkeypatch):
    monkeypatch.setattr(workers, "HELD_BYTES", 100)  # five rows
    read = []

    def items():
        for n in range(200):
            read.append(n)
            yield item(n, (n, 7, 7))

    results = pool.results(items())
    next(results)
    time.sleep(1)
    assert len(read) <= 16 * len(pool.processes) + 8 + 6  # sent ahead, on the way, held
    assert len(list(results)) == 199


def test_who_stops_early_leaves_no_threads(pool):
    before = threading.active_count()
    results = pool.results(item(n) for n in range(500))
    next(results)
    results.close()
    assert threading.active_count() == before
    assert pool.processes == [None] * len(pool.processes)


def test_a_pool_that_was_stopped_early_answers_what_it_is_asked_next(pool):
    colours = photo(0, (8, 8))
    data = encoded(colours, "PNG")
    for turn in range(6):
        results = pool.results(Item(f"old {n}", {"path": "/p"}, data) for n in range(200))
        for _ in range(1 + 10 * turn):
            next(results)
        results.close()
        asked = [Item(f"new {n}", {"path": "/p"}, data) for n in range(3)]
        found = [row.values["key"] for row in pool.results(asked)]
        assert found == ["new 0", "new 1", "new 2"]


class Hasty(workers.Board):
    """A board that is read by somebody who waits, when stopped, until all threads have left."""

    @property
    def stopped(self):
        return self.is_stopped

    @stopped.setter
    def stopped(self, value):
        self.is_stopped = value
        if value:
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.threads, 10)


def test_threads_that_leave_at_once_leave_no_answers(pool, monkeypatch):
    monkeypatch.setattr(workers, "HELD_BYTES", 100)
    monkeypatch.setattr(workers, "Board", Hasty)
    results = pool.results(item(n) for n in range(500))
    next(results)
    time.sleep(0.5)  # threads wait for a place
    results.close()
    assert [row.values["key"] for row in pool.results([item(7)])] == ["k7"]


def test_a_fault_while_items_are_listed_is_raised(pool):
    def items():
        yield item(0)
        raise SnipError("the tar is gone")

    with pytest.raises(SnipError, match="the tar is gone"):
        list(pool.results(items()))


class Unknown:
    def __reduce__(self):
        return __import__, ("a_module_that_is_not_there",)


def test_a_process_that_cannot_start_says_why():
    pool = Workers(ReadSettings(Unknown(), 16, BOUND, None), 1)
    with pytest.raises(SnipError, match=r"cannot start: ModuleNotFoundError: .*a_module_that"):
        list(pool.results([item(0)]))
