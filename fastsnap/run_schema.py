"""What the JSON files of a run folder hold, with types and ranges: they are checked when they are read.

Keys that are not known here are left alone, since a newer version may have written them; but a key that resembles a
known one which the file lacks is a slip of the pen, and an error.
"""

import difflib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import msgspec

from fastsnap.device import PRECISIONS
from fastsnap.kernels import schedule
from fastsnap.run_files import RunError, require_inside

MOST_BYTES = {  # far more than these files ever have
    "config.json": 2**24,
    "manifest.json": 2**26,
    "metrics.jsonl": 2**28,
    "ensemble.json": 2**26,
}
LARGEST = 3.4e38  # of fp32
TYPO = 0.8  # how alike two names are to be taken for one, as difflib counts

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
CountOrNone = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Number = Annotated[float, msgspec.Meta(ge=0, le=LARGEST)]
Colour = Annotated[int, msgspec.Meta(ge=0, le=255)]
Rate = Annotated[float, msgspec.Meta(gt=0, le=LARGEST)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096, pattern=r"\A[^\x00]*\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


@dataclass(frozen=True)
class ImageCounts:
    """How many images a run was trained on, and how many it held back."""

    train: Count
    test: Count
    validation: CountOrNone = 0


@dataclass(frozen=True)
class Config:
    """config.json, as far as it is read. What has a default here, runs of old versions may lack."""

    dataset: Text
    data: Text
    net: Text
    shortcut: Text
    cycles: Count
    epochs: Count
    batch_size: Count
    learning_rate: Rate
    schedule: Literal[schedule.KINDS]  # type: ignore[valid-type]
    seed: Seed
    validation: CountOrNone
    train_images: Count | None
    precision: Literal[PRECISIONS]  # type: ignore[valid-type]
    images: ImageCounts
    out: Text | None = None
    momentum: Number | None = None
    weight_decay: Number | None = None
    device: Text | None = None
    loader: Text | None = None
    threads: Count | None = None
    compile: Text | None = None
    update: Text | None = None
    augment: Text | None = None
    image_size: Count | None = None  # as asked for
    memory: Text | None = None
    cache: Text | None = None
    skip_damaged: bool = False
    timeout: Rate | None = None
    sync_batch_norm: bool = False
    ranks: Count = 1
    storage: Literal["arrays", "files"] | None = None  # of a folder of pictures
    stem_stride: Count | None = None
    dropout: Number | None = None
    ema: Number | None = None
    teacher: Text | None = None  # run folder of the ensemble that was learned from
    teacher_sha256: Sha256 | None = None
    teacher_temperature: Rate | None = None
    teacher_weight: Number | None = None
    initial: Text | None = None
    initial_sha256: Sha256 | None = None
    class_names: list[Text] | None = None
    mean: list[Number] | None = None  # per channel, 0 to 255
    std: list[Rate] | None = None
    # Height, width, channels.
    image_shape: Annotated[list[Count], msgspec.Meta(min_length=3, max_length=3)] | None = None
    resize: Count | None = None  # pixels of the shorter side before the centre crop; None: used as they are
    background: list[Colour] | None = None  # of a folder of pictures: what transparent pixels show
    versions: dict[str, str | None] | None = None
    fingerprints: dict[str, Sha256] | None = None


@dataclass(frozen=True)
class OwnLoopConfig:
    """config.json of a run whose network, data and loop are the user's own: see training.recorder."""

    loop: Literal["own"]
    net: Text  # class of the network
    parameters: CountOrNone  # numbers that it has
    dataset: Text  # as the user calls it
    optimizer: Text | None  # its class; None: the loop keeps checkpoints of its own
    cycles: Count
    steps: Count
    steps_per_epoch: Count
    learning_rate: Rate
    schedule: Literal[schedule.KINDS]  # type: ignore[valid-type]
    precision: Literal[PRECISIONS]  # type: ignore[valid-type]
    classes: Count
    class_names: list[Text] | None = None
    mean: list[Number] | None = None
    std: list[Rate] | None = None
    image_shape: Annotated[list[Count], msgspec.Meta(min_length=3, max_length=3)] | None = None
    versions: dict[str, str | None] | None = None


@dataclass(frozen=True)
class SnapshotEntry:
    """A line of the manifest. `number`, `cycle` and `epoch` count from 1; `step` is the number of updates done."""

    number: Count
    file: Text
    sha256: Sha256
    step: Count
    cycle: Count
    epoch: Count
    learning_rate: Number
    train_loss: Number


@dataclass(frozen=True)
class Manifest:
    """manifest.json.

    average  of a run that keeps one: the running average of the weights when the snapshot of this number was saved
    """

    snapshots: list[SnapshotEntry]
    average: SnapshotEntry | None = None


@dataclass(frozen=True)
class MetricsRecord:
    """A line of metrics.jsonl: an epoch."""

    step: Count
    train_loss: Number
    epoch: Count
    cycle: Count | None = None
    lr: Number | None = None
    train_error: Number | None = None  # errors in percent, losses in nats
    # Of the held-out images, in an epoch in which a cycle ended: of the fresh snapshot, and of all so far together.
    validation_error: Number | None = None
    validation_loss: Number | None = None
    ensemble_error: Number | None = None
    ensemble_loss: Number | None = None
    images_per_second: Number | None = None
    seconds: Number | None = None


@dataclass(frozen=True)
class Decision:
    """What to use of a run, decided on its held-out images: part of ensemble.json, for predictions and exports.

    method       how it was found: see ensemble.choosing.Candidate
    snapshots    numbers of those that count, in the order of the run
    weights      of these, adding up to 1
    temperature  of the averaged probabilities
    images       held-out images that it was decided on
    among        number and SHA-256 of every snapshot that could have been taken
    threshold    of a cascade of those that count, the newest first: the confidence below which another one is asked
    """

    method: Text
    snapshots: Annotated[list[Count], msgspec.Meta(min_length=1)]
    weights: Annotated[list[Rate], msgspec.Meta(min_length=1)]
    temperature: Rate
    images: Count
    among: list[tuple[Count, Sha256]]
    threshold: Number | None = None


@dataclass(frozen=True)
class Evaluation:
    """ensemble.json, as far as it is read again."""

    decision: Decision | None = None


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint holds besides its tensors; the scaler is torch.amp.GradScaler's."""

    step: CountOrNone
    steps: Count
    seconds: Number
    epoch_seconds: Number
    scaler: dict[str, float]
    ranks: Count = 1
    optimizer: dict[str, Any] | None = None  # of a loop of the user's own: see training.state_tree


Schema = TypeVar("Schema")


def parse(content: bytes | str, place: str) -> Any:
    """The JSON value of `content`; NaN and infinity are not JSON. Raises RunError that begins with `place`."""
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        # Of a RecursionError the text says nothing to a reader.
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise RunError(f"{place} is damaged: it is not JSON ({reason}); put back a copy of it") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def check(value: Any, kind: type[Schema], place: str) -> Schema:
    """`value`, as `parse` gives it, as a `kind`. Raises RunError that begins with `place` and names field and value."""
    try:
        checked = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        _refuse(value, str(error), kind, place)
    except (
        UnicodeEncodeError
    ) as error:  # half a surrogate pair, which JSON can write; msgspec cannot speak of it
        raise RunError(f"{place} is damaged: it holds {error.object!a}; put back a copy of it") from error
    _check_names(value, kind, place)
    return checked


def _refuse(value: Any, message: str, kind: type, place: str) -> NoReturn:
    """message  of msgspec: "Expected `int`, got `str` - at `$.snapshots[0].step`" """
    reason, _, path = message.partition(" - at `$")
    path = path.rstrip("`").removeprefix(".")
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path.replace("[...]", "")):
        value = value[int(index)] if key.isdecimal() or index else value[key]
    if isinstance(value, dict) and path == "":
        _check_names(value, kind, place)
    found = "" if isinstance(value, dict | list) else f", found {_shortened(value)}"
    reason = reason.replace("`", "")
    raise RunError(f"{place} is damaged: {f'{path}: ' if path else ''}{reason}{found}; put back a copy of it")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_names(value: dict[str, Any], kind: type, place: str) -> None:
    """Raise RunError for a key that is not known but resembles a known one that is absent."""
    known = [item.name for item in fields(kind)] if is_dataclass(kind) else []
    absent = [name for name in known if name not in value]
    for key in value.keys() - set(known):
        meant = difflib.get_close_matches(key, absent, n=1, cutoff=TYPO)
        if meant:
            raise RunError(
                f"{place} is damaged: it has {_shortened(key)} and lacks {meant[0]!r}: correct the name"
            )


