"""SnapshotSGD: SGD with Nesterov momentum that knows its schedule and updates all tensors in one launch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsnap.kernels.cpu import has_library
from fastsnap.kernels.schedule import Schedule
from fastsnap.kernels.update import Rule, capturing, new_state, take_over_parameters
from fastsnap.kernels.update_plain import PlainUpdate
from fastsnap.training.flat import FlatParameters
from fastsnap.training.optim_checks import (
    check_attached,
    check_decay,
    check_flat,
    check_groups,
    check_new_group,
    check_saved,
)


class SnapshotSGD(torch.optim.Optimizer):
    """torch.optim.SGD and its scheduler in one: update t uses `schedule.rate(t)`; dampening is 0.

    params         parameters, (name, parameter) pairs, or groups of either; all fp32 or all bf16, on one device;
                   a group may carry its own "weight_decay" (0 for biases and BatchNorm), which costs nothing
    schedule       the learning rate as a function of the number of updates done
    momentum       at least 0, below 1; weight_decay: at least 0, times the weight, is added to the gradient
    flat           storage whose views the parameters already are; default: made here, in the memory layout that the
                   parameters have: make a network channels-last before
    bf16_copy      fp32 parameters: also keep the weights rounded to bf16, in `copy`, as of the last update or seek()
    master         bf16 parameters: keep the values in fp32, in `weights`; the parameters are those rounded. What
                   somebody writes into the parameters (net.load_state_dict) counts from the next update on
    average_decay  keep a running average of the weights in `average`: 1 is their mean (SWA), below 1 exponential
                   (EMA, a plain mean until 1 / (1 - average_decay) updates are in it)

    flat                             FlatParameters
    weights, momentum, copy, average flat tensors of its size: the values in force, fp32 momentum, and the two above
    backend                          "cpu" or "triton"
    `param_groups[i]["lr"]` shows the rate of the next update (on CUDA a tensor that the kernel writes: reading it
    waits for the device). The rate is computed in the update, so setting it, or attaching a torch lr_scheduler, is
    an error. A parameter without a gradient is left as it is. An update that GradScaler skips advances the schedule.
    To capture step() in a CUDA graph, call it at least once before, and after setting a weight_decay.
    Raises ValueError for values out of range, and naming the parameter for gradients that cannot be used.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then hands over its scale on the device

    def __init__(
        self,
        params: Iterable[Any],
        schedule: Schedule,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = True,
        flat: FlatParameters | None = None,
        bf16_copy: bool = False,
        master: bool = True,
        average_decay: float | None = None,
    ) -> None:
        self.schedule = schedule
        self._rule = Rule(schedule, momentum, nesterov, average_decay)
        self._fixed = {"momentum": momentum, "nesterov": nesterov}
        super().__init__(params, {"lr": schedule.rate(0), "weight_decay": weight_decay, **self._fixed})
        named = self._named_parameters()
        self.flat = FlatParameters(named) if flat is None else flat
        check_flat(self.flat, named)
        self._state = new_state(self.flat.data, bf16_copy, master, average_decay)
        self._decays = torch.zeros(len(self.flat.parameters), device=self.flat.data.device)
        self._set_decays()
        self.backend = _backend(self.flat.data.device)
        self._update = self._bind()
        self._per_parameter = self._state_per_parameter()
        self.state.update(self._per_parameter)
        self.seek(0)

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        named: list[tuple[str, nn.Parameter]] = []
        for group in self.param_groups:
            numbers = [str(len(named) + index) for index in range(len(group["params"]))]
            named += zip(group.get("param_names", numbers), group["params"], strict=True)
        return named

    def _state_per_parameter(self) -> dict[Tensor, dict[str, Tensor]]:
        """The state as torch.optim.SGD keeps it: per parameter, here views into the flat tensors."""
        flats = {"momentum_buffer": self.momentum, "average": self.average}
        if self.weights is not self.flat.data:
            flats["master"] = self.weights
        views = {name: self.flat.views(flat) for name, flat in flats.items() if flat is not None}
        return {p: {name: views[name][i] for name in views} for i, p in enumerate(self.flat.parameters)}

    def _bind(self) -> Any:
        """The kernel of the device, bound to the tensors of this run; its calls return the rate of the next update."""
        arguments = self._state, self._rule, self.flat.layout(), self._decays
        if self.backend == "triton":
            from fastsnap.kernels.update_triton import TritonUpdate  # torch with CUDA brings triton

            return TritonUpdate(*arguments)
        if has_library():
            from fastsnap.kernels.update_cpu import CpuUpdate

            return CpuUpdate(*arguments)
        return PlainUpdate(*arguments)

    @property
    def weights(self) -> Tensor:
        return self._state.weights

    @property
    def momentum(self) -> Tensor:
        return self._state.momentum

    @property
    def copy(self) -> Tensor | None:
        return self._state.copy

    @property
    def average(self) -> Tensor | None:
        return self._state.average

    def updates(self) -> int:
        """Number of updates done, skipped ones included; on CUDA this waits for the device."""
        return int(self._state.clock[0].item())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters from their gradients; returns the loss that `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_attached(self.flat)
        check_groups(self.param_groups, self._shown_rate, self._fixed)
        if [group["weight_decay"] for group in self.param_groups] != self._decay_values:
            self._set_decays()
        gradients, gradient_dtype = self.flat.gradients()
        self._show_rate(
            self._update(
                gradients,
                gradient_dtype,
                _on_device(getattr(self, "grad_scale", None), self._decays),
                _on_device(getattr(self, "found_inf", None), self._decays),
            )
        )
        return loss

    def _set_decays(self) -> None:
        """Take over the groups' weight decays, which the update reads on the device."""
        for group in self.param_groups:
            check_decay(group["weight_decay"])
        if capturing(self._decays.device):
            raise RuntimeError("weight_decay has changed: call step() once outside of the CUDA graph capture")
        of_parameter = {p: group["weight_decay"] for group in self.param_groups for p in group["params"]}
        self._decays.copy_(torch.tensor([of_parameter[p] for p in self.flat.parameters]))
        self._decay_values = [group["weight_decay"] for group in self.param_groups]

    def _show_rate(self, rate: float | Tensor) -> None:
        self._shown_rate = rate
        for group in self.param_groups:
            group["lr"] = rate

    def seek(self, updates: int, averaged: int = 0) -> None:
        """Go on as after `updates` updates, `averaged` of them in the average, with the flat tensors as they are.

        For who restores `weights`, `momentum` and `average` as flat tensors; `copy` follows from `weights`.
        """
        rate = self._update.seek(updates, averaged)
        if self.copy is not None:
            self.copy.copy_(self.weights)
        self._show_rate(rate)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is made: the flat storage cannot grow."""
        if hasattr(self, "flat"):
            raise ValueError(
                "add_param_group: the flat storage is fixed; give all groups to a new SnapshotSGD"
            )
        check_new_group(param_group, self.defaults)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.SGD's, and "updates" and "averaged", the numbers of updates done and in the average."""
        take_over_parameters(self._state)
        updates, averaged, _ = self._state.clock.tolist()
        return super().state_dict() | {"updates": updates, "averaged": averaged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, with the schedule of this optimizer.

        With master values this restores the parameters too. Raises ValueError, and changes nothing, for a state of
        another optimizer, momentum, network or choice of average_decay and master.
        """
        names = [name for name, _ in self._named_parameters()]
        check_saved(state_dict, self.param_groups, self._per_parameter, names, self._fixed)
        super().load_state_dict(state_dict | {"state": {}})
        saved = [state_dict["state"][i] for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state.update(self._per_parameter)
        with torch.no_grad():
            for parameter, tensors in zip(parameters, saved, strict=True):
                for name, view in self._per_parameter[parameter].items():
                    view.copy_(tensors[name])
        self._set_decays()
        self.seek(state_dict["updates"], state_dict["averaged"])

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "SnapshotSGD shares its memory with the network and cannot be copied: use state_dict()"
        )


def _backend(device: torch.device) -> str:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"parameters must be on cpu or cuda, got {device}")
    return "triton" if device.type == "cuda" else "cpu"


def _on_device(scalar: Tensor | None, like: Tensor) -> Tensor | None:
    return None if scalar is None else scalar.to(device=like.device, dtype=like.dtype)
