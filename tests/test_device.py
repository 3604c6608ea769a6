"""Which precision a device gets, for made-up processors of each kind."""

import pytest
import torch

from fastsnap.device import (
    Precision,
    choose_device,
    choose_precision,
    processor_capabilities,
    processor_name,
    processor_precision,
    take_gpu,
)

X86 = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bw": True, "cpu_name": "Intel Xeon"}
ZEN_4 = X86 | {"cpu_name": "AMD EPYC 9R14", "avx512_bf16": True, "amx_bf16": False}
ARM = {"architecture": "aarch64", "neon": True}


@pytest.mark.parametrize(
    ("capabilities", "onednn", "expected"),
    [
        (X86 | {"avx512_bf16": False, "amx_bf16": False}, True, "fp32"),  # Skylake, Cascade Lake, Ice Lake
        (X86 | {"avx512_bf16": True}, True, "fp32"),  # Cooper Lake, or a hypervisor that hides AMX: no faster
        (ZEN_4, True, "bf16"),
        (ZEN_4, False, "fp32"),
        (X86 | {"avx512_bf16": True, "amx_bf16": True}, True, "bf16"),  # Sapphire Rapids
        (X86 | {"amx_bf16": True}, True, "bf16"),
        ({"architecture": "x86_64", "avx2": True}, False, "fp32"),  # Haswell, Zen 2
        ({"architecture": "x86_64"}, False, "fp32"),
        (ARM, True, "fp32"),  # Graviton 2
        (ARM | {"bf16": True}, True, "bf16"),  # Graviton 3
        (ARM | {"bf16": True}, False, "fp32"),  # a PyTorch that does not use them
        ({}, True, "fp32"),
    ],
)
def test_auto_is_bf16_only_where_instructions_multiply_it(capabilities, onednn, expected):
    assert processor_precision(capabilities, onednn).name == expected


def test_the_reason_names_the_instructions():
    amx = processor_precision(X86 | {"avx512_bf16": True, "amx_bf16": True}, True)
    assert amx.reason == "this processor has AMX-BF16"
    assert processor_precision(ZEN_4, True).reason == "this processor has AVX512-BF16"
    assert "without AMX" in processor_precision(X86 | {"avx512_bf16": True}, True).reason
    assert processor_precision(X86, True).reason == "this processor has no instructions for bf16"
    assert "does not use it" in processor_precision(ARM | {"bf16": True}, False).reason


def test_the_processor_at_hand_is_known():
    capabilities = processor_capabilities()
    assert {"avx512_bf16", "cpu_name"} <= capabilities.keys() or "aarch64" in str(capabilities)
    assert processor_name()
    assert choose_precision("auto", torch.device("cpu")).name in ("bf16", "fp32")


def test_what_is_asked_for_is_taken():
    for name in ("bf16", "fp16", "fp32"):
        assert choose_precision(name, torch.device("cpu")) == Precision(name, "as asked for")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_an_error():
    with pytest.raises(ValueError, match="--device cpu"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"


def test_every_rank_of_a_host_takes_a_gpu_of_its_own(monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for rank in range(2):
        take_gpu(torch.device("cuda"), rank, 2)
    assert taken == [0, 1]
    with pytest.raises(
        ValueError, match=r"3 ranks on this host need a GPU each, but torch finds 2: .*-per-node 2"
    ):
        take_gpu(torch.device("cuda"), 0, 3)
    take_gpu(torch.device("cpu"), 0, 3)
    assert taken == [0, 1]
