"""From a run folder to its ensemble: which snapshots, what each counts, in which networks."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastsnap.device import choose_device
from fastsnap.ensemble.decision import read_decision
from fastsnap.ensemble.inputs import choose_snapshots, evaluation_precision, network_of
from fastsnap.ensemble.members import Resident, load_members
from fastsnap.ensemble.module import Ensemble
from fastsnap.ensemble.preprocessing import Preprocessing, preprocessing_of
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.run_schema import SnapshotEntry, check_plan, is_own_loop
from fastsnap.snapshot import plain_network


def load_ensemble(
    run: str | os.PathLike[str],
    *,
    snapshots: Sequence[int] | Literal["all"] | None = None,
    last: int | None = None,
    weights: Sequence[float] | None = None,
    temperature: float | None = None,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    resident: Resident = "auto",
    data: str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | None = None,
    network: nn.Module | None = None,
) -> Ensemble:
    """The snapshots of the run folder `run` as one module; its data set is not needed.

    Without snapshots, last and weights, they are what the run's evaluation has decided on held-out images
    (ensemble.json), temperature included; without such a decision all that are saved, with equal weights.

    snapshots      numbers of those to take, or "all"
    last           take the last so many instead
    weights        of the members in the order of the run, >= 0, normalised here; default: equal. What has weight 0 is
                   not computed
    temperature    of the averaged probabilities: p -> p^(1 / temperature), normalised again; > 0; default: as
                   decided, else 1
    device         default: CUDA if there is one, else the CPU
    precision      of the forward passes: "fp32", "bf16", "fp16" (by autocast), or "auto": what is fastest there
    resident       members in memory: "all", or "one" at a time, whose weights are swapped from the memory-mapped files;
                   "auto": all where they take at most half of the memory that is free
    data           folder of the data sets, for a run of version 0.1.0, whose config.json does not name its classes
    preprocessing  instead of what the run folder says
    network        of the run's class, for a run of SnapshotRecorder; it is copied
    Raises RunError (a ValueError) for a run without snapshots, that cannot be read or does not say its classes, for a
    decision among other snapshots than the run has, and for snapshots that are damaged (all hashes are verified) or of
    another network; ValueError for other arguments.
    """
    folder = RunFolder(run)
    config = folder.config()
    decision = None
    if snapshots is None and last is None and weights is None:
        choose_snapshots(folder, None)  # a run without any is a worse fault than a decision that is old
        decision = read_decision(folder)
    if decision is not None:
        snapshots, weights = decision.snapshots, decision.weights
    if temperature is None:
        temperature = decision.temperature if decision is not None else 1.0
    entries = chosen(folder, None if snapshots == "all" else snapshots, last)
    check_plan(config, folder.snapshots(), folder.metrics(), str(folder.path))
    entries, weights = _weighted(entries, weights)
    if not 1e-3 <= temperature <= 1e3:
        raise ValueError(f"temperature must be between 0.001 and 1,000, got {temperature}")
    where = choose_device("auto") if device is None else torch.device(device)
    if where.type == "cuda":
        choose_device("cuda")  # a clear error where there is none
    computed = evaluation_precision(precision, where).name
    known = preprocessing or preprocessing_of(config, folder, None if data is None else Path(data))
    template = _template(config, folder, known, network)
    networks = load_members(folder, entries, template, where, resident)
    ensemble = Ensemble(
        networks, entries, known, weights=weights, temperature=temperature, precision=computed
    )
    return ensemble.to(where)


def chosen(folder: RunFolder, snapshots: Sequence[int] | None, last: int | None) -> list[SnapshotEntry]:
    """The snapshots with these numbers, or the last so many. Raises RunError where there are not so many."""
    if last is None:
        return choose_snapshots(folder, snapshots)
    if snapshots is not None:
        raise ValueError(f"snapshots and last exclude each other, got {list(snapshots)} and {last}")
    entries = choose_snapshots(folder, None)
    if not 1 <= last <= len(entries):
        raise RunError(
            f"last must be from 1 to the {len(entries)} snapshots that {folder.path} holds, got {last}"
        )
    return entries[-last:]


def _weighted(
    entries: list[SnapshotEntry], weights: Sequence[float] | None
) -> tuple[list[SnapshotEntry], list[float]]:
    """Those that count, and what each counts. Raises ValueError for weights that are none."""
    if weights is None:
        return entries, [1.0] * len(entries)
    values = [float(weight) for weight in weights]
    fits = len(values) == len(entries) and all(0 <= value < float("inf") for value in values)
    if not fits or not 0 < sum(values) < float("inf"):
        raise ValueError(
            f"weights must be {len(entries)} finite numbers of at least 0, one per snapshot and not all 0, got {values}"
        )
    counting = [pair for pair in zip(entries, values, strict=True) if pair[1] > 0]
    return [entry for entry, _ in counting], [value for _, value in counting]


def _template(
    config: dict[str, Any], folder: RunFolder, preprocessing: Preprocessing, network: nn.Module | None
) -> nn.Module:
    """A network of the run's kind, on the CPU, for each member to be loaded into."""
    if is_own_loop(config):
        if network is None:
            raise RunError(
                f"{folder.path} is of a training loop with a network of its own ({config['net']}): give a network of "
                "this class, network=..."
            )
        if len(preprocessing.classes) != config["classes"]:
            raise ValueError(
                f"preprocessing has {len(preprocessing.classes)} classes, but the run {config['classes']}"
            )
        return copy.deepcopy(plain_network(network)).cpu().float()
    if network is not None:
        raise ValueError(
            f"network is for runs of SnapshotRecorder; {folder.path} has a {config['net']}: leave it out"
        )
    return network_of(config, folder, preprocessing.image_shape, len(preprocessing.classes))
