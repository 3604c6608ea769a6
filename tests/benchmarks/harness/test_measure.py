"""Measuring in turns, and what a result says of itself."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch

from harness.measure import PROJECT, Result, Settings, alternate, compare


def test_contenders_take_turns() -> None:
    calls: list[str] = []

    def contender(name: str) -> Callable[[], float]:
        return lambda: calls.append(name) or float(len(calls))  # type: ignore[func-returns-value]

    values = alternate({"a": contender("a"), "b": contender("b")}, rounds=3)
    assert calls == ["a", "b"] * 3
    assert values == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_ratios_are_taken_within_a_round_and_above_1_the_project_wins() -> None:
    # The machine slows down tenfold after the first round; the project stays twice as fast.
    project, other = compare("b", "c", "s", {PROJECT: [1, 10, 10], "other": [2, 20, 20]}, "lower")
    assert project.ratio is None
    assert other.ratio is not None
    assert (other.ratio.median, other.ratio.low, other.ratio.high) == (2, 2, 2)
    _, other = compare("b", "c", "images/s", {PROJECT: [8, 4], "other": [2, 2]}, "higher")
    assert other.ratio is not None
    assert (other.ratio.median, other.ratio.low, other.ratio.high) == (3, 2.5, 3.5)


def test_a_result_says_where_it_comes_from() -> None:
    line = Result("b", "c", PROJECT, "s", "lower", (1.0, 2.0, 3.0, 4.0)).as_json(Settings(device="cpu"))
    assert (line["n"], line["median"], line["low"], line["high"]) == (4, 2.5, 1.75, 3.25)
    assert line["machine"]["cpu"]
    assert line["machine"]["threads"] == torch.get_num_threads()
    assert line["versions"]["torch"] == torch.__version__.split("+")[0]
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", line["commit"])
    assert line["command"].startswith("python ")
    assert str(Path(__file__).parents[3]) not in json.dumps(line)
