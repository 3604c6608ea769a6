"""What is done with a SnapshotRecorder's run: evaluated with networks of other libraries, and used as an ensemble."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from own_loop import CLASSES, SCHEDULE, STEPS_PER_EPOCH, batch, make_network
from torch import Tensor

import fastsnap
from fastsnap import SnapshotRecorder
from fastsnap.run_folder import RunError


def idle_run(path: Path, network: torch.nn.Module, **facts: Any) -> SnapshotRecorder:
    """A finished run whose updates changed nothing."""
    recorder = SnapshotRecorder(
        path, network, SCHEDULE, classes=CLASSES, steps_per_epoch=STEPS_PER_EPOCH, **facts
    )
    recorder.start()
    for _ in range(SCHEDULE.steps):
        recorder.update(1.0)
    return recorder


class Wrapped(torch.nn.Module):
    """Gives its logits as other libraries do."""

    def __init__(self, network: torch.nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network, self.wrap = network, wrap

    def forward(self, images: Tensor) -> Any:
        return self.wrap(self.network(images))


@pytest.mark.parametrize(
    "wrap",
    [lambda logits: SimpleNamespace(logits=logits, loss=None), lambda logits: (logits, "hidden states")],
)
def test_outputs_of_other_libraries_are_understood(wrap: Callable[[Tensor], Any], tmp_path: Path) -> None:
    """And the files go where `out` says, with names of the split."""
    wrapped = Wrapped(make_network(), wrap)
    idle_run(tmp_path / "run", wrapped)
    report = fastsnap.evaluate(
        *(tmp_path / "run", wrapped, [batch(0), batch(1)]),
        out=tmp_path / "out",
        split="validation",
        device="cpu",
        precision="fp32",
    )
    wrapped.eval()
    images, labels = batch(0)
    more, others = batch(1)
    expected = wrapped.network(torch.cat([images, more])).argmax(1) != torch.cat([labels, others])
    assert report.metrics.alone[0].error == pytest.approx(100 * expected.float().mean().item())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "ensemble-validation.json",
        "report-validation.html",
        "error-against-m-validation.png",
        "members-validation.png",
        "training.png",
    }
    assert not (tmp_path / "run" / "ensemble.json").exists()


def test_held_out_batches_decide_and_predictions_take_it(tmp_path: Path, capsys: Any) -> None:
    network = make_network()
    idle_run(tmp_path / "run", network, class_names=list("abcde"), mean=[100.0] * 3, std=[50.0] * 3)
    common: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
    undecided = fastsnap.evaluate(tmp_path / "run", network, [batch(0)], **common)
    assert undecided.choice is None
    assert "weights are equal: no held-out images were given" in capsys.readouterr().out
    held_out = [batch(index) for index in range(2, 8)]
    report = fastsnap.evaluate(tmp_path / "run", network, [batch(0)], validation=held_out, **common)
    assert report.choice is not None
    assert report.choice.images == sum(len(labels) for _, labels in held_out)
    assert "as decided on" in capsys.readouterr().out
    decided = json.loads((tmp_path / "run" / "ensemble.json").read_text())["decision"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["image_shape"] = [8, 8, 3]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    ensemble = fastsnap.load_ensemble(tmp_path / "run", network=network, device="cpu")
    assert [entry.number for entry in ensemble.members] == decided["snapshots"]
    with pytest.raises(ValueError, match="leave it out with split='validation'"):
        fastsnap.evaluate(tmp_path / "run", network, [batch(0)], validation=held_out, split="validation")


def test_a_precision_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    idle_run(tmp_path / "run", make_network())
    with pytest.raises(ValueError, match="precision must be one of"):
        fastsnap.evaluate(tmp_path / "run", make_network(), [batch(0)], precision="fp8")


def test_what_a_snapshot_names_is_the_plain_network(tmp_path: Path) -> None:
    """From within torch.compile, whose names have a prefix."""
    network = make_network()
    recorder = idle_run(tmp_path / "run", torch.compile(network))
    assert recorder.folder.load_snapshot(recorder.folder.snapshots()[0]).keys() == network.state_dict().keys()


def test_such_a_run_is_an_ensemble_with_its_own_network(tmp_path: Path) -> None:
    network = make_network()
    facts: dict[str, Any] = {
        "class_names": list("abcde"),
        "mean": [100.0, 110.0, 120.0],
        "std": [50.0, 60.0, 70.0],
        "image_shape": (8, 8, 3),
    }
    idle_run(tmp_path / "run", network, **facts)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ensemble = fastsnap.load_ensemble(tmp_path / "run", network=network, device="cpu")
    images = torch.randint(
        0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pixels = (images.float() - torch.tensor(facts["mean"])) / torch.tensor(facts["std"])
    assert network.training  # the ensemble has copies
    expected = network.eval()(pixels.permute(0, 3, 1, 2)).softmax(1)
    torch.testing.assert_close(ensemble(images), expected, rtol=0, atol=1e-6)
    assert ensemble.classes == tuple("abcde")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(RunError, match=r"give a network of this class, network="):
        fastsnap.load_ensemble(tmp_path / "run")


def test_an_ensemble_of_a_run_that_does_not_describe_its_pictures_says_what_lacks(tmp_path: Path) -> None:
    idle_run(tmp_path / "run", make_network())
    with pytest.raises(RunError, match=r"does not say its class_names, mean, std, image_shape"):
        fastsnap.load_ensemble(tmp_path / "run", network=make_network())
    three = fastsnap.Preprocessing(tuple("abc"), (8, 8, 3), (1.0,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match=r"preprocessing has 3 classes, but the run 5"):
        fastsnap.load_ensemble(tmp_path / "run", network=make_network(), preprocessing=three)
