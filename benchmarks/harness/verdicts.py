"""Bounds on results, and whether the records of a folder keep to them."""

from collections.abc import Sequence
from dataclasses import dataclass

from harness.results import Record


@dataclass(frozen=True)
class Target:
    """A bound on one result.

    cases    the first of them that was measured counts
    figure   "ratio": the project's times_better against `opponent`; "share": 1 / ratio; "median": of the result itself;
             "difference": upper end of the interval of the error's difference to the standard schedule
    at_most  whether `bound` is an upper bound
    """

    text: str
    benchmark: str
    cases: tuple[str, ...]
    opponent: str
    figure: str
    bound: float
    at_most: bool = False


@dataclass(frozen=True)
class Verdict:
    """What was found, with its spread, as text; and whether the bound holds, None if that is not known."""

    target: Target
    found: str
    met: bool | None


def verdicts(targets: Sequence[Target], records: Sequence[Record]) -> list[Verdict]:
    """What the records say about each target; a quick run says nothing."""
    return [_verdict(target, _record_of(target, records)) for target in targets]


def _record_of(target: Target, records: Sequence[Record]) -> Record | None:
    by_case = {
        record["case"]: record
        for record in records
        if (record["benchmark"], record["opponent"]) == (target.benchmark, target.opponent)
    }
    found = [by_case[case] for case in target.cases if case in by_case]
    measured = [record for record in found if _counts(record)]
    return next(iter([*measured, *found]), None)


def _counts(record: Record) -> bool:
    """Targets are for a CPU."""
    return bool(record["n"]) and not record["quick"] and record["machine"]["gpu"] is None


def _verdict(target: Target, record: Record | None) -> Verdict:
    if record is None or not _counts(record):
        return Verdict(target, (record and record["missing"]) or "not measured", None)
    middle, low, high = _figures(target.figure, record)
    if low is None or high is None:
        return Verdict(target, f"{middle:.2f}, one seed: no interval", None)
    decisive = high if target.figure == "difference" else middle
    met = decisive <= target.bound if target.at_most else decisive >= target.bound
    return Verdict(target, f"{middle:.2f} ({low:.2f} to {high:.2f})", met)


def _figures(figure: str, record: Record) -> tuple[float, float | None, float | None]:
    """The figure itself, and the lower and upper end of its spread."""
    if figure == "difference":
        difference = record["details"]["against_standard"]
        return difference["mean"], difference["low"], difference["high"]
    if figure == "median":
        return record["median"], record["low"], record["high"]
    ratio = record["ratio"]
    if figure == "share":
        return 1 / ratio["median"], 1 / ratio["high"], 1 / ratio["low"]
    return ratio["median"], ratio["low"], ratio["high"]
