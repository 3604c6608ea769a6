"""The project's own loop on several ranks, with the gradients exchanged by DistributedDataParallel."""

import torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fastsnap.data.pipeline import make_pipeline
from fastsnap.device import AUTOCAST_DTYPES
from fastsnap.kernels.schedule import Schedule
from fastsnap.nets.build import build_network
from fastsnap.nets.resnet import KERNEL_OPERATIONS
from fastsnap.training.allocator import keep_freed_memory
from fastsnap.training.ranks import Ranks
from fastsnap.training.updates import build_optimizer
from harness.paced import Pace
from harness.project import configure
from harness.task import CLASSES, Task, load_images


def ddp_loop(pace: Pace, ranks: Ranks, task: Task) -> None:
    """Network, kernels, batches, precision and update are the project's; gradients are views of DDP's buckets."""
    keep_freed_memory()
    config, dataset = configure(task), load_images(task.data)
    pipeline = make_pipeline(
        dataset.train,
        batch_size=task.batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=torch.device("cpu"),
        augmentation=dataset.augmentation,
        loader="torch",
        rank=ranks.rank,
        ranks=ranks.count,
    )
    network = build_network(task.net, classes=CLASSES, operations=KERNEL_OPERATIONS)
    network = network.to(memory_format=torch.channels_last).train()
    schedule = Schedule("snapshot", task.epochs * pipeline.steps_per_epoch, task.cycles, task.learning_rate)
    optimizer = build_optimizer(
        "fused", network, schedule, momentum=task.momentum, weight_decay=task.weight_decay
    )
    parallel = DistributedDataParallel(network, gradient_as_bucket_view=True)
    dtype = AUTOCAST_DTYPES.get(config.precision)
    for epoch in range(task.epochs):
        for images, labels in pace.batches(pipeline.epoch(epoch)):
            with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
                logits = parallel(images)
            functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
