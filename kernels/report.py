"""What the Triton kernels compile to, for GPUs that need not be there: python -m fastsnap.kernels.report

Registers, shared memory and spills come from the compiled binary, the width of accesses from its instructions, and
the bytes moved from the list of loads and stores before the compiler assigns them to threads.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .averaging_triton import averaging_kernel, tiles
from .update_triton import BLOCK, DTYPES, WARPS, update_kernel

if TYPE_CHECKING:
    from rich.table import Table

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
REGISTERS_PER_MULTIPROCESSOR = 65536
THREADS_PER_MULTIPROCESSOR = 2048
HEADINGS = (
    *("kernel", "GPU", "registers\n(occupancy)", "shared\nbytes", "spills", "load,\nstore\nbits"),
    *("bytes\nmoved", "launches"),
)
CAPTION = (
    "Load, store: the widest of numbers of 32 bits or less. Bytes: of the update per parameter; of the averaging "
    "per logit + per member and sample (rows of more than 1024 classes are read again, from the cache)."
)
LOGIT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ELEMENT_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "i64": 8, "i32": 4, "f64": 8}


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture.

    registers      per thread
    stack_bytes    per thread, spills included; shared_bytes: per program
    barriers       that the kernel asks for, besides those of reductions
    instructions   names of all machine instructions
    accesses       "load" or "store", dimensions and bytes per element of each access to a tensor, as written
    vectors        "ld" or "st" and bits of each access of a thread to numbers of 32 bits
    threads        per program
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    barriers: int
    instructions: tuple[str, ...]
    accesses: tuple[tuple[str, int, int], ...]
    vectors: tuple[tuple[str, int], ...]
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
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], architecture: int, **options: int
) -> Compiled:
    """Compile `kernel` with `arguments` (name: Triton type, pointers 16-byte aligned) and `constants`."""
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", architecture, 32)
    source = ASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=target, options=options)
    usage = _resources(compiled.asm["cubin"])
    ttir = compiled.asm["ttir"]
    return Compiled(
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=usage["SHARED"],
        barriers=len(re.findall(r"\b(?:ttg|gpu)\.barrier", ttir)),
        instructions=_instructions(compiled.asm["cubin"]),
        accesses=_accesses(ttir),
        vectors=_vectors(compiled.asm["ptx"]),
        threads=32 * options["num_warps"],
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


def _accesses(ttir: str) -> tuple[tuple[str, int, int], ...]:
    found = re.findall(r"tt\.(load|store) .*tensor<([\dx]+)x!tt\.ptr<(\w+)>>", ttir)
    return tuple((kind, sizes.count("x") + 1, ELEMENT_BYTES[element]) for kind, sizes, element in found)


def _vectors(ptx: str) -> tuple[tuple[str, int], ...]:
    found = re.findall(r"\b(ld|st)\.global(?:\.v(\d))?\.b32\b", ptx)
    return tuple((kind, 32 * int(elements or 1)) for kind, elements in found)


def compile_update(
    architecture: int, gradient: torch.dtype = torch.float32, *, weights: str = "fp32", extras: bool = False
) -> Compiled:
    """The update kernel; `extras`: with GradScaler, bf16 copy and running average."""
    arguments = {name: "*i64" for name in ("chunks", "addresses", "clock")}
    arguments |= {
        "factors": "*fp32",
        "shown": "*fp32",
        "weights": f"*{weights}",
        "momentum": "*fp32",
        "rate": "*fp32",
    }
    arguments |= {"groups": "i32", "steps": "i32", "cycles": "i32", "learning_rate": "fp32"}
    arguments |= {"momentum_coefficient": "fp32", "average_decay": "fp32"}
    optional = {"copy": "*bf16", "average": "*fp32", "scale": "*fp32", "found_inf": "*fp32"}
    constants = {"GRADIENT": DTYPES[gradient], "NESTEROV": True, "STEP_SCHEDULE": False, "DECAY": 0.1}
    constants |= {"BLOCK": BLOCK} if extras else {"BLOCK": BLOCK, **dict.fromkeys(optional)}
    return compile_kernel(
        update_kernel, arguments | (optional if extras else {}), constants, architecture, num_warps=WARPS
    )


def bytes_per_parameter(compiled: Compiled) -> int:
    """Bytes that an update moves per parameter; the gradient is loaded in one of two branches, as a rule the first."""
    gradients = [size for kind, _, size in compiled.accesses if kind == "load"][1:3]
    assert gradients[0] == gradients[1], "the update kernel no longer loads the gradient in two branches"
    return sum(size for _, _, size in compiled.accesses) - gradients[1]


def compile_averaging(
    architecture: int,
    classes: int,
    *,
    members: int = 6,
    dtype: str = "fp32",
    labels: bool = True,
    probabilities: bool = False,
) -> Compiled:
    """The averaging kernel for contiguous logits of `dtype`; averaged probabilities also if it needs them anyway."""
    logits = torch.empty(members, 1024, classes, dtype=LOGIT_TYPES[dtype], device="meta")
    constants: dict[str, Any] = tiles(logits) | {"class_stride": 1}
    options = {name: constants.pop(name) for name in ("num_warps", "maxnreg")}
    arguments = {"logits": f"*{dtype}", "order": "*i64"}
    arguments |= {"rescalings": "*fp32", "weights": "*fp32", "totals": "*fp32"}
    arguments |= {"prediction": "*i64", "floats": "*fp32", "integers": "*i32", "invalid": "*i64"}
    arguments |= dict.fromkeys(("members", "samples", "plane", "member_stride", "sample_stride"), "i32")
    arguments["temperature"] = "fp32"
    needed = {"labels": labels, "probabilities": probabilities or classes > constants["CLASSES"]}
    for name, pointer in (("labels", "*i64"), ("probabilities", "*fp32")):
        if needed[name]:
            arguments[name] = pointer
        else:
            constants[name] = None
    return compile_kernel(averaging_kernel, arguments, constants, architecture, **options)


def bytes_per_logit(compiled: Compiled) -> int:
    """Bytes that an averaging loads and stores per logit, from memory or from the cache."""
    return sum(size for _, dimensions, size in compiled.accesses if dimensions == 2)


def bytes_of_statistics(compiled: Compiled) -> int:
    """Bytes that an averaging stores per member and sample."""
    return sum(size for kind, dimensions, size in compiled.accesses if (kind, dimensions) == ("store", 1))


def variants(architecture: int) -> dict[str, Compiled]:
    """What the report shows, compiled."""
    return {
        "update": compile_update(architecture),
        "update, bf16 gradient": compile_update(architecture, torch.bfloat16),
        "update, all options": compile_update(architecture, extras=True),
        "averaging, C=2 M=64": compile_averaging(architecture, 2, members=64),
        **{
            f"averaging, C={classes}": compile_averaging(architecture, classes)
            for classes in (100, 1000, 21841)
        },
    }


def table(compiled: dict[int, dict[str, Compiled]]) -> "Table":
    """One row per kernel, variant and architecture; 80 columns wide."""
    from rich.table import Table

    title = "Triton kernels as compiled"
    shown = Table(
        title=title, caption=CAPTION, caption_justify="left", padding=(0, 1, 0, 0), pad_edge=False, box=None
    )
    for heading in HEADINGS:
        shown.add_column(heading)
    for architecture, found in compiled.items():
        for name, variant in found.items():
            shown.add_row(*_row(name, architecture, variant))
    return shown


def _row(name: str, architecture: int, compiled: Compiled) -> tuple[str, ...]:
    load, store = (max(bits for kind, bits in compiled.vectors if kind == wanted) for wanted in ("ld", "st"))
    if name.startswith("update"):
        moved = str(bytes_per_parameter(compiled))
    else:
        moved = f"{bytes_per_logit(compiled)} + {bytes_of_statistics(compiled)}"
    occupancy, shared = f"{compiled.registers} ({compiled.occupancy:.0%})", str(compiled.shared_bytes)
    return (
        name,
        f"sm_{architecture}",
        occupancy,
        shared,
        str(compiled.spills),
        f"{load}, {store}",
        moved,
        "1",
    )


def main() -> None:
    from rich.console import Console

    Console().print(table({architecture: variants(architecture) for architecture in ARCHITECTURES}))


if __name__ == "__main__":
    main()
