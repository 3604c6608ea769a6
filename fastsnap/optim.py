"""SnapshotSGD: SGD with Nesterov momentum that knows its schedule and updates all tensors in one launch."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsnap.flat import FlatParameters
from fastsnap.kernels.update import Rule, new_state
from fastsnap.schedule import Schedule


class SnapshotSGD(torch.optim.Optimizer):
    """torch.optim.SGD and its scheduler in one: update t uses `schedule.rate(t)`; dampening is 0.

    params         parameters, (name, parameter) pairs, or groups of either; all fp32 or all bf16, on one device;
                   a group may carry its own "weight_decay" (0 for biases and BatchNorm), which costs nothing
    schedule       the learning rate as a function of the number of updates done
    momentum       at least 0, below 1; weight_decay: at least 0, times the weight, is added to the gradient
    flat           storage whose views the parameters already are; default: made here, and convolution weights become
                   channels-last then (safetensors wants them .contiguous())
    bf16_copy      fp32 parameters: also keep the weights rounded to bf16, in `copy`
    master         bf16 parameters: keep the values in fp32, in `weights`; the parameters are those rounded
    average_decay  keep a running average of the weights in `average`: 1 is their mean (SWA), below 1 exponential
                   (EMA, a plain mean until 1 / (1 - average_decay) updates are in it)

    flat                             FlatParameters
    weights, momentum, copy, average flat tensors of its size: the values in force, fp32 momentum, and the two above
    backend                          "cpu" or "triton"
    `param_groups[i]["lr"]` shows the rate of the next update (on CUDA a tensor that the kernel writes: reading it
    waits for the device). The rate is computed in the update, so setting it, or attaching a torch lr_scheduler, is
    an error. A parameter without a gradient is left as it is. An update that GradScaler skips advances the schedule.
    To capture step() in a CUDA graph, call it at least once before.
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
        self._rule = Rule(
            schedule.kind,
            schedule.steps,
            schedule.cycles,
            schedule.learning_rate,
            momentum,
            nesterov,
            average_decay,
        )
        self._fixed = {"momentum": momentum, "nesterov": nesterov}
        super().__init__(params, {"lr": schedule.rate(0), "weight_decay": weight_decay, **self._fixed})
        named = self._named_parameters()
        self.flat = FlatParameters(named) if flat is None else flat
        _check_flat(self.flat, named)
        self._state = new_state(self.flat.data, bf16_copy, master, average_decay)
        self._decays = torch.zeros(len(self.flat.parameters), device=self.flat.data.device)
        self._decay_values: list[float] = []
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

    def _bind(self) -> Callable[..., float | Tensor]:
        """The kernel of the device, bound to the tensors of this run; returns the rate of the next update."""
        arguments = self._state, self._rule, self.flat.layout(), self._decays
        if self.backend == "triton":
            from fastsnap.kernels.update_triton import TritonUpdate  # torch with CUDA brings triton

            return TritonUpdate(*arguments)
        from fastsnap.kernels.update_cpu import CpuUpdate

        return CpuUpdate(*arguments, self.schedule.rate)

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
        self._check_groups()
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

    def _check_groups(self) -> None:
        """Refuse what would be ignored without a word; take over changed weight decays."""
        if not self.flat.ends_attached():
            raise ValueError(
                "the parameters no longer are views of flat.data: move or convert the network before the optimizer "
                "is made, and write values with copy_() instead of assigning parameter.data"
            )
        for group in self.param_groups:
            if "initial_lr" in group or group["lr"] is not self._shown_rate:
                raise ValueError(
                    "the learning rate comes from the schedule in the update: remove the lr_scheduler, and do not "
                    "set param_groups[i]['lr']"
                )
            if any(group[name] != value for name, value in self._fixed.items()):
                raise ValueError(f"{self._fixed} are fixed, only weight_decay may differ between groups")
        decays = [group["weight_decay"] for group in self.param_groups]
        if decays != self._decay_values:
            of_parameter = {p: group["weight_decay"] for group in self.param_groups for p in group["params"]}
            self._decays.copy_(torch.tensor([of_parameter[p] for p in self.flat.parameters]))
            self._decay_values = decays

    def _show_rate(self, rate: float | Tensor) -> None:
        self._shown_rate = rate
        for group in self.param_groups:
            group["lr"] = rate

    def seek(self, updates: int, averaged: int = 0) -> None:
        """Go on as after `updates` updates, `averaged` of them in the average, with the flat tensors as they are.

        For who restores `weights`, `momentum` and `average` as flat tensors; `copy` follows from `weights`.
        """
        self._state.clock.copy_(torch.tensor([updates, averaged, 0]))
        if self.copy is not None:
            self.copy.copy_(self.weights)
        rate = self.schedule.rate(updates)
        self._state.rate.fill_(rate)
        self._show_rate(rate if self.backend == "cpu" else self._state.rate[0])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is made: the flat storage cannot grow."""
        if hasattr(self, "flat"):
            raise ValueError(
                "add_param_group: the flat storage is fixed; give all groups to a new SnapshotSGD"
            )
        for name, value in self._fixed.items():
            if param_group.get(name, value) != value:
                raise ValueError(
                    f"a group may only carry its own weight_decay, got {name}={param_group[name]}"
                )
        _check_decay(param_group.get("weight_decay", self.defaults["weight_decay"]))
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.SGD's, and "updates" and "averaged", the numbers of updates done and in the average."""
        updates, averaged, _ = self._state.clock.tolist()
        return super().state_dict() | {"updates": updates, "averaged": averaged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, with the schedule of this optimizer."""
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.state.clear()  # super() has put copies there, cast to the type of the parameters
        self.state.update(self._per_parameter)
        saved = [state_dict["state"][i] for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for parameter, tensors in zip(parameters, saved, strict=True):
                for name, view in self._per_parameter[parameter].items():
                    view.copy_(tensors[name])
        self.seek(state_dict["updates"], state_dict["averaged"])

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "SnapshotSGD shares its memory with the network and cannot be copied: use state_dict()"
        )


def _check_decay(weight_decay: float) -> None:
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and at least 0, got {weight_decay}")


def _check_flat(flat: FlatParameters, named: list[tuple[str, nn.Parameter]]) -> None:
    missing = [name for name, parameter in named if parameter not in set(flat.parameters)]
    if missing or len(named) != len(flat.parameters) or not flat.attached():
        raise ValueError(
            f"flat must hold exactly the parameters given, attached; not in it: {missing or 'none'}"
        )


def _backend(device: torch.device) -> str:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"parameters must be on cpu or cuda, got {device}")
    return "triton" if device.type == "cuda" else "cpu"


def _on_device(scalar: Tensor | None, like: Tensor) -> Tensor | None:
    return None if scalar is None else scalar.to(device=like.device, dtype=like.dtype)
