"""Training, snapshots, checkpoints, resuming and evaluation of a network with all that ours have not."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from odd_network import OddNetwork
from rich.console import Console
from torch import Tensor, nn

from fastsnap.data.datasets import Dataset, load_dataset
from fastsnap.data.pipeline import make_pipeline
from fastsnap.ensemble.forwards import fill_member_logits
from fastsnap.kernels.schedule import Schedule
from fastsnap.run_checkpoint import checkpoint_content, read_checkpoint
from fastsnap.run_folder import RunFolder
from fastsnap.training.memory import footprint
from fastsnap.training.progress import ProgressDisplay
from fastsnap.training.step import TrainStep
from fastsnap.training.stopping import TrainingStopped
from fastsnap.training.trainer import Trainer
from fastsnap.training.updates import build_optimizer

CPU = torch.device("cpu")
STEPS_PER_EPOCH, EPOCHS = 3, 2


def dataset() -> Dataset:
    return load_dataset("digits", train_images=130)


def pipeline_of(images, **options):
    data = dataset()
    return make_pipeline(
        images, batch_size=43, mean=data.mean, std=data.std, device=CPU, loader="torch", **options
    )


def make(path: Path, network: nn.Module | None = None) -> Trainer:
    """As assembly.build_trainer does."""
    data = dataset()
    pipeline = pipeline_of(data.train, augmentation=data.augmentation)
    schedule = Schedule("snapshot", EPOCHS * STEPS_PER_EPOCH, 2, 0.1)
    network = (network or OddNetwork()).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer("fused", network, schedule, momentum=0.9, weight_decay=1e-4)
    step = TrainStep(network, optimizer, CPU, precision="fp32", compiled=False, graphed=False)
    return Trainer(network, optimizer, step, pipeline, schedule, len(data.train.labels), RunFolder(path))


def run(trainer: Trainer) -> Trainer:
    trainer.folder.path.mkdir(exist_ok=True)
    with ProgressDisplay(Console(quiet=True), trainer.step, trainer.schedule.steps) as display:
        trainer.run(display)
    return trainer


def everything(network: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, those that a state_dict leaves out as well."""
    tensors = [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return run(make(tmp_path_factory.mktemp("odd") / "run"))


def test_trains_as_torch_does(trained: Trainer) -> None:
    network = OddNetwork().train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    data = dataset()
    pipeline, step = pipeline_of(data.train, augmentation=data.augmentation), 0
    for epoch in range(EPOCHS):
        for images, labels in pipeline.epoch(epoch):
            optimizer.param_groups[0]["lr"] = trained.schedule.rate(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            step += 1
    expected = everything(network)
    for name, tensor in everything(trained.network).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    assert trained.network.updates == step


def test_only_what_is_trained_is_in_the_flat_storage(trained: Trainer) -> None:
    flat, fresh = trained.optimizer.flat, OddNetwork()
    assert {"first.weight", "embedding.weight", "scale", "nothing", "turned"} <= set(flat.names)
    assert not {"second.weight", "head.weight"} & set(flat.names)  # tied: once
    assert not [name for name in flat.names if name.startswith("frozen")]
    for name in ("frozen.weight", "frozen.bias", "frozen_double", "frozen_indices", "unused"):
        assert torch.equal(trained.network.get_parameter(name), fresh.get_parameter(name)), name
    assert trained.network.second.weight is trained.network.first.weight
    assert not torch.equal(trained.network.first.weight, fresh.first.weight)


class StoppingPipeline:
    """The batches of a pipeline; a SIGTERM comes with the batch of one step."""

    def __init__(self, pipeline, stop_step: int) -> None:
        self.pipeline, self.stop_step = pipeline, stop_step
        self.steps_per_epoch, self.batch_size = pipeline.steps_per_epoch, pipeline.batch_size
        self.plan = pipeline.plan

    def epoch(self, epoch: int, first_step: int = 0):
        for step, batch in enumerate(self.pipeline.epoch(epoch, first_step), start=first_step):
            if epoch * self.steps_per_epoch + step == self.stop_step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@pytest.mark.parametrize("stop_step", range(EPOCHS * STEPS_PER_EPOCH - 1))
def test_resumes_to_the_same_bits(trained: Trainer, tmp_path: Path, stop_step: int) -> None:
    stopped = make(tmp_path / "run")
    stopped.pipeline = StoppingPipeline(stopped.pipeline, stop_step)
    with pytest.raises(TrainingStopped):
        run(stopped)
    # What is frozen comes from the checkpoint too: the weights that the run began with may be gone.
    resumed = make(tmp_path / "run", OddNetwork(seed=5))
    assert resumed.resume()
    assert_same_bits(everything(resumed.network), everything(stopped.network))
    assert_same_bits(everything(run(resumed).network), everything(trained.network))
    assert resumed.network.second.weight is resumed.network.first.weight
    assert resumed.network.part.data_ptr() == resumed.network.whole[1:].data_ptr()


def test_snapshots_load_into_a_fresh_network(trained: Trainer) -> None:
    folder = trained.folder
    assert [entry.step for entry in folder.snapshots()] == [3, 6]
    state = safetensors.torch.load_file(folder.path / folder.snapshots()[-1].file)
    own = trained.network.state_dict()
    assert state.keys() == own.keys()
    assert "hidden" not in state
    network = OddNetwork(seed=5)
    network.load_state_dict(state)  # strict
    for name, tensor in own.items():
        stored = tensor.float() if tensor.is_floating_point() else tensor
        assert state[name].dtype == stored.dtype, name
        assert torch.equal(state[name], stored), name
        assert torch.equal(network.state_dict()[name], stored.to(tensor.dtype)), name
    assert network.head.weight is network.embedding.weight


def test_evaluates_as_a_plain_loop_does(trained: Trainer) -> None:
    images = dataset().test
    pipeline = pipeline_of(images)
    logits = torch.full((2, len(images.labels), 10), torch.nan)
    network = OddNetwork(seed=5).to(memory_format=torch.channels_last)
    fill_member_logits(logits, network, trained.folder, trained.folder.snapshots(), pipeline)
    for entry, found in zip(trained.folder.snapshots(), logits, strict=True):
        plain = OddNetwork(seed=7).eval()
        plain.load_state_dict(safetensors.torch.load_file(trained.folder.path / entry.file))
        with torch.inference_mode():
            expected = torch.cat([plain(batch.contiguous()) for batch, _ in pipeline.epoch(0)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_memory_that_it_takes_is_known() -> None:
    with torch.device("meta"):
        network = OddNetwork()
    network.statistics.momentum = (
        0.1  # a mean over all batches asks a tensor for its value, and meta has none
    )
    size = footprint(network, (1, 8, 8))
    numbers = sum(t.numel() for t in [*network.parameters(), *network.buffers()])
    assert size.parameters == 4 * numbers
    assert 64 * 8 in size.outputs  # of the attention, whose output is a tuple


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).t(),
        torch.randn(1).expand(5),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(4, dtype=torch.complex64).conj().imag,
        torch.empty(0, 3),
        torch.tensor(1.5),
        torch.tensor([True, False]),
        torch.tensor([1, 2**63 + 1], dtype=torch.uint64),
        torch.randn(3).to(torch.float8_e5m2),
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    ],
)
def test_a_checkpoint_keeps_tensors_of_every_kind(tensor: Tensor, tmp_path: Path) -> None:
    state = {"step": 0, "steps": 1, "seconds": 0.0, "epoch_seconds": 0.0, "scaler": {}}
    (tmp_path / "file").write_bytes(checkpoint_content({"one": tensor, "same": tensor}, state))
    tensors, _ = read_checkpoint(tmp_path / "file")
    for name in ("one", "same"):
        assert tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(
            tensors[name].view(torch.uint8) if tensor.dtype.itemsize == 1 else tensors[name].resolve_neg(),
            tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor.resolve_conj().resolve_neg(),
        )


def test_a_buffer_that_no_file_can_hold_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    network = OddNetwork()
    network.register_buffer("spectrum", torch.zeros(2, dtype=torch.complex128))
    trainer = make(tmp_path / "run", network)
    trainer.folder.path.mkdir()
    with pytest.raises(ValueError, match=r"buffer\.spectrum is torch\.complex128"):
        trainer.resume()


def test_a_network_of_frozen_parameters_only_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one that needs a gradient"):
        make(tmp_path, OddNetwork().requires_grad_(False))
