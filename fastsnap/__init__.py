"""Train a snapshot ensemble in one training run, measure what it is worth, and use it.

    python -m fastsnap.train          one training run -> M snapshots
    python -m fastsnap.ensemble_eval  the table of the ensemble
    python -m fastsnap.predict        what the ensemble says of pictures
    python -m fastsnap.export         the ensemble as one file for other programs

As a library: the names below. Importing this package does nothing; a name brings what it needs when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsnap.ensemble.exporting import export_ensemble as export_ensemble
    from fastsnap.ensemble.loading import load_ensemble as load_ensemble
    from fastsnap.ensemble.module import Ensemble as Ensemble
    from fastsnap.ensemble.own_network import evaluate as evaluate
    from fastsnap.ensemble.predictions import Predictions as Predictions
    from fastsnap.ensemble.preprocessing import Preprocessing as Preprocessing
    from fastsnap.kernels.averaging import average_members as average_members
    from fastsnap.kernels.schedule import Schedule as Schedule
    from fastsnap.snapshot import save_snapshot as save_snapshot
    from fastsnap.training.optim import SnapshotSGD as SnapshotSGD
    from fastsnap.training.recorder import SnapshotRecorder as SnapshotRecorder

__version__ = "0.1.0"

_MODULES = {
    "Ensemble": "fastsnap.ensemble.module",  # what load_ensemble returns
    "Predictions": "fastsnap.ensemble.predictions",  # what its predict returns
    "Preprocessing": "fastsnap.ensemble.preprocessing",  # what it does to a picture
    "Schedule": "fastsnap.kernels.schedule",  # the learning rate and the cycle as pure functions of the step
    "SnapshotRecorder": "fastsnap.training.recorder",  # a run folder of any training loop
    "SnapshotSGD": "fastsnap.training.optim",  # the fused update as a torch.optim.Optimizer
    "average_members": "fastsnap.kernels.averaging",  # all statistics of an ensemble from its members' logits
    "evaluate": "fastsnap.ensemble.own_network",  # what such a run's ensemble is worth, with the user's network
    "export_ensemble": "fastsnap.ensemble.exporting",  # as one file for other programs
    "load_ensemble": "fastsnap.ensemble.loading",  # the snapshots of a run as one module
    "save_snapshot": "fastsnap.snapshot",  # a network of any memory layout as a safetensors file
}
__all__ = [
    "Ensemble",
    "Predictions",
    "Preprocessing",
    "Schedule",
    "SnapshotRecorder",
    "SnapshotSGD",
    "average_members",
    "evaluate",
    "export_ensemble",
    "load_ensemble",
    "save_snapshot",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
