"""What the Triton kernels compile to, for GPUs that need not be there: python -m fastsnap.kernels.report

Registers, shared memory and spills come from the compiled binary, the width of accesses from its instructions, and
the bytes per element from the list of loads and stores before the compiler assigns them to threads.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .averaging_triton import averaging_kernel, tiles
from .update_triton import BLOCK, DTYPES, WARPS, update_kernel

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
REGISTERS_PER_MULTIPROCESSOR = 65536
THREADS_PER_MULTIPROCESSOR = 2048
HEADINGS = (
    *("kernel", "architecture", "registers (occupancy)", "shared bytes", "spills", "widest load / store"),
    *("bytes moved", "launches"),
)
ELEMENT_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "i64": 8, "i32": 4}


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture.

    registers      per thread
    stack_bytes    per thread, spills included; shared_bytes: per program
    instructions   names of all machine instructions
    accesses       bytes of each load ("load") and store ("store") of a tensor, per element, as written
    threads        per program
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: tuple[str, ...]
    accesses: tuple[tuple[str, int], ...]
    threads: int

    @property
    def spills(self) -> int:
        """Instructions that access local memory."""
        return sum(name.startswith(("LDL", "STL")) for name in self.instructions)

    @property
    def occupancy(self) -> float:
        """Share of the threads of a multiprocessor that the registers leave room for."""
        granted = -(-self.registers // 8) * 8
        programs = REGISTERS_PER_MULTIPROCESSOR // (granted * self.threads)
        return min(1.0, programs * self.threads / THREADS_PER_MULTIPROCESSOR)

    def widths(self, kind: str) -> list[int]:
        """Bits of each global load ("LDG") or store ("STG") instruction of a thread, widest first."""
        names = [name for name in self.instructions if name.startswith(kind)]
        return sorted((_width(name) for name in names), reverse=True)


def _width(instruction: str) -> int:
    for part in instruction.split("."):
        if part in ("128", "64"):
            return int(part)
        if part in ("U16", "S16", "U8", "S8"):
            return int(part[1:])
    return 32


def compile_kernel(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], architecture: int, warps: int
) -> Compiled:
    """Compile `kernel` with `arguments` (name: Triton type, pointers 16-byte aligned) and `constants`."""
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(
        ASTSource(kernel, signature, values, aligned), target=target, options={"num_warps": warps}
    )
    usage = _resources(compiled.asm["cubin"])
    return Compiled(
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=usage["SHARED"],
        instructions=_instructions(compiled.asm["cubin"]),
        accesses=_accesses(compiled.asm["ttir"]),
        threads=32 * warps,
    )


def _run_tool(name: str, cubin: bytes, *options: str) -> str:
    tool = getattr(triton.knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> dict[str, int]:
    found = re.search(r"REG:.*", _run_tool("cuobjdump", cubin, "-res-usage"))
    assert found is not None, "cuobjdump has changed its output"
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", found[0])}


def _instructions(cubin: bytes) -> tuple[str, ...]:
    lines = _run_tool("nvdisasm", cubin, "-c").splitlines()
    found = [re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line) for line in lines]
    return tuple(match[1] for match in found if match)


def _accesses(ttir: str) -> tuple[tuple[str, int], ...]:
    found = re.findall(r"tt\.(load|store) .*tensor<[\dx]+x!tt\.ptr<(\w+)>>", ttir)
    return tuple((kind, ELEMENT_BYTES[element]) for kind, element in found)


def compile_update(
    architecture: int, gradient: torch.dtype = torch.float32, *, weights: str = "fp32", extras: bool = False
) -> Compiled:
    """The update kernel; `extras`: with GradScaler, bf16 copy and running average."""
    arguments = {name: "*i64" for name in ("chunks", "addresses", "clock")}
    arguments |= {"decays": "*fp32", "weights": f"*{weights}", "momentum": "*fp32", "rate": "*fp32"}
    arguments |= {"steps": "i32", "cycles": "i32", "learning_rate": "fp32"}
    arguments |= {"momentum_coefficient": "fp32", "average_decay": "fp32"}
    optional = {"copy": "*bf16", "average": "*fp32", "scale": "*fp32", "found_inf": "*fp32"}
    constants = {"GRADIENT": DTYPES[gradient], "NESTEROV": True, "STEP_SCHEDULE": False, "DECAY": 0.1}
    constants |= {"BLOCK": BLOCK} if extras else {"BLOCK": BLOCK, **dict.fromkeys(optional)}
    return compile_kernel(
        update_kernel, arguments | (optional if extras else {}), constants, architecture, WARPS
    )


def bytes_per_parameter(compiled: Compiled) -> int:
    """Bytes that an update moves per parameter; the gradient is loaded in one of two branches, as a rule the first."""
    gradients = [size for kind, size in compiled.accesses if kind == "load"][1:3]
    assert gradients[0] == gradients[1], "the update kernel no longer loads the gradient in two branches"
    return sum(size for _, size in compiled.accesses) - gradients[1]


def compile_averaging(architecture: int, classes: int, *, members: int = 6) -> Compiled:
    """The averaging kernel for row-major fp32 logits, with labels."""
    constants: dict[str, Any] = tiles(members, classes)
    warps = constants.pop("num_warps")
    arguments = {"logits": "*fp32", "labels": "*i64", "order": "*i64", "weights": "*fp32"}
    arguments |= {"prediction": "*i64", "floats": "*fp32", "integers": "*i32", "invalid": "*i64"}
    arguments |= {name: "i32" for name in ("members", "samples", "plane", "classes")}
    arguments |= {"member_stride": "i32", "sample_stride": "i32", "temperature": "fp32"}
    constants |= {"class_stride": 1, "probabilities": None}
    return compile_kernel(averaging_kernel, arguments, constants, architecture, warps)


def rows() -> list[tuple[str, ...]]:
    """One row per kernel, variant and architecture."""
    found = []
    for architecture in ARCHITECTURES:
        for gradient in (torch.float32, torch.bfloat16):
            name = f"update, {str(gradient).removeprefix('torch.')} gradients"
            compiled = compile_update(architecture, gradient)
            bytes_moved = f"{bytes_per_parameter(compiled)} / parameter"
            found.append(_row(name, architecture, compiled, bytes_moved))
        compiled = compile_update(architecture, extras=True)
        name = "update, GradScaler, copy, average"
        found.append(_row(name, architecture, compiled, f"{bytes_per_parameter(compiled)} / parameter"))
        for classes in (10, 100, 1000, 21841):
            compiled = compile_averaging(architecture, classes)
            found.append(_row(f"averaging, {classes} classes", architecture, compiled, "4 / logit"))
    return found


def _row(name: str, architecture: int, compiled: Compiled, bytes_moved: str) -> tuple[str, ...]:
    widest = f"{compiled.widths('LDG')[0]} / {compiled.widths('STG')[0]} bit"
    occupancy = f"{compiled.registers} ({compiled.occupancy:.0%})"
    shared = str(compiled.shared_bytes)
    return name, f"sm_{architecture}", occupancy, shared, str(compiled.spills), widest, bytes_moved, "1"


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Triton kernels as compiled; an access wider than 32 bits is a vector or a 64-bit scalar"
    )
    for heading in HEADINGS:
        table.add_column(heading)
    for row in rows():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
