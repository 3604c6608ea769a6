"""All families of networks: sizes from the literature, kernels against plain PyTorch, names, and what they refuse."""

import pickle
import re

import pytest
import torch
from torch import nn

from fastsnap.nets import foreign
from fastsnap.nets.build import build_network, check_options, is_random
from fastsnap.nets.cost import cost_of
from fastsnap.nets.names import note, parse_name
from fastsnap.nets.resnet import KERNEL_OPERATIONS, PLAIN_OPERATIONS

SMALL = ("preresnet8", "wrn-10-1", "densenet-7-16")
FOREIGN = ("torchvision:resnet18", "torchvision:shufflenet_v2_x0_5", "torchvision:mobilenet_v3_small")


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("preresnet110", 10, 1_727_962),  # He et al. 2016b: 1.7 M
        ("wrn-16-8", 10, 10_961_370),  # Zagoruyko and Komodakis: 11.0 M
        ("wrn-40-4", 10, 8_949_210),  # 8.9 M
        ("wrn-28-10", 10, 36_479_194),  # 36.5 M
        ("densenet-40-12", 10, 1_019_722),  # Huang et al.: 1.0 M
        ("densenet-100-12", 10, 6_979_642),  # 7.0 M
        ("densenet-100-24", 10, 27_249_082),  # 27.2 M
        ("torchvision:resnet18", 1000, 11_689_512),  # torchvision's own table
        ("torchvision:resnet50", 1000, 25_557_032),
        ("torchvision:convnext_tiny", 1000, 28_589_128),
        ("torchvision:regnet_y_400mf", 1000, 4_344_144),
    ],
)
def test_parameter_counts_are_those_that_were_published(name: str, classes: int, count: int) -> None:
    size = (224, 224) if ":" in name else (32, 32)
    assert cost_of(name, classes=classes, image_size=size).parameters == count


@pytest.mark.parametrize(
    ("name", "gflop"),
    [("torchvision:resnet18", 3.628), ("torchvision:resnet50", 8.178), ("wrn-28-10", 10.487)],
)
def test_arithmetic_is_twice_the_published_multiplications(name: str, gflop: float) -> None:
    size = (224, 224) if ":" in name else (32, 32)
    cost = cost_of(name, classes=1000 if ":" in name else 10, image_size=size)
    assert cost.gflop == pytest.approx(gflop, rel=1e-3)
    assert cost.training_gflop == pytest.approx(3 * gflop, rel=1e-3)


def run(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits in training, and the gradients of their squares' sum."""
    logits = network(images)
    logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return logits.detach(), {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("name", SMALL + FOREIGN)
def test_kernels_change_no_network_beyond_rounding(name: str) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images = images.to(memory_format=torch.channels_last)
    results = []
    for operations in (PLAIN_OPERATIONS, KERNEL_OPERATIONS):
        network = build_network(name, classes=5, seed=3, operations=operations, image_size=(32, 32))
        torch.manual_seed(0)  # of dropout
        results.append(run(network.to(memory_format=torch.channels_last).train(), images))
    (plain, plain_gradients), (fast, fast_gradients) = results
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())
    assert fast_gradients.keys() == plain_gradients.keys()
    for key, gradient in plain_gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(fast_gradients[key], gradient, rtol=0, atol=5e-3 * scale + 1e-6, msg=key)


def test_a_foreign_network_really_takes_the_kernels_and_stays_what_it_is() -> None:
    plain = build_network("torchvision:resnet18", classes=5, seed=3)
    fast = build_network("torchvision:resnet18", classes=5, seed=3, operations=KERNEL_OPERATIONS)
    kinds = {type(module) for module in fast.modules()}
    assert {foreign.FastConvolution, foreign.FusedBasicBlock} <= kinds
    assert not {foreign.FastConvolution, foreign.FusedBasicBlock} & {
        type(module) for module in plain.modules()
    }
    assert plain.state_dict().keys() == fast.state_dict().keys()
    again = pickle.loads(pickle.dumps(fast)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(images), fast.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", SMALL + FOREIGN)
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    first = build_network(name, classes=5, seed=1).state_dict()
    torch.rand(7)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        same, other = (build_network(name, classes=5, seed=seed).state_dict() for seed in (1, 2))
    finally:
        torch.set_default_dtype(before)
    assert all(value.dtype in (torch.float32, torch.int64) for value in same.values())
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_network_takes_grey_images(name: str) -> None:
    network = build_network(name, classes=3, in_channels=1, image_size=(32, 32)).eval()
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 3)


def test_dropout_drops_in_training_only() -> None:
    images = torch.randn(2, 3, 16, 16)
    for name in ("wrn-10-1", "densenet-7-16"):
        network = build_network(name, classes=5, dropout=0.5).train()
        assert not torch.equal(network(images), network(images))
        network.eval()
        assert torch.equal(network(images), network(images))
        assert is_random(name, 0.5)
        assert not is_random(name, 0.0)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("preresnet21", "preresnet20, preresnet26"),
        ("wrn-29-10", "wrn-28-10, wrn-34-10"),
        ("densenet-41-12", "densenet-40-12, densenet-43-12"),
        ("resnet18", "torchvision:resnet18"),
        ("vit_b_16", "torchvision:vit_b_16"),
        ("torchvision:resnet51", "torchvision:resnet50"),
        ("rensnet110", "resnet110"),
        ("", "resnet8"),
        ("nonsense", "resnet8"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown net {name!r}: .*nearest: .*{re.escape(nearest)}"):
        parse_name(name)


def test_the_cifar_net_of_a_famous_name_says_so_on_large_images() -> None:
    assert "ImageNet's is torchvision:resnet50" in (note("resnet50", (224, 224)) or "")
    assert "images of about 32 pixels" in (note("resnet20", (224, 224)) or "")
    assert note("resnet50", (32, 32)) is None
    assert note("torchvision:resnet50", (224, 224)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet20", "A", 1, 0.3), "dropout has no effect on net resnet20"),
        (("wrn-28-10", "B", 1, 0.0), "shortcut has no effect on net wrn-28-10"),
        (("torchvision:resnet18", "A", 2, 0.0), "stem_stride has no effect on net torchvision:resnet18"),
    ],
)
def test_options_without_effect_are_errors(arguments: tuple[str, str, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(*arguments)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("torchvision:inception_v3", 32, "cannot take images of 32x32 pixels"),
        ("torchvision:vit_h_14", 32, "cannot be made for 32x32 pixels"),
    ],
)
def test_images_that_a_foreign_network_cannot_take_are_an_error(name: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(name, classes=3, image_size=(size, size), device="meta")


def test_timm_is_named_where_it_is_missing() -> None:
    if foreign.has_timm():
        network = build_network("timm:convnext_atto", classes=3, image_size=(64, 64))
        assert network.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    else:
        with pytest.raises(ValueError, match=r"pip install 'fastsnap\[timm\]'"):
            parse_name("timm:convnext_atto")
