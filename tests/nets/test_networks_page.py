"""docs/networks.md says what the networks cost: every row is computed again."""

import re
from pathlib import Path

import pytest

from fastsnap.nets.cost import cost_of

PAGE = Path(__file__).parents[2] / "docs" / "networks.md"
ROW = re.compile(
    r"^\| `(\S+)` \| (\d+) \| (\d+) \| ([\d,]+) \| (.*?) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE
)
ROWS = ROW.findall(PAGE.read_text())


def test_the_page_has_its_rows() -> None:
    names = {row[0] for row in ROWS}
    assert {"resnet110", "resnet32x4", "densenet-40-12", "densenet-100-24", "torchvision:resnet50"} <= names


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_is_what_the_network_costs(row: tuple[str, ...]) -> None:
    name, size, classes, parameters, published, gflop, training = row
    cost = cost_of(name, image_size=(int(size), int(size)), classes=int(classes))
    assert f"{cost.parameters:,}" == parameters
    assert (f"{cost.gflop:.3g}", f"{cost.training_gflop:.3g}") == (gflop, training)
    if published != "not published":
        millions = float(published.split()[0])
        assert cost.parameters / 1e6 == pytest.approx(millions, rel=0.04, abs=0.06)
