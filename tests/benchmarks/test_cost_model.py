"""The cost model against what can be counted by hand, and its table against docs/scaling.md."""

from pathlib import Path

import pytest

import cost_model
from cost_model import INFINIBAND, NETS, NVLINK, Link, Net

PAGE = Path(__file__).parent.parent.parent / "docs" / "scaling.md"


def test_a_ring_of_two_sends_every_byte_once_and_a_long_one_almost_twice() -> None:
    link = Link("made up", bandwidth=1e9, latency=0)
    assert cost_model.ring_seconds(1e9, 1, link) == 0
    assert cost_model.ring_seconds(1e9, 2, link) == pytest.approx(1)
    assert cost_model.ring_seconds(1e9, 64, link) == pytest.approx(2 * 63 / 64)


def test_without_costs_of_its_own_every_rank_counts() -> None:
    net = Net("large and simple", 0, images_per_second=1, layers=0)
    free = Link("free", bandwidth=1e30, latency=0)
    assert cost_model.efficiency(net, 64, 64, free) == pytest.approx(1, abs=1e-3)
    assert cost_model.worth(net, 64, free) == cost_model.fastest(net, 64, free) == 64


def test_input_that_is_slower_than_the_step_is_the_step() -> None:
    net = Net("fast", 1e6, images_per_second=1e6, layers=1, decoded_per_second=100)
    assert cost_model.step(net, 50, 1, NVLINK) == 0.5


def test_more_bandwidth_never_makes_fewer_ranks_worth_it() -> None:
    for net in NETS:
        assert cost_model.worth(net, 512, NVLINK) >= cost_model.worth(net, 512, INFINIBAND)


def test_the_page_shows_this_table() -> None:
    assert "\n".join(cost_model.table()) in PAGE.read_text()
