"""An evaluation as one page, report.html: nothing is fetched from anywhere, so that it can be sent and kept."""

import base64
import datetime
import io
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from fastsnap import __version__
from fastsnap.data.decoding import centred, decode
from fastsnap.data.sources import FileSet, Source
from fastsnap.ensemble.analysis import Analysis
from fastsnap.ensemble.choosing import averaged_log_probabilities
from fastsnap.ensemble.evaluate import is_last
from fastsnap.ensemble.lines import Lines, gains_lines, last_m_lines, members_lines, worth_lines
from fastsnap.ensemble.results import Report
from fastsnap.ensemble.sentences import decision_texts, further_texts, summary

TEMPLATE = Path(__file__).with_name("page.html")
MOST_IMAGES = 12  # of those that are mended, and of those that are broken
THUMBNAIL = 160  # pixels, of larger images
# Of config.json, in the order of the page.
FACTS = (
    *(
        "dataset",
        "net",
        "epochs",
        "cycles",
        "schedule",
        "learning_rate",
        "batch_size",
        "momentum",
        "weight_decay",
    ),
    *(
        "augment",
        "validation",
        "train_images",
        "seed",
        "precision",
        "ema",
        "teacher",
        "initial",
        "ranks",
        "versions",
    ),
)


@dataclass(frozen=True)
class Shown:
    """An image with its true class, and what the ensemble and the last member alone say, with their probabilities."""

    source: str
    true: str
    together: str
    alone: str


@dataclass(frozen=True)
class Gallery:
    """ensemble, last: "right" or "wrong", which they are for these images."""

    title: str
    text: str
    ensemble: str
    last: str
    images: list[Shown]


def page(report: Report, config: Mapping[str, Any], figures: Mapping[str, Figure], run: Path) -> str:
    """HTML of the report of the run in the folder `run`, whose config.json is `config`."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    tables = [members_lines(report), last_m_lines(report)]
    if report.worth is not None and len(report.snapshots) > 1:
        tables = [worth_lines(report, report.worth), gains_lines(report.worth), *tables]
    lead, *others = [*decision_texts(report), summary(report)]
    place = str(run.resolve())
    return template.render(
        report=report,
        version=__version__,
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        lead=lead,
        texts=[*others, *further_texts(report)],
        tables=tables,
        figures={name: _svg(figure, name) for name, figure in figures.items()},
        confused=_confused(report.analysis),
        classes=_classes(report.analysis),
        galleries=_galleries(report),
        use_python=_use_python(place),
        use_shell=_use_shell(place),
        facts=_facts(config),
    )


def _svg(figure: Figure, name: str) -> Markup:
    """Its text as text, in the page's colour, on the page's background."""
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    text = content.getvalue().decode()
    text = text[text.index("<svg") :].replace("stroke: #000000", "stroke: currentColor")
    # Names that figures have in common would lead into another figure of the page.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Markup(text)


def _use_python(run: str) -> str:
    return (
        "import fastsnap\n"
        f"ensemble = fastsnap.load_ensemble({run!r})\n"
        'print(ensemble.predict(["picture.jpg"]).names)'
    )


def _use_shell(run: str) -> str:
    place = shlex.quote(run)
    return (
        f"python -m fastsnap.predict {place} picture.jpg\n"
        f"python -m fastsnap.export {place} --out ensemble.onnx\n"
        f"python -m fastsnap.ensemble_eval {place}"
    )


def _facts(config: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    for name in FACTS:
        value = config.get(name)
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items() if item)
        if value not in (None, "", 0.0) or name == "seed":
            facts[name.replace("_", " ")] = f"{value}"
    return facts


def _classes(analysis: Analysis | None) -> Lines:
    rows = (
        []
        if analysis is None
        else [
            (item.name, f"{item.images:,}", "-" if item.error is None else f"{item.error:.2f}")
            for item in sorted(analysis.classes, key=lambda item: -(item.error or 0))
        ]
    )
    return Lines("Each class, the worst first", ("class", "images", "error %"), rows)


def _confused(analysis: Analysis | None) -> Lines:
    rows = (
        []
        if analysis is None
        else [(pair.true, pair.predicted, f"{pair.images:,}") for pair in analysis.confused]
    )
    return Lines(
        "Classes that are taken for another most often", ("class", "called", "images"), rows, texts=2
    )


def _galleries(report: Report) -> list[Gallery]:
    outputs, analysis = report.outputs, report.analysis
    if outputs is None or analysis is None or len(report.snapshots) == 1:
        return []
    weights, temperature, ensemble_name = [1.0] * len(report.snapshots), 1.0, "all with equal weights"
    if report.choice and not is_last(report.choice):
        weights, temperature = list(report.choice.taken.weights), report.choice.temperature
        ensemble_name = "as decided"
    together_NC = (averaged_log_probabilities(outputs.logits, weights) / temperature).softmax(1)
    names = outputs.class_names

    def said(probabilities: Any) -> str:
        value, index = probabilities.max(0)
        return f"{names[int(index)]} {float(value):.2f}"

    def shown(index: int) -> Shown:
        alone_C = outputs.logits[-1, index].softmax(0)
        true = names[int(outputs.labels[index])]
        return Shown(
            _data_url(pixels_of(outputs.images, index)), true, said(together_NC[index]), said(alone_C)
        )

    galleries = []
    for found, verb, ensemble, last in (
        (analysis.mended, "mends", "right", "wrong"),
        (analysis.broken, "breaks", "wrong", "right"),
    ):
        text = (
            f"The last snapshot alone is {last}, the ensemble ({ensemble_name}) {ensemble}: {len(found):,} images, of "
            f"which these are the {min(MOST_IMAGES, len(found))} that the ensemble is most sure of."
        )
        listed = [shown(index) for index in found[:MOST_IMAGES]]
        if found:
            galleries.append(Gallery(f"Images that the ensemble {verb}", text, ensemble, last, listed))
    return galleries


def pixels_of(images: Source, index: int) -> NDArray[np.uint8]:
    """One of the images as a network sees it, uint8 [H, W, C]."""
    if isinstance(images, FileSet):
        pixels = decode(images.root / images.names[index], images.channels, images.background)
        return centred(pixels, images.resize, images.size)
    height, width, _ = images.shape
    pixels = images.images[index]
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _data_url(pixels: NDArray[np.uint8]) -> str:
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    if max(picture.size) > THUMBNAIL:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
