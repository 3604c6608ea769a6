"""An ensemble as one file for programs that know nothing of this project: ONNX, torch.export's .pt2, safetensors.

The file is loaded again, as such a program would, and compared with the ensemble before it gets its name.
"""

import copy
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsnap import __version__
from fastsnap.ensemble.members import AllMembers
from fastsnap.ensemble.module import Ensemble
from fastsnap.run_files import RunError, write_atomically

FORMATS = ("onnx", "pt2", "safetensors")
PRECISIONS = ("fp32", "fp16")
OUTPUTS = ("probabilities", "entropy", "mutual_information")
METADATA_FILE = "fastsnap.json"  # of a .pt2
ONNX_MISSING = "format onnx needs onnx, onnxscript and onnxruntime: pip install 'fastsnap[onnx]'"
MOST_ONNX_BYTES = 2**31 - 1  # of one file, by the format
# Largest difference of a probability from the ensemble in fp32 with which a file is still taken.
BOUNDS = {"fp32": 1e-4, "fp16": 0.05}
COMPARED = 40  # images
Runner = Callable[[NDArray[np.uint8]], list[NDArray[np.float32]]]


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    bytes         of it
    member_bytes  of the snapshots in it, as the run folder holds them
    difference    largest, of any probability, entropy or mutual information from the ensemble's in fp32, over `images`
                  images; None for safetensors, whose tensors were compared bit by bit
    """

    path: Path
    bytes: int
    member_bytes: int
    difference: dict[str, float] | None
    images: int


class Deployed(nn.Module):
    """uint8 [N, H, W, C] -> probabilities [N, classes], entropy [N], mutual information [N]; any N."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        combination = self.ensemble.combine(self.ensemble.traceable_logits(images))
        return combination.probabilities, combination.entropy, combination.mutual_information


def export_ensemble(
    ensemble: Ensemble,
    path: str | os.PathLike[str],
    format: str = "onnx",
    *,
    precision: str = "fp32",
    force: bool = False,
    metadata: dict[str, Any] | None = None,
) -> Exported:
    """Write `ensemble`, whose members are all resident, to one file.

    format     "onnx" or "pt2": preprocessing, members and averaging; input `images`, uint8 [N, H, W, C] of the run's
               size and any N, float32 outputs `probabilities` [N, classes], `entropy` and `mutual_information` [N].
               "safetensors": the weights alone, each with a first dimension of members
    precision  of weights and forward passes: "fp32" or "fp16"
    force      replace a file that is there
    metadata   more of what the file says of itself
    Raises ValueError for other arguments, for a file that is there, and for one that computes something else than the
    ensemble; RunError (a ValueError) if it cannot be saved. Nothing is left of a file that was refused.
    """
    target = Path(path)
    require_exportable(target, format, precision, force)
    if not isinstance(ensemble.networks, AllMembers):
        raise ValueError(
            'the ensemble has one network whose weights are swapped: load it with resident="all"'
        )
    facts = facts_of(ensemble, precision) | (metadata or {})
    reference = copy.deepcopy(ensemble).cpu().float()
    reference.precision = "fp32"
    deployed = copy.deepcopy(reference)
    if precision == "fp16":
        deployed.networks.half()
    content, check = _WRITERS[format](deployed, facts)
    found: dict[str, float] = {}

    def compare(written: Path) -> None:
        if check is None:
            _require_same_tensors(written, deployed)
        else:
            found.update(_differences(check(written), reference, precision))

    write_atomically(target, content, compare)
    members = sum(_bytes_of(member) for member in _networks(reference))
    return Exported(target, len(content), members, found or None, COMPARED if found else 0)


def require_exportable(target: Path, format: str, precision: str, force: bool) -> None:
    """Raise ValueError, before any work, for arguments that cannot be meant and for a file that is to be kept."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)} for an export, got {precision!r}")
    if target.is_dir():
        raise ValueError(f"cannot write {target}: it is a folder; name a file")
    if target.exists() and not force:
        raise ValueError(
            f"{target} is there already and is kept: choose another --out, or replace it with --force"
        )
    if format == "onnx":
        require_onnx()


def require_onnx() -> None:
    """Raise ValueError, naming the extra, where what writes and runs ONNX files is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{ONNX_MISSING} ({error})") from error


def facts_of(ensemble: Ensemble, precision: str) -> dict[str, Any]:
    """What a file says of itself."""
    shown = ensemble.preprocessing
    return {
        "classes": list(shown.classes),
        "image_shape": list(shown.image_shape),
        "resize": shown.resize,
        "mean": list(shown.mean),
        "std": list(shown.std),
        "m": len(ensemble.members),
        "snapshots": [
            {"number": entry.number, "step": entry.step, "sha256": entry.sha256} for entry in ensemble.members
        ],
        "weights": list(ensemble.weights),
        "temperature": ensemble.temperature,
        "precision": precision,
        "versions": {"fastsnap": __version__, "torch": torch.__version__},
    }


