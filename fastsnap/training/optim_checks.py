"""What SnapshotSGD accepts as groups, storage and saved state; each error says what to do instead."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastsnap.training.flat import FlatParameters

GROUP_KEYS = {"params", "param_names", "lr", "weight_decay", "momentum", "nesterov"}
Group = dict[str, Any]
State = Mapping[Tensor, dict[str, Tensor]]  # of each parameter, by name


def check_decay(weight_decay: float) -> None:
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and at least 0, got {weight_decay}")


def check_new_group(group: Group, defaults: Group) -> None:
    """Refuse a group that asks for what would be ignored. `defaults`: "lr", "momentum" and "nesterov" in force."""
    _check_keys(group)
    for name, value in defaults.items():
        if name != "weight_decay" and group.get(name, value) != value:
            raise ValueError(
                f"a group may only carry its own weight_decay, got {name}={group[name]} where {value} is in force"
            )
    check_decay({**defaults, **group}["weight_decay"])


def check_groups(groups: Sequence[Group], rate: float | Tensor, fixed: Group) -> None:
    """Refuse groups in which others have changed what would be ignored. `rate`: the very object shown as "lr"."""
    for group in groups:
        if "initial_lr" in group or group["lr"] is not rate:
            raise ValueError(
                "the learning rate comes from the schedule in the update: remove the lr_scheduler, and do not "
                "set param_groups[i]['lr']"
            )
        _check_keys(group)
        if any(group[name] != value for name, value in fixed.items()):
            raise ValueError(f"{fixed} are fixed, only weight_decay may differ between groups")


def _check_keys(group: Group) -> None:
    if not group.keys() <= GROUP_KEYS:
        raise ValueError(
            f"a group may only carry its own weight_decay, got {sorted(group.keys() - GROUP_KEYS)}, which would be "
            "ignored: remove it (dampening is 0, and the update is always fused)"
        )


def check_flat(flat: FlatParameters, named: Sequence[tuple[str, nn.Parameter]]) -> None:
    held = set(flat.parameters)
    missing = [name for name, parameter in named if parameter not in held]
    if missing or len(named) != len(flat.parameters) or flat.detached():
        raise ValueError(
            f"flat must hold exactly the parameters given, attached; not in it: {missing or 'none'}"
        )


def check_attached(flat: FlatParameters) -> None:
    detached = flat.detached()
    if detached:
        raise ValueError(
            f"the parameters no longer are views of flat.data ({detached[0]}, {len(detached)} in all): move or convert "
            "the network before the optimizer is made, and write values with copy_() instead of assigning "
            "parameter.data"
        )


def check_saved(
    saved: Group, groups: Sequence[Group], state: State, names: Sequence[str], fixed: Group
) -> None:
    """Refuse a state_dict that does not fit, before anything of it is taken over.

    groups, names, state   of the optimizer that is to take it: its groups, the names of all their parameters in
                           order, and its tensors of each parameter
    """
    missing = sorted({"state", "param_groups", "updates", "averaged"} - saved.keys())
    if missing:
        raise ValueError(
            f"state_dict has no {missing}, so no SnapshotSGD saved it (torch.optim.SGD does not, for one): copy the "
            "momentum buffers into state[parameter]['momentum_buffer'] and call seek(updates), or start anew"
        )
    sizes, own = [[len(g["params"]) for g in some] for some in (saved["param_groups"], groups)]
    if sizes != own:
        raise ValueError(
            f"state_dict has groups of {sizes} parameters, this optimizer of {own}: make the same groups"
        )
    for group in saved["param_groups"]:
        _check_keys(group)
        check_decay(group["weight_decay"])
        for name, value in fixed.items():
            if group[name] != value:
                raise ValueError(
                    f"state_dict was saved with {name}={group[name]}, this optimizer has {value}: make it with that"
                )
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for name, index, parameter in zip(names, indices, parameters, strict=True):
        _check_tensors(name, saved["state"].get(index, {}), state[parameter])


def _check_tensors(name: str, saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    if saved.keys() != own.keys():
        raise ValueError(
            f"state_dict holds {sorted(saved)} of parameter {name}, this optimizer keeps {sorted(own)}: make it with "
            "the same average_decay and master, for parameters of the same dtype"
        )
    for key, tensor in own.items():
        if saved[key].shape != tensor.shape:
            raise ValueError(
                f"state_dict holds {key} of shape {list(saved[key].shape)} for parameter {name}, which has shape "
                f"{list(tensor.shape)}: it is of another network"
            )
