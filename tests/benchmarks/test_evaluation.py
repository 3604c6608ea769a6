"""Evaluating: the project and others in the same precision, or each in its best."""

from evaluation import CHANNELS_LAST, TWICE, Contender, fastest, run
from harness.measure import PROJECT, Settings
from harness.precisions import text_of, tried_by_hand


def test_by_default_the_project_and_the_careful_way_choose_and_the_others_compute_in_fp32() -> None:
    measured = run(Settings(device="cpu", quick=True, precision="auto"))
    results = {result.opponent: result for result in measured if not result.missing}
    assert {result.case for result in results.values()} == {f"5 x resnet20, {text_of('auto', 'cpu')}"}
    taken = {name: result.details["precision"] for name, result in results.items()}
    assert text_of("auto", "cpu") == f"{taken[PROJECT]} by default"
    assert taken.pop(CHANNELS_LAST) in tried_by_hand("auto", "cpu")
    del taken[PROJECT]
    assert TWICE in taken
    assert set(taken.values()) == {"fp32"}


def test_the_fastest_way_is_kept() -> None:
    calls: list[str] = []

    def way(name: str, work: int) -> Contender:
        return Contender(name, lambda: calls.append(name) or float(sum(range(work))))  # type: ignore[func-returns-value]

    assert fastest([way("bf16", 3_000_000), way("fp32", 10)]).precision == "fp32"
    assert {"bf16", "fp32"} == set(calls)
    calls.clear()
    assert fastest([way("fp32", 10)]).precision == "fp32"
    assert calls == []  # nothing to choose from