def _texts(facts: dict[str, Any]) -> dict[str, str]:
    """JSON per entry, texts as they are: what ONNX and safetensors keep."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def _onnx(deployed: Ensemble, facts: dict[str, Any]) -> tuple[bytes, Callable[[Path], Runner]]:
    require_onnx()
    with _quietly(), torch.no_grad():
        program = torch.onnx.export(
            Deployed(deployed),
            (_example(deployed),),
            dynamo=True,
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.producer_name, model.producer_version = "fastsnap", __version__
    for node in model.graph.node:  # the exporter's notes: where on this machine each line of source lies
        del node.metadata_props[:]
    for name, text in _texts(facts).items():
        model.metadata_props.add(key=name, value=text)
    if model.ByteSize() > MOST_ONNX_BYTES:
        raise ValueError(
            f"an ONNX file holds at most 2 GB, and this one would have {model.ByteSize():,} bytes: take fewer members "
            "(--last), --precision fp16, or --format pt2"
        )
    return model.SerializeToString(), _onnx_runner


def _onnx_runner(written: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(list(OUTPUTS), {"images": images})


def _pt2(deployed: Ensemble, facts: dict[str, Any]) -> tuple[bytes, Callable[[Path], Runner]]:
    with _quietly(), torch.no_grad():
        program = torch.export.export(
            Deployed(deployed),
            (_example(deployed),),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
        for node in program.graph.nodes:  # where on this machine each line of source lies
            node.meta.pop("stack_trace", None)
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={METADATA_FILE: json.dumps(facts)})
    return content.getvalue(), _pt2_runner


def _pt2_runner(written: Path) -> Runner:
    with written.open("rb") as file, _quietly():
        module = torch.export.load(file).module()
    return lambda images: [output.numpy() for output in module(torch.from_numpy(images))]


def _safetensors(deployed: Ensemble, facts: dict[str, Any]) -> tuple[bytes, None]:
    return safetensors.torch.save(_stacked(deployed), _texts(facts)), None


def _stacked(deployed: Ensemble) -> dict[str, Tensor]:
    """Each tensor of the networks, with a first dimension of members."""
    states = [network.state_dict() for network in _networks(deployed)]
    return {name: torch.stack([state[name] for state in states]).contiguous() for name in states[0]}


def _require_same_tensors(written: Path, deployed: Ensemble) -> None:
    loaded, made = safetensors.torch.load_file(written), _stacked(deployed)
    if loaded.keys() != made.keys() or not all(torch.equal(loaded[name], made[name]) for name in made):
        raise RunError(f"{written} does not hold what was written: the disk or the memory is faulty")


_WRITERS: dict[str, Callable[..., tuple[bytes, Callable[[Path], Runner] | None]]] = {
    "onnx": _onnx,
    "pt2": _pt2,
    "safetensors": _safetensors,
}


def _differences(run: Runner, reference: Ensemble, precision: str) -> dict[str, float]:
    """Of each output, the largest from the ensemble's. Raises ValueError above the bound, and for NaN."""
    images = drawn_images(reference.preprocessing.image_shape)
    expected = reference.combined(torch.from_numpy(images))
    largest = dict.fromkeys(OUTPUTS, 0.0)
    start = 0
    for count in (1, COMPARED - 1):  # any batch
        outputs = run(images[start : start + count])
        for name, output in zip(OUTPUTS, outputs, strict=True):
            wanted = getattr(expected, name)[start : start + count].numpy()
            if output.shape != wanted.shape:
                raise ValueError(f"the file gives {name} of {list(output.shape)}, not {list(wanted.shape)}")
            difference = float(np.abs(output - wanted).max())
            largest[name] = max(largest[name], math.inf if math.isnan(difference) else difference)
        start += count
    if not largest["probabilities"] <= BOUNDS[precision] or not all(map(math.isfinite, largest.values())):
        raise ValueError(
            f"the file is refused: its probabilities differ by up to {largest['probabilities']:.2g} from the "
            f"ensemble's, which is more than {BOUNDS[precision]:g}"
            + ("; fp16 cannot hold what these networks compute, use fp32" if precision == "fp16" else "")
        )
    return largest


def drawn_images(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """uint8 [COMPARED, H, W, C]: black, white, noise, and colours that change slowly, as in photographs."""
    height, width, channels = shape
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (COMPARED, height, width, channels)).astype(np.uint8)
    rows, columns = np.linspace(0, 3, height)[:, None, None], np.linspace(0, 3, width)[None, :, None]
    phases, tilts = generator.uniform(0, 6.3, (2, COMPARED, 1, 1, channels))
    smooth = np.sin(rows * np.cos(tilts) + columns * np.sin(tilts) + phases) + 0.2 * (noise / 255.0 - 0.5)
    images = (127.5 + 115 * smooth).clip(0, 255).astype(np.uint8)
    images[0], images[1] = 0, 255
    images[2::4] = noise[2::4]
    return images


def _example(deployed: Ensemble) -> Tensor:
    return torch.zeros(2, *deployed.preprocessing.image_shape, dtype=torch.uint8)


def _networks(ensemble: Ensemble) -> list[nn.Module]:
    """Of a resident ensemble."""
    return [ensemble.networks.take(index) for index in range(len(ensemble.members))]


def _bytes_of(network: nn.Module) -> int:
    """Of a snapshot of it: its state_dict."""
    return sum(tensor.nbytes for tensor in network.state_dict().values())


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporters say of themselves; errors are raised as ever."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
