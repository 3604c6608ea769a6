"""Error of a snapshot ensemble at equal epochs against the standard schedule, NoCycle and SingleCycle, by seed.

Every run is an ordinary run folder, `OUT/accuracy/<regime>/<schedule>-s<seed>/`, for `python -m fastsnap.ensemble_eval`
too. A finished one is not repeated, an unfinished one goes on, and seeds can be added at any time.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from fastsnap.assembly import describe, settle
from fastsnap.config import STANDARD_RATE, TrainConfig, make_config
from fastsnap.data.datasets import Dataset, load_dataset
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.run_folder import RunFolder
from harness.measure import PROJECT, Result, Settings
from harness.project import train_run
from harness.task import DATASET

NAME = "accuracy"
CONFIDENCE = 0.95
STANDARD = "standard schedule"
KINDS = SNAPSHOT_RUN, STANDARD_RUN, SINGLE_RUN = "snapshot", "step", "single-cycle"
# Which run each method takes, and whether all its snapshots together or the last one alone.
METHODS = {
    PROJECT: (SNAPSHOT_RUN, True),
    STANDARD: (STANDARD_RUN, False),
    "NoCycle: the standard schedule's saves together": (STANDARD_RUN, True),
    "SingleCycle: re-initialised every cycle": (SINGLE_RUN, True),
    "the last snapshot alone": (SNAPSHOT_RUN, False),
}
MEMBER_SEEDS = 1000  # apart: the seeds of SingleCycle's members


@dataclass(frozen=True)
class Regime:
    """What is trained. `learning_rate` is that of the cycles; the standard schedule has its own, STANDARD_RATE.

    seeds  how many, unless the user says otherwise
    """

    name: str
    dataset: str
    net: str
    epochs: int
    cycles: int
    learning_rate: float
    train_images: int | None
    seeds: int
    batch_size: int = 64


FEW = Regime("few-images", DATASET, "resnet8", 50, 5, 0.2, 2_000, seeds=3)
MANY = Regime("many-images", DATASET, "resnet8", 3, 3, 0.2, 10_000, seeds=2)
PAPER = Regime("paper", DATASET, "resnet110", 200, 5, 0.2, None, seeds=3)
PAPER_FEW = Regime("10000-images", DATASET, "resnet20", 150, 5, 0.2, 10_000, seeds=5)
DIGITS = Regime("digits", "digits", "resnet8", 30, 5, 0.1, 500, seeds=3, batch_size=32)
QUICK = Regime("digits-quick", "digits", "resnet8", 4, 2, 0.1, 200, seeds=2, batch_size=32)


def run(settings: Settings) -> Iterator[Result]:
    """The error of every method, after each seed."""
    for regime in regimes(settings):
        seeds = regime.seeds if settings.seeds is None else settings.seeds
        for seed in range(seeds):
            train_seed(regime, seed, settings)
            yield from results_of(regime, settings)


def regimes(settings: Settings) -> tuple[Regime, ...]:
    """What these settings ask for."""
    if settings.full:
        return PAPER_FEW, PAPER
    if settings.quick:
        return (QUICK,)
    return (FEW, MANY) if settings.data else (DIGITS,)


def case_of(regime: Regime) -> str:
    """The regime, for the report."""
    images = "all images" if regime.train_images is None else f"{regime.train_images:,} images"
    return f"{regime.dataset}, {images}, {regime.net}, {regime.epochs} epochs, M = {regime.cycles}"


def train_seed(regime: Regime, seed: int, settings: Settings) -> None:
    """Train and evaluate what is not there yet of one seed: the three runs of the same images and epochs."""
    dataset = load_dataset(
        regime.dataset,
        settings.data or settings.out,
        train_images=regime.train_images,
        seed=seed,
        download=False,
    )
    for kind in KINDS:
        folder = _folder(regime, kind, seed, settings.out)
        config = _config(regime, kind, seed, settings)
        if kind == SINGLE_RUN:
            _train_single_cycles(regime, config, dataset, folder)
        else:
            train_run(config, dataset, folder)
        if not _is_evaluated(folder, regime):
            report = evaluate_run(folder, dataset=dataset, device=torch.device(settings.device))
            folder.write_json("ensemble.json", report.as_json())


def _folder(regime: Regime, kind: str, seed: int, out: Path) -> RunFolder:
    return RunFolder(out / NAME / regime.name / f"{kind}-s{seed}")


def _config(regime: Regime, kind: str, seed: int, settings: Settings) -> TrainConfig:
    values = asdict(regime) | {"seed": seed, "device": settings.device}
    if settings.data:
        values["data"] = str(settings.data)
    del values["name"], values["seeds"]
    if kind == STANDARD_RUN:
        values |= {"schedule": "step", "learning_rate": STANDARD_RATE}
    return settle(make_config(**values, out=str(_folder(regime, kind, seed, settings.out).path)))


def _train_single_cycles(regime: Regime, config: TrainConfig, dataset: Dataset, folder: RunFolder) -> None:
    """M networks, each from its own initialisation through one cycle, gathered in one run folder."""
    epochs, rest = divmod(regime.epochs, regime.cycles)
    if rest:
        raise ValueError(
            f"epochs of {regime.name} must be a multiple of its {regime.cycles} cycles, got {regime.epochs}"
        )
    folder.path.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        folder.write_json("config.json", describe(config, dataset))
    for number in range(len(folder.snapshots()) + 1, regime.cycles + 1):
        member = RunFolder(folder.path / f"member-{number}")
        seed = MEMBER_SEEDS * (config.seed + 1) + number
        changes: dict[str, Any] = {"seed": seed, "epochs": epochs, "cycles": 1, "out": str(member.path)}
        train_run(replace(config, **changes), dataset, member)
        (entry,) = member.snapshots()
        folder.save_snapshot(
            member.load_snapshot(entry),
            step=number * entry.step,
            cycle=number,
            epoch=number * entry.epoch,
            learning_rate=entry.learning_rate,
            train_loss=entry.train_loss,
        )


def _is_evaluated(folder: RunFolder, regime: Regime) -> bool:
    """Whether ensemble.json is there, and of all snapshots: the user may have written one of a few."""
    return (folder.path / "ensemble.json").exists() and len(_report(folder)["members"]) == regime.cycles


def results_of(regime: Regime, settings: Settings) -> list[Result]:
    """The methods' errors over all seeds that are finished in settings.out."""
    seeds = finished_seeds(regime, settings.out)
    errors = {}
    for method, (kind, together) in METHODS.items():
        reports = [_report(_folder(regime, kind, seed, settings.out)) for seed in seeds]
        rows = [report["last_m"][-1] if together else report["members"][-1] for report in reports]
        errors[method] = rows
    results = []
    for method, (kind, _) in METHODS.items():
        own = [row["error"] for row in errors[method]]
        standard = [row["error"] for row in errors[STANDARD]]
        seconds = [training_seconds(_folder(regime, kind, seed, settings.out)) for seed in seeds]
        details = {
            "seeds": seeds,
            "regime": asdict(regime),
            "error": interval(own),
            "against_standard": interval([a - b for a, b in zip(own, standard, strict=True)]),
            "nll": float(np.mean([row["nll"] for row in errors[method]])),
            "seconds": float(np.mean(seconds)),
        }
        results.append(Result(NAME, case_of(regime), method, "% error", "lower", tuple(own), details=details))
    return results


def finished_seeds(regime: Regime, out: Path) -> list[int]:
    """Seeds of which all runs are evaluated."""
    folders = (out / NAME / regime.name).glob(f"{SNAPSHOT_RUN}-s*")
    seeds = sorted(int(folder.name.rsplit("-s", 1)[1]) for folder in folders)
    return [
        seed
        for seed in seeds
        if all(_is_evaluated(_folder(regime, kind, seed, out), regime) for kind in KINDS)
    ]


def _report(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / "ensemble.json").read_text())


def training_seconds(folder: RunFolder) -> float:
    """Time spent training a run, or the members gathered in it."""
    members = [RunFolder(path) for path in sorted(folder.path.glob("member-*"))]
    return sum(run.metrics()[-1]["seconds"] for run in members or [folder])


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and its Student-t confidence interval; no interval for a single value."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "low": None, "high": None}
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}
