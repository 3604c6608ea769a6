"""Write the ensemble of a run as one file for other programs: `python -m fastsnap.export --help`."""

from fastsnap.waiting import spin_shortly

if __name__ == "__main__":
    spin_shortly()

import argparse
import sys
from pathlib import Path

import torch

from fastsnap import __version__
from fastsnap.command_line import add_data, add_members, exit_status
from fastsnap.ensemble.decision import read_decision
from fastsnap.ensemble.exporting import (
    BOUNDS,
    FORMATS,
    PRECISIONS,
    Exported,
    export_ensemble,
    require_exportable,
)
from fastsnap.ensemble.loading import load_ensemble
from fastsnap.limits import THREADS_HELP, choose_threads, format_bytes
from fastsnap.printing import ArgumentParser, make_console, print_line
from fastsnap.run_folder import RunFolder


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastsnap.export",
        description="Write the ensemble of a run as one file, which programs that know nothing of fastsnap can use. "
        "onnx and pt2 (torch.export): uint8 images [N, height, width, channels] of the run's size in; probabilities, "
        "entropy and mutual information out; preprocessing, all members and averaging inside. safetensors: the weights "
        "alone, those of all members stacked. Class names, sizes, snapshots and their hashes are in the metadata.",
        epilog="The file is loaded again, compared with the ensemble, and refused where a probability differs by more "
        f"than {BOUNDS['fp32']:g} (fp16: {BOUNDS['fp16']:g}).",
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="of the file (default: onnx)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of weights and forward passes (default: fp32)",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="file to write (default: ensemble.onnx, .pt2 or .safetensors in RUN)"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    add_members(parser)
    parser.add_argument("--threads", type=int, help=THREADS_HELP)
    add_data(parser)
    parser.add_argument("--version", action="version", version=f"fastsnap {__version__}")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for an error of use, 128 + signal if stopped by one."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _export(options))


def _export(options: argparse.Namespace) -> int:
    folder = RunFolder(options.run)
    config = folder.config()  # no run at all is a worse fault than a file that cannot be written
    target = Path(options.out) if options.out else folder.path / f"ensemble.{options.format}"
    require_exportable(target, options.format, options.precision, options.force)
    torch.set_num_threads(choose_threads(options.threads).count)
    console = make_console()
    with console.status("reading the snapshots", spinner="line") as status:
        ensemble = load_ensemble(
            folder.path,
            snapshots=options.snapshots,
            last=options.last,
            data=options.data,
            device="cpu",
            resident="all",
        )
        status.update("exporting and comparing")
        exported = export_ensemble(
            ensemble,
            target,
            options.format,
            precision=options.precision,
            force=options.force,
            metadata={"run": folder.path.resolve().name, "net": config["net"], "dataset": config["dataset"]},
        )
    for line in _described(exported, len(ensemble.members), options.precision):
        print_line(console, line)
    decision = read_decision(folder) if options.last is None and options.snapshots is None else None
    if decision is not None:
        print_line(
            console,
            f"snapshots, weights and temperature ({decision.temperature:.3g}) as decided on {decision.images:,} "
            "held-out images; --snapshots all takes all alike",
        )
    return 0


def _described(exported: Exported, members: int, precision: str) -> list[str]:
    size, sum_of_members = format_bytes(exported.bytes), format_bytes(exported.member_bytes)
    lines = [
        f"{exported.path}: {members} members, {precision}, {size} (the members' weights in fp32: {sum_of_members})"
    ]
    if exported.difference is None:
        return [*lines, "loaded again: every tensor is what was written"]
    largest = ", ".join(
        f"{name.replace('_', ' ')} {value:.2g}" for name, value in exported.difference.items()
    )
    return [*lines, f"loaded again: largest differences over {exported.images} images: {largest}"]


if __name__ == "__main__":
    sys.exit(main())
