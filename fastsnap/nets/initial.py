"""Beginning with given weights (fine-tuning): which of a network's tensors they are, and a classifier made anew."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsnap.nets.weights import InitialWeights, InitialWeightsError, read_initial
from fastsnap.run_files import RunError

CONVERTED = (torch.float16, torch.bfloat16, torch.float64)  # to fp32, without a loss that matters
SHOWN = 10  # names that an error lists
COUNTERS = "num_batches_tracked"  # of batch normalisation; older files have none


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
    own, found = network.state_dict(), initial.state
    anew = [name for name in own if name in classifier & found.keys() and _is_resized(found[name], own[name])]
    faults = _faults(network, own, found, anew)
    if faults:
        more = f"; and {len(faults) - SHOWN:,} more" if len(faults) > SHOWN else ""
        raise InitialWeightsError(
            f"initial: {initial.place} does not fit the net: {'; '.join(faults[:SHOWN])}{more}. Give the weights of "
            "the same --net, with the same flags"
        )
    given = {name: value for name, value in found.items() if not (anew and name in classifier)}
    for name, value in given.items():
        own[name].copy_(value)
    text = f"{initial.place}, {len(given):,} of {len(own):,} tensors"
    if anew:
        there, here = found[anew[0]].shape[0], own[anew[0]].shape[0]
        text += f"; the classifier anew: {there:,} classes there, {here:,} here"
    return "; ".join([text, *_converted(given), *initial.notes])


def _is_resized(given: Tensor, own: Tensor) -> bool:
    """Whether the number of classes, which comes first, is all that a classifier's shape differs in."""
    return given.dim() == own.dim() and given.shape[1:] == own.shape[1:] and given.shape != own.shape


def _faults(
    network: nn.Module, own: Mapping[str, Tensor], found: Mapping[str, Tensor], anew: Sequence[str]
) -> list[str]:
    """All that is missing, left over or does not fit; of `anew`, which does not have to, nothing."""
    there = found.keys() | _names_of_the_same(network, found)
    counted = any(name.endswith(COUNTERS) for name in found)
    missing = [n for n in own if n not in there and (counted or not n.endswith(COUNTERS))]
    faults = [f"{name} is missing" for name in missing]
    faults += [f"{name} is left over" for name in sorted(found.keys() - own.keys())]
    both = [name for name in own if name in found and name not in anew]
    return faults + [text for name in both if (text := _fault(name, found[name], own[name]))]


def _names_of_the_same(network: nn.Module, given: Mapping[str, Tensor]) -> set[str]:
    """Names of tensors that `given` has, by this or by another name: savers of tied weights leave one."""
    tensors = [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]
    there = {id(tensor) for name, tensor in tensors if name in given}
    return {name for name, tensor in tensors if id(tensor) in there}


def _fault(name: str, given: Tensor, own: Tensor) -> str | None:
    """What is wrong with a tensor for the place that has its name."""
    if given.layout is not torch.strided or given.is_meta or given.is_quantized:
        return f"{name} is no dense tensor"
    if given.shape != own.shape:
        return f"{name} is {list(given.shape)} instead of {list(own.shape)}"
    if _kind(given) != _kind(own):
        return f"{name} is {given.dtype} instead of {own.dtype}"
    if own.is_floating_point() and not given.to(own.dtype).isfinite().all():
        return f"{name} has NaN or infinite values"
    return None


def _kind(tensor: Tensor) -> str:
    if tensor.dtype in (*CONVERTED, torch.float32):
        return "floating-point"
    return "integer" if not tensor.is_floating_point() and not tensor.is_complex() else str(tensor.dtype)


def _converted(given: Mapping[str, Tensor]) -> list[str]:
    kinds = {str(value.dtype).removeprefix("torch.") for value in given.values() if value.is_floating_point()}
    return [f"converted from {', '.join(sorted(kinds))}"] if kinds - {"float32"} else []


def require_outside(asked: str | None, out: str) -> None:
    """Raise InitialWeightsError for weights in the run folder `out` itself, which it fills with its own."""
    if asked is not None and Path(asked).resolve().is_relative_to(Path(out).resolve()):
        raise InitialWeightsError(
            f"initial: {asked} lies in the run folder {out}, which this run fills with its own snapshots: choose "
            "another --out"
        )


def require_same_initial(asked: str | None, saved: Mapping[str, Any], run: str) -> None:
    """Raise RunError if `run` began with other weights than `asked`; those that it names itself may be gone by now."""
    began = saved.get("initial_sha256")
    if asked is None and began is None:
        return
    if asked is None or began is None:
        raise RunError(
            f"{run} holds a run of another configuration (initial: {asked} asked for, {saved.get('initial')} there). "
            "Choose another --out (make: OUT=...), or give the same --initial"
        )
    if asked == saved.get("initial") and not Path(asked).exists():
        return  # not needed any more
    if read_initial(asked).sha256 != began:
        raise RunError(
            f"{run} holds a run of another configuration (initial: {asked} has other weights than the run began with). "
            "Choose another --out (make: OUT=...)"
        )
