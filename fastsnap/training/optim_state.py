"""What SnapshotSGD keeps: per parameter, of its groups on the device, and what of it a saved state must hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsnap.kernels.update import State as UpdateState
from fastsnap.kernels.update import capturing
from fastsnap.training.flat import FlatParameters, own_storage
from fastsnap.training.optim_checks import Group, check_factors, check_keys

COUNTERS = {"step", "averaged"}  # int64 [], the same tensor for every parameter
State = Mapping[Tensor, dict[str, Tensor]]  # of each parameter, by name


def state_per_parameter(flat: FlatParameters, state: UpdateState) -> State:
    """The state as other optimizers keep it: per parameter, here parts of the flat tensors and of the clock."""
    flats = {"momentum_buffer": state.momentum, "average": state.average}
    if state.weights is not flat.data:
        flats["master"] = state.weights
    parts = {name: flat.views(tensor) for name, tensor in flats.items() if tensor is not None}
    counters = {"step": own_storage(state.clock[0])}
    if state.average is not None:
        counters["averaged"] = own_storage(state.clock[1])
    return {p: {name: parts[name][i] for name in parts} | counters for i, p in enumerate(flat.parameters)}


def copy_tensors(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy what both hold of a parameter, counters aside."""
    for name in (own.keys() & saved.keys()) - COUNTERS:
        own[name].copy_(saved[name])


class Factors:
    """What groups may differ in, on the device, where the update reads it.

    per_parameter  fp32 [parameters, 2], in the order of `flat`: weight decay, and what the rate is multiplied by
    per_group      fp32 [groups, 2]: what the rate is multiplied by, and, written by the kernel on CUDA, the result
    """

    def __init__(self, flat: FlatParameters, groups: Sequence[Group]) -> None:
        options: dict[str, Any] = {"dtype": torch.float32, "device": flat.data.device}
        self._flat = flat
        self.per_parameter = torch.zeros(len(flat.parameters), 2, **options)
        self.per_group = torch.zeros(len(groups), 2, **options)
        self._values: list[tuple[float, float]] = []
        self.refresh(groups)

    def refresh(self, groups: Sequence[Group]) -> None:
        """Take over what has changed in the groups. Raises ValueError for values out of range."""
        values = [(group["weight_decay"], group["lr_scale"]) for group in groups]
        if values == self._values:
            return
        for group in groups:
            check_factors(group)
        if capturing(self.per_group.device):
            raise RuntimeError(
                "weight_decay or lr_scale has changed: call step() once outside of the CUDA graph capture"
            )
        self._values = values
        of_parameter = {p: v for group, v in zip(groups, values, strict=True) for p in group["params"]}
        self._write(self.per_parameter, [of_parameter[parameter] for parameter in self._flat.parameters])
        self._write(self.per_group[:, 0], [scale for _, scale in values])

    @staticmethod
    def _write(tensor: Tensor, values: list[Any]) -> None:
        tensor.copy_(torch.tensor(values, dtype=torch.float32, device="cpu"))


def check_saved(
    saved: Group, groups: Sequence[Group], state: State, names: Sequence[str], fixed: Group
) -> None:
    """Refuse a state_dict that does not fit, before anything of it is taken over.

    groups, names, state   of the optimizer that is to take it: its groups, the names of all their parameters in
                           order, and its tensors of each parameter
    """
    sizes, own = [[len(g["params"]) for g in some] for some in (saved["param_groups"], groups)]
    if sizes != own:
        raise ValueError(
            f"state_dict has groups of {sizes} parameters, this optimizer of {own}: make the same groups"
        )
    for group in saved["param_groups"]:
        check_keys(group)
        check_factors({"lr_scale": 1.0, **group})
        for name, value in fixed.items():
            if group[name] != value:
                raise ValueError(
                    f"state_dict was saved with {name}={group[name]}, this optimizer has {value}: make it with that"
                )
    parameters = [parameter for group in groups for parameter in group["params"]]
    for name, tensors, parameter in zip(names, saved_tensors(saved), parameters, strict=True):
        _check_tensors(name, tensors, state[parameter])


def saved_tensors(saved: Group) -> list[dict[str, Any]]:
    """The state of each parameter, in the order of the groups."""
    return [saved["state"].get(index, {}) for group in saved["param_groups"] for index in group["params"]]


def fill_frozen(saved: Group, groups: Sequence[Group], state: State) -> Group:
    """`saved`, and in it what torch.distributed.checkpoint leaves out: the state of parameters that need no gradient.

    It stays as it is. Raises ValueError where that would spoil an average.
    """
    of_parameters: dict[Any, dict[str, Any]] = dict(saved.get("state", {}))
    counters = next(
        ({k: s[k] for k in COUNTERS & s.keys()} for s in of_parameters.values() if "step" in s), {}
    )
    indices = [index for group in saved.get("param_groups", ()) for index in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for index, parameter in zip(indices, parameters, strict=False):  # where they differ, check_saved says so
        if index not in of_parameters and not parameter.requires_grad and counters:
            if "average" in state[parameter]:
                raise ValueError(
                    f"state_dict has no state of parameter {index}, which needs no gradient, and so no average of it: "
                    "call requires_grad_(True) on the network while the state is loaded"
                )
            of_parameters[index] = {**state[parameter], **counters}
    return {**saved, "state": of_parameters} if "state" in saved else saved


def saved_counts(saved: Group) -> tuple[int, int]:
    """Numbers of updates done and of updates in the average, of a state_dict.

    Raises ValueError for none, and for parameters that do not agree.
    """
    missing = sorted({"state", "param_groups"} - saved.keys())
    if missing:
        raise ValueError(f"state_dict has no {missing}: it is not an optimizer's")
    if "updates" in saved:  # as version 0.1.0 saved them, beside "state" and "param_groups"
        return saved["updates"], saved.get("averaged", 0)
    tensors = saved_tensors(saved)
    if not tensors or not all("step" in of_parameter for of_parameter in tensors):
        raise ValueError(
            "state_dict has no 'step' of each parameter, so no SnapshotSGD saved it (torch.optim.SGD does not, for "
            "one): copy the momentum buffers into state[parameter]['momentum_buffer'] and call seek(updates), or "
            "start anew"
        )
    counts = {(int(t["step"]), int(t.get("averaged", 0))) for t in tensors}
    if len(counts) > 1:
        raise ValueError(
            f"state_dict has parameters of different numbers of updates, {sorted({step for step, _ in counts})}: it "
            "was put together from several; all are updated at once"
        )
    return counts.pop()


def _check_tensors(name: str, saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    if saved.keys() - COUNTERS != own.keys() - COUNTERS:
        raise ValueError(
            f"state_dict holds {sorted(saved.keys() - COUNTERS)} of parameter {name}, this optimizer keeps "
            f"{sorted(own.keys() - COUNTERS)}: make it with the same average_decay and master, for parameters of the "
            "same dtype"
        )
    for key in own.keys() - COUNTERS:
        if saved[key].shape != own[key].shape:
            raise ValueError(
                f"state_dict holds {key} of shape {list(saved[key].shape)} for parameter {name}, which has shape "
                f"{list(own[key].shape)}: it is of another network"
            )
