"""What SnapshotSGD accepts as groups and storage; each error says what to do instead."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastsnap.training.flat import FlatParameters

OWN_KEYS = {"weight_decay", "lr_scale"}  # what groups may differ in
GROUP_KEYS = OWN_KEYS | {"params", "param_names", "lr", "momentum", "nesterov"}
Group = dict[str, Any]

NO_SCHEDULER = (
    "the learning rate comes from the schedule in the update: remove the lr_scheduler, and do not set "
    "param_groups[i]['lr'] (a constant factor for a group is its 'lr_scale'). For a training loop that insists on a "
    "scheduler, optimizer.scheduler() is one that shows the rate and changes nothing"
)


def check_factors(group: Group) -> None:
    """Refuse a weight decay or a scale of the rate out of range."""
    decay, scale = group["weight_decay"], group["lr_scale"]
    if not 0 <= decay < math.inf:
        raise ValueError(f"weight_decay must be finite and at least 0, got {decay}")
    if not 0 < ctypes.c_float(scale).value < math.inf:
        raise ValueError(
            f"lr_scale must be finite and above 0 in float32, got {scale}: to freeze parameters, leave them out or "
            "call requires_grad_(False) on them"
        )


def check_new_group(group: Group, defaults: Group) -> None:
    """Refuse a group that asks for what would be ignored, or twice for the same.

    group     "params" may be an iterator: it becomes a list. defaults: what is in force for all groups
    """
    check_keys(group)
    for name, value in defaults.items():
        if name not in OWN_KEYS and group.get(name, value) != value:
            raise ValueError(
                f"a group may only carry its own weight_decay and lr_scale, got {name}={group[name]} where {value} is "
                "in force"
            )
    check_factors({**defaults, **group})
    if not isinstance(group["params"], (Tensor, set)):  # torch makes a list of the one and refuses the other
        group["params"] = list(group["params"])
        _check_unique(group["params"])


def _check_unique(params: Sequence[Any]) -> None:
    seen: dict[Tensor, str] = {}
    for index, entry in enumerate(params):
        name, parameter = entry if isinstance(entry, tuple) else (str(index), entry)
        if parameter in seen:
            raise ValueError(
                f"params holds one parameter twice, as {seen[parameter]} and as {name}: give it once "
                "(network.named_parameters() and parameters() do, also where layers share it)"
            )
        seen[parameter] = name


def check_groups(
    groups: Sequence[Group],
    held: Sequence[tuple[list[nn.Parameter], int]],
    rates: Sequence[Any],
    fixed: Group,
) -> None:
    """Refuse groups in which others have changed what would be ignored.

    held   of each group, the very list that was its "params" when the optimizer was made, and its length
    rates  of each group, the very object that was its "lr" after the last update
    """
    if len(groups) != len(held) or any(map(_replaced, groups, held)):
        raise ValueError(
            "the parameters of param_groups were replaced or removed, but the update is bound to those that the "
            "optimizer was made with: make a new one, and do not wrap it in a sharding optimizer (DeepSpeed's ZeRO, "
            "ZeroRedundancyOptimizer): use DistributedDataParallel"
        )
    for group, rate in zip(groups, rates, strict=True):
        if group["lr"] is not rate:
            raise ValueError(NO_SCHEDULER)
        check_keys(group)
        if any(group[name] != value for name, value in fixed.items()):
            raise ValueError(f"{fixed} are fixed, only weight_decay and lr_scale may differ between groups")


def _replaced(group: Group, held: tuple[list[nn.Parameter], int]) -> bool:
    params, count = held
    return group["params"] is not params or len(params) != count


def check_keys(group: Group) -> None:
    """Refuse a group that holds what would be ignored."""
    if group.keys() <= GROUP_KEYS:
        return
    if "initial_lr" in group:
        raise ValueError(f"a torch lr_scheduler is or was attached ('initial_lr' in a group). {NO_SCHEDULER}")
    if "schedule" in group:
        raise ValueError(
            "the schedule is an argument of SnapshotSGD, not of a group: ZeroRedundancyOptimizer, which puts all "
            "arguments there, cannot wrap it (flat storage holds whole parameters): use SnapshotSGD alone, under "
            "DistributedDataParallel"
        )
    raise ValueError(
        f"a group may only carry its own weight_decay and lr_scale, got {sorted(group.keys() - GROUP_KEYS)}, which "
        "would be ignored: remove it (dampening is 0, and the update is always fused)"
    )


def check_flat(flat: FlatParameters, named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Refuse storage of other parameters than `named`."""
    held, given = set(flat.parameters), {parameter for _, parameter in named}
    faults = {
        "not in it": [name for name, parameter in named if parameter not in held],
        "only in it": [n for n, p in zip(flat.names, flat.parameters, strict=True) if p not in given],
        "moved out of it": flat.detached(),
    }
    found = ", ".join(f"{fault}: {names}" for fault, names in faults.items() if names)
    if found:
        raise ValueError(f"flat must hold exactly the parameters given; {found}")


def check_moved(flat: FlatParameters, detached: Sequence[str]) -> None:
    """Refuse parameters that no longer lie in the flat memory, unless the network was moved or converted as a whole."""
    if not flat.moved():
        raise ValueError(
            f"the parameters no longer are views of flat.data ({detached[0]}, {len(detached)} in all). Put the line "
            "that converts the network (.to(memory_format=...), .to(...) of a part, share_memory_(), another optimizer "
            "or FlatParameters of these parameters) before the one that makes this optimizer; write values with "
            "copy_() instead of assigning parameter.data; and convert a "
            "copy.deepcopy(network) to evaluate in another dtype"
        )
