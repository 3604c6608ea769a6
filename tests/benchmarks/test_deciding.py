"""The benchmark of deciding."""

from deciding import FORWARDS, run
from harness.measure import PROJECT, Settings


def test_deciding_is_measured_against_the_forward_passes_that_it_needs() -> None:
    results = {result.opponent: result for result in run(Settings(device="cpu", quick=True))}
    assert results.keys() == {PROJECT, FORWARDS}
    details = results[PROJECT].details
    assert details["held-out images"] == details["test images"] == 200
    share = results[PROJECT].values[0] / results[FORWARDS].values[0]
    assert details["times the forwards' time, median"] == share
    assert details["MB of logits at most"] == 4 * 5 * 200 * 100 / 1e6
