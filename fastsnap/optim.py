"""SnapshotSGD: SGD with Nesterov momentum that computes its own learning rate and updates all tensors in one launch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsnap.flat import FlatParameters
from fastsnap.kernels.update import Rule, State, new_clock, reference_update
from fastsnap.schedule import Schedule


class SnapshotSGD(torch.optim.Optimizer):
    """torch.optim.SGD and its scheduler in one: update t uses `schedule.rate(t)`, dampening is 0.

    params         parameters, (name, parameter) pairs or groups of them, fp32 or bf16, all on one device; a group may
                   carry its own "weight_decay" (0 for biases and BatchNorm) at no extra cost
    schedule       the learning rate, a pure function of the number of updates done
    momentum       0 <= momentum < 1; weight_decay: >= 0, L2 added to the gradient
    flat           storage that the parameters already are views of; default: made here
    bf16_copy      fp32 parameters only: also keep the weights rounded to bf16 in `copy`
    master         bf16 parameters only: keep fp32 values of the weights in `weights`
    average_decay  keep a running average of the weights in `average`: 1 for the mean of all updates (SWA), below 1
                   for an exponential one (EMA)

    flat, momentum, weights, copy, average: FlatParameters and flat tensors of its size.
    `param_groups[i]["lr"]` shows the rate of the next update; it is computed, so setting it or attaching a torch
    lr_scheduler is an error. A parameter whose gradient is None is left as it is.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then passes its scale on the device

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
        defaults = {
            "lr": schedule.rate(0),
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)
        self.schedule = schedule
        self.flat = FlatParameters(self._named_parameters()) if flat is None else flat
        self._rule = Rule(
            schedule.kind,
            schedule.steps,
            schedule.cycles,
            schedule.learning_rate,
            momentum,
            nesterov,
            average_decay,
        )
        data = self.flat.data
        rounded = data.dtype == torch.bfloat16
        weights = data.float() if rounded and master else data
        self._state = State(
            weights=weights,
            momentum=torch.zeros_like(data, dtype=torch.float32),
            copy=data if rounded and master else data.bfloat16() if bf16_copy else None,
            average=None if average_decay is None else data.float().clone(),
            clock=new_clock(data.device),
            rate=torch.tensor([schedule.rate(0)], dtype=torch.float32, device=data.device),
        )

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        named = []
        for group in self.param_groups:
            names = group.get("param_names") or [
                f"{len(named) + index}" for index in range(len(group["params"]))
            ]
            named += zip(names, group["params"], strict=True)
        return named

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
        """Number of updates done, skipped ones included; waits for the device on CUDA."""
        return int(self._state.clock[0].item())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters from their gradients; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decay_of = {p: group["weight_decay"] for group in self.param_groups for p in group["params"]}
        reference_update(
            self._state,
            self._rule,
            self.flat.offsets,
            [p.grad for p in self.flat.parameters],
            [decay_of[p] for p in self.flat.parameters],
            self.schedule.rate,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
        )
        for group in self.param_groups:
            group["lr"] = self.schedule.rate(self.updates())
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.SGD's (views of the flat momentum), and "updates", the number of updates done."""
        views = self.flat.views(self.momentum)
        self.state.update(
            {p: {"momentum_buffer": v} for p, v in zip(self.flat.parameters, views, strict=True)}
        )
        return super().state_dict() | {"updates": self.updates()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for parameter, view in zip(self.flat.parameters, self.flat.views(self.momentum), strict=True):
            view.copy_(self.state[parameter]["momentum_buffer"])
        self.seek(state_dict["updates"])

    def seek(self, updates: int) -> None:
        """Continue as after `updates` updates: what the trainer calls on resume after filling `momentum`."""
        self._state.clock[0] = updates
        self._state.rate.fill_(self.schedule.rate(updates))
        for group in self.param_groups:
            group["lr"] = self.schedule.rate(updates)
