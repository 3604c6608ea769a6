"""Whether bounds hold."""

from typing import Any

from made_up import record

from harness.measure import PROJECT
from harness.verdicts import Target, Verdict, verdicts

CASES = ("the case", "the case, asked for")
AT_LEAST = Target("times", "throughput", CASES, "a loop", "ratio", 3)
SHARE = Target("share", "evaluation", CASES, "a loop", "share", 0.35, at_most=True)
AT_MOST = Target("percent", "pipelines", CASES, PROJECT, "median", 3, at_most=True)
DIFFERENCE = Target("points", "accuracy", CASES, PROJECT, "difference", 0, at_most=True)
RATIO = {"median": 3.1, "low": 2.9, "high": 3.3}


def place(target: Target, case: str = CASES[0]) -> dict[str, Any]:
    return {"benchmark": target.benchmark, "case": case, "opponent": target.opponent, "ratio": RATIO}


def verdict_of(target: Target, **changes: Any) -> Verdict:
    (verdict,) = verdicts([target], [record(**place(target) | changes)])
    return verdict


def test_targets_are_reached_missed_or_not_known() -> None:
    assert verdict_of(AT_LEAST) == Verdict(AT_LEAST, "3.10 (2.90 to 3.30)", True)
    assert verdict_of(AT_LEAST, ratio={"median": 2.9, "low": 2.8, "high": 3.3}).met is False
    assert verdict_of(AT_LEAST, quick=True).met is None
    assert verdict_of(SHARE) == Verdict(SHARE, "0.32 (0.30 to 0.34)", True)
    assert verdict_of(AT_MOST).met is False  # 3.5 % of a step
    intervals = {"mean": -1.0, "low": -1.5, "high": -0.5}
    assert verdict_of(DIFFERENCE, details={"against_standard": intervals}).met is True
    assert verdict_of(DIFFERENCE, details={"against_standard": intervals | {"high": 0.5}}).met is False
    one_seed = {"mean": -1.0, "low": None, "high": None}
    assert verdict_of(DIFFERENCE, details={"against_standard": one_seed}).met is None
    assert verdicts([AT_LEAST], []) == [Verdict(AT_LEAST, "not measured", None)]
    missing = verdict_of(AT_LEAST, n=0, missing="not installed: make bench-peers")
    assert missing == Verdict(AT_LEAST, "not installed: make bench-peers", None)


def test_the_first_case_that_was_measured_counts() -> None:
    second = record(**place(AT_LEAST, CASES[1]) | {"ratio": RATIO | {"median": 2.5}})
    first = record(**place(AT_LEAST))
    (both,), (alone,) = verdicts([AT_LEAST], [second, first]), verdicts([AT_LEAST], [second])
    assert (both.met, alone.met) == (True, False)
    (quick,) = verdicts([AT_LEAST], [second, record(**place(AT_LEAST) | {"quick": True})])
    assert quick == alone
