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
from fastsnap.training.optim_checks import check_flat, check_groups, check_moved, check_new_group
from fastsnap.training.optim_state import (
    Factors,
    check_saved,
    copy_tensors,
    fill_frozen,
    saved_counts,
    saved_tensors,
    state_per_parameter,
)
from fastsnap.training.scheduler import ShownSchedule


class SnapshotSGD(torch.optim.Optimizer):
    """torch.optim.SGD and its scheduler in one: update t uses `schedule.rate(t)`; dampening is 0.

    params         parameters, (name, parameter) pairs, or groups of either; all fp32 or all bf16, on one device.
                   A group may carry its own "weight_decay" (0 for biases and BatchNorm) and "lr_scale", a constant
                   above 0 that the schedule's rate is multiplied by (layer-wise rates); both cost nothing
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
    state[parameter]                 parts of them, as torch.optim.SGD keeps them: "momentum_buffer", and where kept
                                     "average" and "master"; "step", int64 []: updates done; "averaged": those in
                                     the average
    `param_groups[i]["lr"]` shows the rate of the next update, 0 after the last (on CUDA a tensor that the kernel
    writes: reading it waits for the device). The rate is computed in the update, so setting it, or attaching a torch
    lr_scheduler, is an error; `scheduler()` gives one that only shows. A step past the schedule is an error too; on
    CUDA, replays of a captured step then change nothing. A parameter without a gradient is left as it is. An update
    that GradScaler skips advances the schedule.
    Where the network is moved to another device or converted to another dtype as a whole, the optimizer follows at the
    next step, with new flat tensors. To capture step() in a CUDA graph, call it at least once before, and after setting
    a weight_decay or lr_scale. Autograd is not told of updates: backward() of a loss from
    before one uses the new weights.
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
        self._kept = bf16_copy, master, average_decay
        defaults = {"lr": schedule.rate(0), "weight_decay": weight_decay, "lr_scale": 1.0, **self._fixed}
        super().__init__(params, defaults)
        named = self._named_parameters()
        self.flat = FlatParameters(named) if flat is None else flat
        check_flat(self.flat, named)
        self._held = [(group["params"], len(group["params"])) for group in self.param_groups]
        self._prepare()
        self.seek(0)

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        named: list[tuple[str, nn.Parameter]] = []
        for group in self.param_groups:
            numbers = [str(len(named) + index) for index in range(len(group["params"]))]
            named += zip(group.get("param_names", numbers), group["params"], strict=True)
        return named

    def _prepare(self) -> None:
        """Make what the update works on, where the parameters are, and bind the kernel of that device to it."""
        self._state = new_state(self.flat.data, *self._kept)
        self._factors = Factors(self.flat, self.param_groups)
        self._rates_on_device = list(self._factors.per_group[:, 1])
        self.backend = "triton" if self.flat.data.device.type == "cuda" else "cpu"
        self._update = self._bind()
        self._per_parameter = state_per_parameter(self.flat, self._state)
        self.state.update(self._per_parameter)

    def _bind(self) -> Any:
        """The kernel, bound to the tensors of this run; its calls return the rate of the next update."""
        arguments = self._state, self._rule, self.flat.layout(), self._factors.per_parameter
        if self.backend == "triton":
            from fastsnap.kernels.update_triton import TritonUpdate  # torch with CUDA brings triton

            return TritonUpdate(*arguments, self._factors.per_group)
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

    def scheduler(self) -> ShownSchedule:
        """A torch lr_scheduler for training loops that insist on one: it shows the rates and does nothing."""
        return ShownSchedule(self, self.updates)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters from their gradients; returns the loss that `closure` returns.

        Raises ValueError if all updates of the schedule are done, and for what others have put out of place.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow()
        check_groups(self.param_groups, self._held, self._rates, self._fixed)
        self._factors.refresh(self.param_groups)
        gradients, gradient_dtype = self.flat.gradients()
        self._show_rate(
            self._update(
                gradients,
                gradient_dtype,
                _on_device(getattr(self, "grad_scale", None), self._state.rate),
                _on_device(getattr(self, "found_inf", None), self._state.rate),
            )
        )
        return loss

    def _show_rate(self, rate: float | Tensor) -> None:
        """Show the groups' rates, which on CUDA the kernel itself has written."""
        if isinstance(rate, Tensor):
            self._rates: list[Any] = self._rates_on_device
        else:
            self._rates = [rate * group["lr_scale"] for group in self.param_groups]
        for group, of_group in zip(self.param_groups, self._rates, strict=True):
            group["lr"] = of_group

    def seek(self, updates: int, averaged: int = 0) -> None:
        """Go on as after `updates` updates, `averaged` of them in the average, with the flat tensors as they are.

        For who restores `weights`, `momentum` and `average` as flat tensors; `copy` follows from `weights`.
        Raises ValueError for more updates than the schedule has.
        """
        rate = self._update.seek(updates, averaged)
        if self.copy is not None:
            self.copy.copy_(self.weights)
        self._show_rate(rate)

    def _follow(self) -> None:
        """Go where the network was moved or converted to as a whole; other losses of the flat memory are errors."""
        detached = self.flat.detached()
        if not detached:
            return
        check_moved(self.flat, detached)
        if capturing(self.flat.parameters[0].device):
            raise RuntimeError("the network has moved: call step() once outside of the CUDA graph capture")
        before, (updates, averaged, _) = self._per_parameter, self._state.clock.tolist()
        self.flat.attach()
        self._prepare()
        for parameter, tensors in self._per_parameter.items():
            copy_tensors(tensors, before[parameter])
        take_over_parameters(self._state)
        self.seek(updates, averaged)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is made: the flat storage cannot grow."""
        if hasattr(self, "flat"):
            raise ValueError(
                "add_param_group: the flat storage is fixed; give all groups to a new SnapshotSGD"
            )
        check_new_group(param_group, self.defaults)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As other optimizers', per parameter: see `state` above."""
        # The last of the hooks, after those that may have written into the parameters.
        with self.register_state_dict_pre_hook(lambda _: take_over_parameters(self._state)):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, with the schedule of this optimizer.

        With master values this restores the parameters too. Raises ValueError, and changes nothing, for a state of
        another optimizer, momentum, network or choice of average_decay and master, and for more updates than the
        schedule has.
        """
        with self.register_load_state_dict_pre_hook(lambda _, saved: self._accept(saved)):  # the last one
            super().load_state_dict(state_dict)

    def _accept(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Check what the hooks have left of a saved state, and keep its tensors from torch, which would round them."""
        self._follow()
        saved = fill_frozen(saved, self.param_groups, self._per_parameter)
        names = [name for name, _ in self._named_parameters()]
        updates, averaged = saved_counts(saved)
        check_saved(saved, self.param_groups, self._per_parameter, names, self._fixed)
        self.schedule.rate_after(updates)
        self._loading = saved_tensors(saved), updates, averaged
        groups = [{"lr_scale": 1.0, **group} for group in saved["param_groups"]]
        return {**saved, "state": {}, "param_groups": groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of torch's load_state_dict: between its checks and the hooks that follow."""
        super().__setstate__(state)
        saved, updates, averaged = self._loading
        del self._loading
        self.state.update(self._per_parameter)
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for parameter, tensors in zip(parameters, saved, strict=True):
                copy_tensors(self._per_parameter[parameter], tensors)
        self._factors.refresh(self.param_groups)
        self.seek(updates, averaged)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "SnapshotSGD shares its memory with the network and cannot be copied: use state_dict()"
        )


def _on_device(scalar: Tensor | None, like: Tensor) -> Tensor | None:
    return None if scalar is None else scalar.to(device=like.device, dtype=like.dtype)
