"""The law of growth: cases worked by hand, and that more is never cheaper."""

from __future__ import annotations

import dataclasses
import math

import pytest

from snipdedup.evaluation import costs
from snipdedup.evaluation.costs import Job, Rates, count, estimate
from snipdedup.join.model import CALIBRATION_ROWS

GB = 10**9
# Every second-rate is 1 of something else, so that sums can be worked by hand.
RATES = Rates(
    dim=100, itemsize=2, width=128, start=2.0, fit=1.0, fit_row=1e-6, nearest=1e-9, row=1e-6,
    row_list=1e-9, row_visit=1e-7, copy=1e-7, spill=1e-6, opened=1e-4, visit=1e-7, product=1e-10,
    tile=1e-5, prove=1e-6, crowd=1e-8, edge=1e-7, member=1e-6, written=1e-7, gain=0.5,
    lists=(500.0, 2000.0), visits=(3.0, 6.0), uneven=1.0, false_pairs=0.0, crowded_pairs=0.0,
    visit_bytes=140.0, edge_bytes=20.0, member_bytes=30.0, base=2e8,
)  # fmt: skip
JOB = Job(
    rows=1_000_000, dim=100, itemsize=2, duplicates=0.3, cores=2, nodes=1, memory=16 * GB,
    bound=4 * GB,
)  # fmt: skip


@pytest.fixture(autouse=True)
def roots(monkeypatch):
    """As many lists as the root of the rows: round numbers."""
    monkeypatch.setattr(costs, "list_count", lambda rows: round(rows**0.5))


def test_a_million_rows_worked_by_hand():
    number = count(JOB, RATES)
    assert number.lists == 1000
    assert (number.sample, number.trained) == (32_768, 48_000)
    assert number.visits == pytest.approx(1e6 * 3 * 2**0.5)  # half way, by factors, from 3 to 6
    # each list: 1000 at home, against one another once, and with those who come
    assert number.products == pytest.approx(1000 * (number.visits - 500_000))
    assert number.listed == pytest.approx(2 * 1.25 * 300_000)
    assert number.tasks == math.ceil(1_000_000 / 32_768)
    stages = {stage.name: stage for stage in estimate(JOB, RATES).stages}
    assert stages["fit"].seconds == pytest.approx(1 + 0.080768)
    assert stages["k-means"].seconds == pytest.approx(8 * 48_000 * 1000 * 1e-9 / 1.5)
    encode = 1e6 * (1e-6 + 1000 * 1e-9) + number.visits * 1e-7
    assert stages["encode"].compute == pytest.approx(encode)
    assert stages["encode"].seconds == pytest.approx(encode / 1.5)  # a second core adds half
    assert stages["encode"].moved == pytest.approx(1e6 * 200 + number.visits * 140)
    assert stages["copies"].seconds == pytest.approx(0.1)
    assert stages["group"].seconds == pytest.approx(0.3 * 1.77)


def test_disk_and_memory_worked_by_hand():
    cost, number = estimate(JOB, RATES), count(JOB, RATES)
    out = 1e6 + 300_000 * 20 + 531_000 * 30
    assert cost.out == pytest.approx(out)
    places = 16 * number.tasks * 1001
    found = 2 * 20 * 300_000 + 29 * 531_000  # pairs of join tasks; members, more than are held
    assert cost.disk == pytest.approx(out + number.visits * 140 + 8e6 + places + found)
    memory = {stage.name: stage.memory for stage in cost.stages}
    assert memory["start"] == 2e8
    assert memory["group"] == pytest.approx(2e8 + costs.STAYS + 100 * 531_000)
    assert memory["copies"] == pytest.approx(2e8 + costs.STAYS + 61e6)
    assert cost.memory == max(memory.values())


def test_of_many_rows_four_bytes_are_held_and_eight_above_2_32():
    memory = []
    for rows in (2_100_000_000, 5_850_000_000):
        stages = estimate(dataclasses.replace(JOB, rows=rows), RATES).stages
        memory.append({stage.name: stage.memory for stage in stages})
    held = [found["group"] - 2e8 - costs.STAYS - costs.GROUPS_BYTES for found in memory]
    assert held == [4 * 2_100_000_000, 8 * 5_850_000_000]
    assert memory[0]["copies"] - 2e8 - costs.STAYS < 2_100_000_000 + 3e8


@pytest.mark.parametrize("rows", [1000, 50_000, 70_000, 10**6, 4 * 10**6, 10**8, 2 * 10**9, 10**10])
def test_more_rows_are_never_cheaper(rows):
    less, more = (
        estimate(dataclasses.replace(JOB, rows=n), RATES) for n in (rows, round(rows * 1.1))
    )
    assert less.disk < more.disk
    assert less.out < more.out
    assert less.compute < more.compute
    for one, other in zip(less.stages, more.stages, strict=True):
        assert one.compute <= other.compute


def test_encode_and_join_grow_as_rows_to_the_power_of_one_and_a_half():
    flat = dataclasses.replace(RATES, visits=(5.0, 5.0))
    some, many = (
        {
            stage.name: stage.compute
            for stage in estimate(dataclasses.replace(JOB, rows=n), flat).stages
        }
        for n in (4 * 10**10, 16 * 10**10)
    )
    assert some["encode"] * 7.5 < many["encode"] < some["encode"] * 8
    fixed = RATES.fit + RATES.fit_row * CALIBRATION_ROWS[1]  # the rows that train grow with lists
    assert many["fit"] - fixed == pytest.approx(2 * (some["fit"] - fixed))


def test_machines_share_encode_and_join_and_a_slow_disk_is_waited_for():
    one, four = (
        {s.name: s for s in estimate(dataclasses.replace(JOB, nodes=n), RATES).stages}
        for n in (1, 4)
    )
    assert four["encode"].seconds == pytest.approx(one["encode"].seconds / 4)
    assert four["group"].seconds == one["group"].seconds
    slow = estimate(dataclasses.replace(JOB, disk_speed=1e6), RATES)
    encode = next(stage for stage in slow.stages if stage.name == "encode")
    assert encode.seconds == pytest.approx(encode.moved / 1e6)


def test_few_rows_have_one_list_and_one_row_costs_something():
    number = count(dataclasses.replace(JOB, rows=60_000), RATES)
    assert (number.lists, number.visits) == (1, 60_000)
    assert number.products == pytest.approx(60_000**2 / 2)
    assert estimate(dataclasses.replace(JOB, rows=1), RATES).seconds > 2
