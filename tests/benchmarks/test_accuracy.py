"""The accuracy's runs, and what follows from their errors."""

from pathlib import Path

import pytest

import accuracy
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.run_folder import RunFolder
from harness.measure import PROJECT, Result, Settings


def test_intervals_are_students() -> None:
    # t of 97.5 % with 2 degrees of freedom is 4.303, the standard error of the mean of 1, 2, 3 is 1 / sqrt(3).
    found = accuracy.interval([1, 2, 3])
    assert found["mean"] == 2
    assert found["low"] == pytest.approx(2 - 4.303 / 3**0.5, abs=1e-3)
    assert found["high"] == pytest.approx(2 + 4.303 / 3**0.5, abs=1e-3)
    assert accuracy.interval([5]) == {"mean": 5, "low": None, "high": None}


@pytest.fixture(scope="module")
def accuracy_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, list[Result]]:
    """One seed of the quick regime."""
    settings = Settings(out=tmp_path_factory.mktemp("accuracy"), device="cpu", quick=True, seeds=1)
    return settings, list(accuracy.run(settings))


def quick_run(settings: Settings, name: str) -> RunFolder:
    return RunFolder(settings.out / "accuracy" / accuracy.QUICK.name / name)


def test_the_methods_are_compared_at_equal_epochs(accuracy_run: tuple[Settings, list[Result]]) -> None:
    settings, found = accuracy_run
    assert [result.opponent for result in found] == list(accuracy.METHODS)
    updates = {}
    for kind in ("snapshot", "step", "single-cycle"):
        folder = quick_run(settings, f"{kind}-s0")
        updates[kind] = folder.snapshots()[-1].step
        assert len(folder.snapshots()) == accuracy.QUICK.cycles
    assert len(set(updates.values())) == 1
    rates = [record["lr"] for record in quick_run(settings, "step-s0").metrics()]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])


def test_single_cycle_members_start_anew_and_their_run_is_an_ordinary_one(
    accuracy_run: tuple[Settings, list[Result]],
) -> None:
    settings, found = accuracy_run
    folder = quick_run(settings, "single-cycle-s0")
    seeds = [RunFolder(path).config()["seed"] for path in sorted(folder.path.glob("member-*"))]
    assert len(set(seeds)) == accuracy.QUICK.cycles
    (result,) = (result for result in found if result.opponent.startswith("SingleCycle"))
    assert evaluate_run(folder).metrics.last_m[-1].error == pytest.approx(result.values[0])


def test_an_evaluation_of_some_snapshots_does_not_pass_for_one_of_all(
    accuracy_run: tuple[Settings, list[Result]],
) -> None:
    settings, before = accuracy_run
    folder = quick_run(settings, "snapshot-s0")
    folder.write_json("ensemble.json", evaluate_run(folder, snapshots=[1]).as_json())
    assert accuracy.finished_seeds(accuracy.QUICK, settings.out) == []
    again = list(accuracy.run(settings))
    assert [result.values for result in again] == [result.values for result in before]


def test_a_seed_is_added_without_repeating_the_others(
    accuracy_run: tuple[Settings, list[Result]], tmp_path: Path
) -> None:
    settings, before = accuracy_run
    checkpoint = quick_run(settings, "snapshot-s0").path / "checkpoint.safetensors"
    written = checkpoint.stat().st_mtime_ns
    more = list(accuracy.run(Settings(out=settings.out, device="cpu", quick=True, seeds=2)))[-len(before) :]
    assert checkpoint.stat().st_mtime_ns == written
    for old, new in zip(before, more, strict=True):
        assert new.values[:1] == old.values
        assert len(new.values) == 2
    ensemble, standard = (
        next(r for r in more if r.opponent == name) for name in (PROJECT, accuracy.STANDARD)
    )
    differences = [a - b for a, b in zip(ensemble.values, standard.values, strict=True)]
    assert ensemble.details["against_standard"]["mean"] == pytest.approx(sum(differences) / 2)


def test_a_run_of_other_settings_is_not_taken_for_this_one(
    accuracy_run: tuple[Settings, list[Result]], tmp_path: Path
) -> None:
    folder = quick_run(accuracy_run[0], "snapshot-s0")
    config = folder.config()
    try:
        folder.write_json("config.json", config | {"epochs": 99})
        with pytest.raises(ValueError, match="another epochs"):
            list(accuracy.run(accuracy_run[0]))
    finally:
        folder.write_json("config.json", config)
