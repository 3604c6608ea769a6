"""Weights to begin with, from a run, a snapshot, a safetensors file or a PyTorch file, as untrusted input."""

import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastsnap.run_files import RunError, read_regular
from fastsnap.run_folder import RunFolder

PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
NESTED = ("state_dict", "model")  # where a PyTorch file keeps its weights among other things
MOST_BYTES = 2**36
SHOWN = 10  # names that an error lists
COUNTERS = "num_batches_tracked"  # of batch normalisation; older files have none


class InitialWeightsError(ValueError):
    """Weights that cannot be begun with."""


@dataclass(frozen=True)
class InitialWeights:
    """A state_dict as it was found.

    place   the file, for messages
    sha256  of its content
    notes   what was done to read it
    """

    place: str
    state: dict[str, Tensor]
    sha256: str
    notes: tuple[str, ...] = ()


def read_initial(path: str | Path) -> InitialWeights:
    """What `path` holds: a run folder (its last snapshot), a safetensors file, or a PyTorch file with a state_dict.

    Raises InitialWeightsError, and RunError for a damaged run, naming the path and what to do.
    """
    path = Path(path)
    if path.is_dir():
        folder = RunFolder(path)
        folder.config()
        entries = folder.snapshots()
        if not entries:
            raise InitialWeightsError(f"initial: the run {path} has no snapshot yet; name one that has")
        return InitialWeights(
            str(path / entries[-1].file), folder.load_snapshot(entries[-1]), entries[-1].sha256
        )
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InitialWeightsError(
                f"initial: {path} is larger than {MOST_BYTES:,} bytes: name a file of weights"
            )
        content = read_regular(path)
    except OSError as error:
        raise InitialWeightsError(
            f"initial: {path} cannot be read: {error.strerror}; name a run folder, a safetensors file or a PyTorch file"
        ) from error
    state = _safetensors(path, content) if path.suffix == ".safetensors" else _pytorch(path)
    state, notes = _without_prefixes(state)
    return InitialWeights(str(path), state, hashlib.sha256(content).hexdigest(), notes)


def _safetensors(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InitialWeightsError(
            f"initial: {path} is no safetensors file ({error}): get it again"
        ) from error


def _pytorch(path: Path) -> dict[str, Tensor]:
    """Read with weights_only, which builds tensors and containers and nothing else."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InitialWeightsError(
            f"initial: {path} cannot be read as a PyTorch file of weights alone ({reason}): save the network's "
            "state_dict with torch.save, or with safetensors"
        ) from error
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        raise InitialWeightsError(
            f"initial: {path} holds no state_dict, which is names and tensors: save network.state_dict()"
        )
    return {str(name): value for name, value in content.items()}


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
            notes += (f"without the prefix {prefix}",)
    return state, notes


def classifier_names(build: Callable[[int], nn.Module], classes: int) -> set[str]:
    """The tensors whose shape depends on the number of classes.

    build  makes the network, on the meta device, for a number of classes
    """
    this, more = (
        {name: value.shape for name, value in build(count).state_dict().items()}
        for count in (classes, classes + 1)
    )
    return {name for name, shape in this.items() if more[name] != shape}


@torch.no_grad()
def begin_with(network: nn.Module, initial: InitialWeights, classifier: set[str]) -> str:
    """Give `network` these weights; returns what was done, for the summary.

    classifier  see `classifier_names`; where its size is another, it keeps the weights that it was made with
    Raises InitialWeightsError that lists what is missing, left over, of another shape, or not finite.
    """
    own = network.state_dict()
    given = dict(initial.state)
    anew = [
        name for name in own if name in classifier and name in given and given[name].shape != own[name].shape
    ]
    sizes = sorted({tuple(given.pop(name).shape)[:1] + tuple(own[name].shape)[:1] for name in anew})
    missing = [name for name in own if name not in given and name not in anew and not name.endswith(COUNTERS)]
    faults = [f"{name} is missing" for name in missing]
    faults += [f"{name} is left over" for name in given if name not in own]
    for name, value in given.items():
        if name in own and value.shape != own[name].shape:
            faults.append(f"{name} is {list(value.shape)} instead of {list(own[name].shape)}")
        elif name in own and value.is_floating_point() and not value.isfinite().all():
            faults.append(f"{name} has NaN or infinite values")
    if faults:
        more = f"; and {len(faults) - SHOWN:,} more" if len(faults) > SHOWN else ""
        raise InitialWeightsError(
            f"initial: {initial.place} does not fit the net: {'; '.join(faults[:SHOWN])}{more}. Give the weights of "
            "the same --net, with the same flags"
        )
    for name, value in given.items():
        own[name].copy_(value)
    text = f"{initial.place}, {len(given):,} of {len(own):,} tensors"
    if anew:
        text += f"; the classifier anew: {sizes[0][0]:,} classes there, {sizes[0][1]:,} here"
    return "; ".join([text, *_converted(given), *initial.notes])


def _converted(given: Mapping[str, Tensor]) -> list[str]:
    kinds = {str(value.dtype).removeprefix("torch.") for value in given.values() if value.is_floating_point()}
    return [f"converted from {', '.join(sorted(kinds))}"] if kinds - {"float32"} else []


def require_same_initial(asked: str | None, saved: Mapping[str, Any], run: str) -> None:
    """Raise RunError if `run` began with other weights than `asked`, as far as they are still there."""
    began = saved.get("initial_sha256")
    if asked is None and began is None:
        return
    if asked is None or began is None:
        raise RunError(
            f"{run} holds a run of another configuration (initial: {asked} asked for, {saved.get('initial')} there). "
            "Choose another --out (make: OUT=...), or give the same --initial"
        )
    if Path(asked).exists() and read_initial(asked).sha256 != began:
        raise RunError(
            f"{run} holds a run of another configuration (initial: {asked} has other weights than the run began with). "
            "Choose another --out (make: OUT=...)"
        )
