"""One function saves any network as a plain fp32 state_dict, whatever its memory layout and types."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from fastsnap import save_snapshot


class Tied(nn.Module):
    """An embedding whose weights are also those of the output, and a buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.output = nn.Linear(4, 5)
        self.output.weight = self.embedding.weight
        self.register_buffer("counts", torch.arange(3))
        self.register_buffer("mask", torch.tensor([True, False]))


def saved(network: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    save_snapshot(network, folder / "network.safetensors")
    return safetensors.torch.load_file(folder / "network.safetensors")


def assert_same_values(state: dict[str, torch.Tensor], network: nn.Module) -> None:
    expected = network.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_a_channels_last_network_is_saved(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    assert not network[0].weight.is_contiguous()
    state = saved(network, tmp_path)
    assert_same_values(state, network)
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).load_state_dict(state)


def test_tied_weights_are_saved_under_each_name_and_load_into_the_tied_network(tmp_path: Path) -> None:
    network, other = Tied(), Tied()
    state = saved(network, tmp_path)
    assert_same_values(state, network)
    assert (state["counts"].dtype, state["mask"].dtype) == (torch.int64, torch.bool)
    other.load_state_dict(state)
    assert other.output.weight is other.embedding.weight
    assert torch.equal(other.output.weight, network.output.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_every_floating_point_type_are_saved_as_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    network = nn.Linear(3, 2).to(dtype)
    state = saved(network, tmp_path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert_same_values(state, network)


def test_views_of_one_memory_and_transposed_weights_are_saved(tmp_path: Path) -> None:
    memory = torch.arange(12.0)
    views = {
        "whole": memory,
        "part": memory[2:6],
        "turned": memory.view(3, 4).t(),
        "spread": memory[:1].expand(3),
    }
    save_snapshot(views, tmp_path / "views.safetensors")
    state = safetensors.torch.load_file(tmp_path / "views.safetensors")
    assert all(torch.equal(state[name], view) for name, view in views.items())


def test_wrapped_networks_have_the_names_of_the_plain_one(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for wrapped in (
        torch.compile(plain),
        nn.DataParallel(plain),
        nn.Sequential(torch.compile(plain[0]), plain[1]),
    ):
        assert_same_values(saved(wrapped, tmp_path), plain)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"head._extra_state": {"a": 1}}, "head._extra_state of the state_dict is a dict"),
        ({"w": torch.full((2,), 1e300, dtype=torch.float64)}, "w has float64 values beyond"),
        ({"w": torch.empty(2, device="meta")}, "w is a meta tensor"),
        ({"w": torch.eye(2).to_sparse()}, "w is a sparse_coo tensor"),
    ],
)
def test_what_cannot_be_saved_is_named_and_replaces_nothing(state: dict, named: str, tmp_path: Path) -> None:
    file = tmp_path / "network.safetensors"
    file.write_bytes(b"earlier")
    with pytest.raises(ValueError, match=named):
        save_snapshot(state, file)
    assert file.read_bytes() == b"earlier"
