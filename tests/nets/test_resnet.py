"""The networks: sizes from the literature, shortcuts, initialisation, and what they refuse."""

import math

import pytest
import torch

from fastsnap.nets.build import build_network
from fastsnap.nets.names import NetName, parse_name


def parameter_count(name: str, **options) -> int:
    return sum(parameter.numel() for parameter in build_network(name, **options).parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.73)],
)
def test_parameter_counts_are_those_of_he_et_al(name: str, millions: float) -> None:
    assert parameter_count(name, classes=10) / 1e6 == pytest.approx(millions, abs=0.005)


def test_resnet110_has_the_329_tensors_of_the_design() -> None:
    assert len(list(build_network("resnet110", classes=100).parameters())) == 329


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (2, 9), (3, 32)])
def test_any_channels_and_size_give_logits_and_gradients(shortcut: str, channels: int, size: int) -> None:
    network = build_network("resnet8x2", classes=7, in_channels=channels, shortcut=shortcut)
    logits = network(torch.randn(3, channels, size, size))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_shortcut_a_has_no_parameters_b_projects_where_the_shape_changes_c_everywhere() -> None:
    plain = parameter_count("resnet20", classes=10, shortcut="A")
    projections = [16 * 32 + 2 * 32, 32 * 64 + 2 * 64]
    assert parameter_count("resnet20", classes=10, shortcut="B") == plain + sum(projections)
    identities = [3 * (16 * 16 + 32), 2 * (32 * 32 + 64), 2 * (64 * 64 + 128)]
    assert parameter_count("resnet20", classes=10, shortcut="C") == plain + sum(projections) + sum(identities)


def test_padded_identity_strides_and_appends_zero_channels() -> None:
    block = build_network("resnet8", classes=10).stages[1][0]
    images = torch.randn(2, 16, 8, 8)
    shortcut = block.shortcut(images)
    assert torch.equal(shortcut[:, :16], images[:, :, ::2, ::2])
    assert shortcut.shape == (2, 32, 4, 4)
    assert not shortcut[:, 16:].any()


def test_initialisation_is_that_of_the_authors_code() -> None:
    network = build_network("resnet20x4", classes=10)
    weight = network.stages[2][1].conv1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * weight.shape[0])), rel=0.02)
    assert not network.linear.bias.any()
    assert all((module.weight == 1).all() for module in network.modules() if hasattr(module, "running_mean"))


def test_weights_follow_from_the_seed_alone() -> None:
    torch.rand(5)
    first = build_network("resnet8", classes=10, seed=3).state_dict()
    torch.rand(7)
    same, other = (build_network("resnet8", classes=10, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])


@pytest.mark.parametrize(
    ("name", "parsed"), [("resnet8", (1, 1)), ("resnet50", (8, 1)), ("resnet32x4", (5, 4))]
)
def test_a_name_gives_blocks_per_stage_and_width(name: str, parsed: tuple[int, int]) -> None:
    assert parse_name(name) == NetName("resnet", *parsed)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet18", "resnet14, resnet20"),
        ("resnet19", "resnet14, resnet20"),
        ("resnet2", "resnet8"),
        ("resnet20x0", "resnet20"),
        ("rensnet110", "resnet110"),
    ],
)
def test_unknown_nets_are_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=nearest):
        build_network(name, classes=10)


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 8 pixels"):
        build_network("resnet8", classes=10)(torch.zeros(2, 3, 8, 7))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"shortcut": "D"}, "shortcut"), ({"in_channels": 4}, "in_channels"), ({"classes": 0}, "classes")],
)
def test_bad_values_are_named(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build_network("resnet8", **{"classes": 10} | options)


def test_other_defaults_of_torch_change_nothing() -> None:
    expected = build_network("resnet8", classes=3, shortcut="C").state_dict()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = build_network("resnet8", classes=3, shortcut="C").state_dict()
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