def check_order(numbers: list[int], name: str, place: str) -> None:
    """Raise RunError unless `numbers` ascend and none comes twice."""
    for earlier, later in itertools.pairwise(numbers):
        if later <= earlier:
            raise RunError(
                f"{place} is damaged: {name} must ascend, found {later} after {earlier}; put back a copy of it"
            )


def check_config(value: Any, place: str) -> None:
    """Raise RunError unless `value` can be config.json, with a plan that can be trained."""
    check(value, OwnLoopConfig if isinstance(value, dict) and is_own_loop(value) else Config, place)
    if value["cycles"] > planned_steps(value):
        raise RunError(
            f"{place} is damaged: cycles: {value['cycles']} are more than the {planned_steps(value)} steps of the run; "
            "put back a copy of it"
        )


def is_own_loop(config: dict[str, Any]) -> bool:
    """Whether config.json is an OwnLoopConfig: of a run whose network cannot be built from it."""
    return "loop" in config


def planned_steps(config: dict[str, Any]) -> int:
    """Updates of the finished run that config.json describes."""
    if is_own_loop(config):
        return config["steps"]
    return config["epochs"] * -(-config["images"]["train"] // config["batch_size"])


def check_manifest(value: Any, folder: Path, place: str) -> Manifest:
    """The manifest: numbers and steps ascend, and each file is its own and lies within `folder`."""
    manifest = check(value, Manifest, place)
    entries = manifest.snapshots
    check_order([entry.number for entry in entries], "number", place)
    check_order([entry.step for entry in entries], "step", place)
    files: set[Path] = set()
    average = {} if manifest.average is None else {"average": manifest.average}
    named = {f"snapshots[{index}]": entry for index, entry in enumerate(entries)} | average
    for name, entry in named.items():
        try:
            require_inside(folder, entry.file)
            file = (folder / entry.file).resolve()
            if file in files:
                raise ValueError("is another snapshot's")
        except (ValueError, OSError) as error:
            raise RunError(
                f"{place} is damaged: {name}.file: {_shortened(entry.file)} {error}; put back a copy of it"
            ) from error
        files.add(file)
    return manifest


def check_metrics(content: bytes, place: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, whose steps ascend; a last one that a crash cut short is left out."""
    lines = content.split(b"\n")
    try:
        json.loads(lines[-1])
    except (ValueError, RecursionError):
        lines.pop()  # also the nothing behind the last line's end
    records = []
    for number, line in enumerate(lines, start=1):
        records.append(parse(line, f"{place}, line {number},"))
        check(records[-1], MetricsRecord, f"{place}, line {number},")
    check_order([record["step"] for record in records], "step", place)
    return records


def check_plan(
    config: dict[str, Any], entries: Sequence[SnapshotEntry], records: Sequence[dict[str, Any]], run: str
) -> None:
    """Raise RunError if manifest or metrics go beyond what config.json plans: they are of different runs."""
    steps = planned_steps(config)
    last = max([entry.step for entry in entries] + [record["step"] for record in records], default=0)
    number = max((entry.number for entry in entries), default=0)
    if last > steps or number > config["cycles"]:
        raise RunError(
            f"{run} is damaged: manifest.json and metrics.jsonl go to step {last}, snapshot {number}, but config.json "
            f"plans {steps} steps, {config['cycles']} snapshots; put back copies of them"
        )
