"""Everything that needs a GPU, into one report: python benchmarks/gpu_check.py

The tests marked `gpu`, what the kernels compile to, and the kernels against torch's foreach, fused and compiled SGD and
NVIDIA's apex where it is built. Without CUDA it says so and ends well.
"""

import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ("kernels", "throughput")


def main() -> int:
    """Write the report; returns 0 if there is no GPU or all went well."""
    if not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device here; nothing was checked or measured")
        return 0
    now = datetime.now(timezone.utc)
    out = ROOT / "reports" / f"gpu-{now:%Y%m%d-%H%M%S}"
    out.mkdir(parents=True)
    sections = {
        "Tests marked gpu": ["-m", "pytest", "-m", "gpu", "-v", "--continue-on-collection-errors"],
        "Kernels as compiled": ["-m", "fastsnap.kernels.report"],
    }
    for name in BENCHMARKS:
        command = ["benchmarks/run.py", "--only", name, "--device", "cuda", "--out", str(out)]
        sections[f"Benchmark: {name}"] = command
    report = out / "gpu-check.md"
    report.write_text(heading(now))
    failed = []
    for title, arguments in sections.items():
        status, output = run(arguments)
        with report.open("a") as file:  # at once: a GPU is often lent for minutes, and what was found stays
            file.write(f"\n## {title}\n\nExit status {status}.\n\n```\n{output.strip()}\n```\n")
        if status:
            failed.append(title)
    print(
        f"gpu-check: {'failed: ' + ', '.join(failed) if failed else 'all passed'}; saved {report.relative_to(ROOT)}"
    )
    return 1 if failed else 0


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit status and output of Python with `arguments`, shown while it runs."""
    environment = os.environ | {"COLUMNS": "160"}
    command = [sys.executable, *arguments]
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def heading(now: datetime) -> str:
    described = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    properties = torch.cuda.get_device_properties(0)
    return (
        f"# GPU check, {now:%Y-%m-%d %H:%M} UTC\n\n"
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}."
        f"{properties.minor}; torch {torch.__version__}, CUDA {torch.version.cuda}; "
        f"commit {described.stdout.strip() or 'unknown'}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
