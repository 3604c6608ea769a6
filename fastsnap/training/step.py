"""One training step - forward, loss, backward, update - at the precision asked for; on CUDA as one graph."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsnap.device import AUTOCAST_DTYPES
from fastsnap.training.distillation import Distillation
from fastsnap.training.exchange import Exchange
from fastsnap.training.weight_average import WeightAverage

COMPILE = ("auto", "on", "off")
EAGER_STEPS = 3  # before a CUDA graph is captured: cuDNN, the compiler and the allocator settle in them


def choose_compile(name: str, device: torch.device) -> str:
    """Whether "auto", "on" or "off" compiles the step, "on" or "off": "auto" does on CUDA."""
    return ("on" if device.type == "cuda" else "off") if name == "auto" else name


class TrainStep:
    """Runs training steps and keeps the sums that are logged on the device, so that a step never waits for it.

    network      in channels-last memory on `device`, in training mode
    optimizer    its step() must compute its own learning rate and, for fp16, read GradScaler's scale on the device
    precision    "bf16", "fp16" or "fp32"
    compiled     whether the forward and backward passes go through torch.compile
    graphed      whether to capture the step in a CUDA graph; batches of another size than the first still run eagerly
    exchange     of a rank among several: each trains on its part of a batch. Not graphed
    average      of the weights, brought up to date after each step
    distillation  whose loss takes the place of the labels' cross-entropy; each step is then given what the teacher
                  says. Not graphed

    totals       float64 [2] on the device, of this rank: sum of losses, number of errors
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        precision: str,
        compiled: bool,
        graphed: bool,
        exchange: Exchange | None = None,
        average: WeightAverage | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        self.forward: Callable[[Tensor], Tensor] = (
            # Not dynamic: after a last, partial batch full ones would go through another graph, with other roundings.
            torch.compile(network, dynamic=False) if compiled else network
        )
        self.optimizer = optimizer
        self.device = device
        self.autocast_dtype = AUTOCAST_DTYPES.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self.graphed, self.exchange, self.average = graphed, exchange, average
        self.distillation = distillation
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_steps = 0

    def __call__(
        self, images: Tensor, labels: Tensor, whole: int | None = None, teacher: Tensor | None = None
    ) -> None:
        """Train on images [B, C, H, W], float32, channels-last, and labels [B], int64.

        whole  images of the batch, of which these are the rank's part, which may be empty; default: these are all
        teacher  its log-probabilities for these, float32 [B, classes], of a step with a distillation
        """
        if self.exchange is not None:
            self._step_of_a_rank(images, labels, whole or len(labels), self.exchange, teacher)
        elif not self.graphed:
            self._step(images, labels, teacher)
        elif self._graph is not None and images.shape == self._images.shape:
            self._replay(images, labels)
        elif self._graph is None and self._eager_steps >= EAGER_STEPS:
            self._capture(images, labels)
            self._replay(images, labels)
        else:
            self._step_on_side_stream(images, labels)

    def _step(self, images: Tensor, labels: Tensor, teacher: Tensor | None = None) -> None:
        logits = self._logits(images)
        loss = self._loss(logits, labels, teacher, "mean")
        self.scaler.scale(loss).backward()
        self._update()
        self._count(loss, logits, labels, len(labels))

    def _step_of_a_rank(
        self, images: Tensor, labels: Tensor, whole: int, exchange: Exchange, teacher: Tensor | None
    ) -> None:
        """The gradients of all ranks together are those of the mean loss over the `whole` batch."""
        if len(labels):
            logits = self._logits(images)
            loss = self._loss(logits, labels, teacher, "sum") / whole
            self.scaler.scale(loss).backward()
            self._count(loss, logits, labels, whole)
        else:
            self.scaler.scale(torch.zeros((), device=self.device))  # which makes the scale, the first time
        exchange(len(labels) / whole)
        self._update()

    def _logits(self, images: Tensor) -> Tensor:
        with torch.autocast(
            self.device.type,
            self.autocast_dtype,
            enabled=self.autocast_dtype is not None,
            cache_enabled=False,
        ):
            logits = self.forward(images)
        return logits.float()

    def _loss(self, logits: Tensor, labels: Tensor, teacher: Tensor | None, reduction: str) -> Tensor:
        if self.distillation is not None:
            if teacher is None:
                raise ValueError("a step with a distillation needs what the teacher says: teacher=...")
            return self.distillation.loss(logits, labels, teacher, reduction)
        return functional.cross_entropy(logits, labels, reduction=reduction)

    def _update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()

    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor, images: int) -> None:
        """`loss` is a sum over labels, divided by `images`."""
        self.totals[0] += loss.detach() * images
        self.totals[1] += (logits.detach().argmax(dim=1) != labels).sum()

    # -- CUDA graph. A replay trains on whatever lies in the static batch; the learning rate comes from the optimiser's
    #    step counter on the device, so that nothing in the graph depends on the step.

    def _step_on_side_stream(self, images: Tensor, labels: Tensor) -> None:
        # Autograd remembers the stream that its leaves were first used on, which must not be the default one.
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(images, labels)
        torch.cuda.current_stream().wait_stream(stream)
        self._eager_steps += 1

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self._images = images.clone(memory_format=torch.channels_last)
        self._labels = labels.clone()
        graph = torch.cuda.CUDAGraph()
        # thread_local: the data pipeline's threads go on using CUDA while this thread captures.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(self._images, self._labels)
        self._graph = graph

    def _replay(self, images: Tensor, labels: Tensor) -> None:
        assert self._graph is not None
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
