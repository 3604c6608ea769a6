"""Where to compute and in which precision: what this device, or this processor, can really do.

oneDNN accepts bf16 on every processor with AVX-512, but without instructions that multiply it, it converts: on an Ice
Lake Xeon ResNet-20 then trains at 200 images/s instead of 390 in fp32. So the instructions decide, and whose they are:
AVX512-BF16 multiplies twice as much per cycle as fp32 does on AMD's processors (Zen 4 on), as much on Intel's, whose
way is AMX; with all the conversions around, fp32 is a third faster there (docs/benchmarks.md).
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsnap.limits import Room, free_memory

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION_HELP = "auto: bf16 where the device multiplies it faster than fp32, else fp32"
# Instructions that multiply bf16 faster than fp32, as torch.cpu.get_capabilities calls them, and as their makers do.
FAST_BF16 = {"amx_bf16": "AMX-BF16", "bf16": "Arm BF16", "sve_bf16": "SVE BF16"}


@dataclass(frozen=True)
class Precision:
    """A precision, "bf16", "fp16" or "fp32", and why it was taken, for the summary of a run."""

    name: str
    reason: str


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda". Raises ValueError for "cuda" where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    return torch.device(name)


def take_gpu(device: torch.device, local_rank: int, local_count: int) -> None:
    """On CUDA, give each of the `local_count` processes of this host a GPU of its own; elsewhere nothing.

    Raises ValueError where there are fewer GPUs.
    """
    if device.type != "cuda":
        return
    found = torch.cuda.device_count()
    if found < local_count:
        raise ValueError(
            f"{local_count} ranks on this host need a GPU each, but torch finds {found}: use torchrun "
            f"--nproc-per-node {found} (make: NPROC={found}), or --device cpu"
        )
    torch.cuda.set_device(local_rank)


def free_device_memory(device: torch.device) -> Room | None:
    """Memory that this process can still take where `device` computes; None where nothing says it."""
    if device.type != "cuda":
        return free_memory()
    return Room(torch.cuda.mem_get_info(device)[0], "free on the GPU")


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision for "auto", "bf16", "fp16" or "fp32"; "auto" is bf16 where `device` multiplies it, else fp32."""
    if name != "auto":
        return Precision(name, "as asked for")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "this GPU multiplies it")
        return Precision("fp32", "this GPU does not multiply bf16")
    return processor_precision(processor_capabilities(), torch.ops.mkldnn._is_mkldnn_bf16_supported())


def processor_precision(capabilities: Mapping[str, Any], onednn_takes_bf16: bool) -> Precision:
    """What "auto" is on a CPU.

    capabilities       of the processor, with the names of torch.cpu.get_capabilities
    onednn_takes_bf16  whether PyTorch's convolutions run in bf16 on it at all
    """
    found = [text for name, text in FAST_BF16.items() if capabilities.get(name)]
    if capabilities.get("avx512_bf16") and "AMD" in capabilities.get("cpu_name", ""):
        found.append("AVX512-BF16")
    if found and onednn_takes_bf16:
        return Precision("bf16", f"this processor has {' and '.join(found)}")
    if found:
        return Precision("fp32", f"this processor has {found[0]}, but this PyTorch does not use it")
    if capabilities.get("avx512_bf16"):
        return Precision("fp32", "this processor multiplies bf16 no faster, having AVX512-BF16 without AMX")
    return Precision("fp32", "this processor has no instructions for bf16")


def processor_capabilities() -> Mapping[str, Any]:
    """Of the processor at hand. PyTorch before 2.10 tells less, and only of x86."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "cpu_name": processor_name(),
    }


def processor_name() -> str:
    """As the system calls it: "AMD EPYC 9R14", "Intel(R) Xeon(R) Platinum 8488C"."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"
