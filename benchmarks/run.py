"""Measure fastsnap against the standard schedule and against what users would pick instead, and write the report.

Results are added to OUT/results.jsonl as they are measured, and OUT/report.md, OUT/report.html and OUT/*.png are made
from all that it holds, so benchmarks can be run one at a time.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.measure import Settings

# Imported when they run: this file is imported again by every process that a benchmark starts.
BENCHMARKS = {
    "throughput": "training throughput, end to end, against loops by hand and libraries",
    "schedules": "snapshot schedule against standard schedule: speed, saving, first step, memory",
    "pipelines": "data pipelines alone",
    "kernels": "update and averaging kernels against PyTorch's, bytes and bandwidth",
    "layers": "batch normalisation and convolution on a CPU against PyTorch's",
    "evaluation": "evaluating an ensemble of 5",
    "deciding": "deciding on held-out images, against the forward passes that it needs",
    "serving": "predicting with the ensemble and with its exported files, their sizes, cold starts",
    "scaling": "cost against batch size, M, depth and net size",
    "ranks": "one run on two ranks against one process; what they send each other",
    "accuracy": "error of snapshot ensemble, standard schedule, NoCycle and SingleCycle at equal epochs",
}
IN_A_PRECISION = ("throughput", "evaluation")  # those that --precision is for


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for an error of use, 1 if a benchmark failed, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    if options.list:
        for name, description in BENCHMARKS.items():
            print(f"{name:12s} {description}")
        return 0
    try:
        return _run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was measured is kept, and accuracy runs go on where they were", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from fastsnap.device import DEVICES, PRECISIONS

    parser = argparse.ArgumentParser(prog="python benchmarks/run.py", description=__doc__)
    parser.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    parser.add_argument(
        "--only", metavar="NAME,...", action="append", help="run these benchmarks (default: all)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few minutes in all instead of 25 to 40; the figures say little",
    )
    parser.add_argument("--full", action="store_true", help="accuracy at the paper's setting: days on a CPU")
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        help="folder that holds CIFAR-100; without it, speed is measured on noise of its shape, accuracy on digits",
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="folder of pictures, with train/ and val/, that the pipelines are measured on; may come several times "
        "(default: made-up photographs)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder of results and report (default: reports, or reports/quick)",
    )
    parser.add_argument("--seeds", metavar="N", type=int, help="seeds 0 to N-1 for the accuracy")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of throughput and evaluation; auto: of each contender's choice; another: asked of all that offer one "
        "(default: auto and, where that is not fp32, fp32 as well for ResNet-20)",
    )
    parser.add_argument(
        "--update-docs", action="store_true", help="write the short results into docs/results.md as well"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    import report
    from fastsnap.training.stopping import TrainingStopped
    from harness import results

    names = _chosen(options.only)
    settings = _settings(options, names)
    if options.update_docs:
        report.check_docs()
    failed = False
    for name in names:
        start = time.perf_counter()
        print(f"{name}: {BENCHMARKS[name]}", flush=True)
        try:
            for result in importlib.import_module(name).run(settings):
                print(f"  {report.one_line(results.append(result, settings))}", flush=True)
        except TrainingStopped as stopped:  # how a run of the accuracy answers Ctrl-C
            raise KeyboardInterrupt from stopped
        except ValueError as error:  # the other benchmarks still have something to say
            print(f"error: {name}: {error}", file=sys.stderr, flush=True)
            failed = True
        print(f"  took {time.perf_counter() - start:.0f} s", flush=True)
    for path in report.write(settings.out, docs=options.update_docs):
        print(f"saved {path}")
    return int(failed)


def _settings(options: argparse.Namespace, names: Sequence[str]) -> "Settings":
    """What the benchmarks are told. Raises ValueError for what would only fail after minutes."""
    from fastsnap.data.layouts import find_layout
    from fastsnap.device import choose_device
    from harness.measure import Settings
    from harness.task import load_images

    if options.seeds is not None and options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {options.seeds}")
    if options.full and options.data is None:
        raise ValueError("--full needs CIFAR-100: name the folder that holds it with --data")
    if options.quick and options.update_docs:
        raise ValueError("--update-docs needs figures that mean something: leave --quick out")
    device = choose_device(options.device).type
    _check_precision(options.precision, device, names)
    load_images(options.data)
    for folder in options.images:
        find_layout(folder)
    out = options.out or Path("reports/quick" if options.quick else "reports")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to --out {out}: {error.strerror}") from error
    return Settings(
        data=options.data,
        out=out,
        device=device,
        quick=options.quick,
        full=options.full,
        seeds=options.seeds,
        precision=options.precision,
        images=tuple(options.images),
    )


def _check_precision(precision: str | None, device: str, names: Sequence[str]) -> None:
    """Raise ValueError for a --precision that would be ignored or that the device hardly computes in."""
    if precision is not None and not set(names) & set(IN_A_PRECISION):
        raise ValueError(
            f"--precision is for {' and '.join(IN_A_PRECISION)}, got --only {','.join(names)}: leave it out"
        )
    if precision == "fp16" and device == "cpu":
        raise ValueError("--precision fp16 is for a GPU, a CPU hardly computes in it: use bf16 or fp32")


def _chosen(only: list[str] | None) -> list[str]:
    """The benchmarks to run. Raises ValueError for unknown ones."""
    if only is None:
        return list(BENCHMARKS)
    names = [name for text in only for name in text.split(",")]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise ValueError(f"unknown benchmark {', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}")
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main())
