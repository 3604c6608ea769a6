"""The update on a CPU: one call into update_cpu.cpp, which addresses the gradients through a table of pointers."""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu import address, library
from .update import Layout, Rule, State

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class UpdateArguments(ctypes.Structure):
    """`struct Update` of update_cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("chunks", "chunk_count", "addresses", "factors")),
        *((name, ctypes.c_int64) for name in ("weights", "momentum", "copy", "average", "clock", "rate")),
        *((name, ctypes.c_int64) for name in ("scale", "found_inf", "weight_type", "gradient_type")),
        *((name, ctypes.c_int64) for name in ("nesterov", "master", "threads")),
        *((name, ctypes.c_double) for name in ("momentum_coefficient", "average_decay")),
    )


class CpuUpdate:
    """`reference_update` as one call, bound to the tensors of a run."""

    def __init__(self, state: State, rule: Rule, layout: Layout, factors: Tensor) -> None:
        """factors: fp32 [tensors, 2], weight decay and scale of the rate of each, read at every update."""
        self._function = library().fastsnap_update
        self._function.restype = ctypes.c_int64
        self._schedule = rule.schedule
        self._rate = ctypes.c_float.from_address(state.rate.data_ptr())
        self._clock = (ctypes.c_int64 * 3).from_address(state.clock.data_ptr())
        self._chunks = layout.chunks()
        self._kept = state, factors  # the memory that the arguments point to
        self._arguments = UpdateArguments(
            chunks=self._chunks.data_ptr(),
            chunk_count=len(self._chunks),
            factors=factors.data_ptr(),
            weights=state.weights.data_ptr(),
            momentum=state.momentum.data_ptr(),
            copy=address(state.copy),
            average=address(state.average),
            clock=state.clock.data_ptr(),
            rate=state.rate.data_ptr(),
            weight_type=TYPES[state.weights.dtype],
            nesterov=rule.nesterov,
            master=state.master,
            momentum_coefficient=rule.momentum,
            average_decay=rule.average_decay or 0.0,
        )

    def __call__(
        self,
        gradients: Sequence[Tensor | None],
        gradient_dtype: torch.dtype,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> float:
        """Update from dense gradients, one per tensor or None, all of `gradient_dtype`; returns the next rate.

        Raises ValueError if all updates of the schedule are done.
        """
        if self._clock[0] >= self._schedule.steps:
            self._schedule.check(self._clock[0])
        addresses = array("q", [0 if gradient is None else gradient.data_ptr() for gradient in gradients])
        arguments = self._arguments
        arguments.addresses = addresses.buffer_info()[0]
        arguments.gradient_type = TYPES[gradient_dtype]
        arguments.scale, arguments.found_inf = address(scale), address(found_inf)
        arguments.threads = torch.get_num_threads()
        return self._set_rate(self._function(ctypes.byref(arguments)))

    def seek(self, updates: int, averaged: int) -> float:
        """Go on as after `updates` updates, `averaged` of them in the average; returns the next rate."""
        rate = self._set_rate(updates)
        self._clock[0], self._clock[1] = updates, averaged
        return rate

    def _set_rate(self, updates: int) -> float:
        rate = self._schedule.rate_after(updates)
        self._rate.value = rate
        return rate
