"""Weights to begin with: every kind of file, what fits, what is made anew, and what is refused."""

from functools import partial

import pytest
import safetensors.torch
import torch
from small_run import small_run, snapshot_weights

from fastsnap.nets.build import build_network
from fastsnap.nets.initial import (
    InitialWeightsError,
    begin_with,
    classifier_names,
    read_initial,
    require_same_initial,
)
from fastsnap.run_files import RunError


def make(classes=10, seed=9, name="resnet8", device="cpu"):
    return build_network(name, classes=classes, in_channels=1, seed=seed, device=device)


CLASSIFIER = {"linear.weight", "linear.bias"}


@pytest.fixture
def weights():
    return snapshot_weights(3)


def saved(weights, path, kind):
    if kind == "safetensors":
        safetensors.torch.save_file(weights, path := path / "a.safetensors")
    elif kind == "state_dict":
        torch.save(weights, path := path / "a.pt")
    elif kind == "checkpoint":
        torch.save({"epoch": 3, "state_dict": weights}, path := path / "a.pth.tar")
    elif kind == "parallel":
        torch.save(
            {"model": {f"module.{name}": value for name, value in weights.items()}}, path := path / "a.pth"
        )
    else:
        torch.save({f"_orig_mod.{name}": value for name, value in weights.items()}, path := path / "a.bin")
    return path


@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "checkpoint", "parallel", "compiled"])
def test_every_kind_of_file_gives_its_weights(kind, weights, tmp_path):
    network = make()
    text = begin_with(network, read_initial(saved(weights, tmp_path, kind)), CLASSIFIER)
    assert f"{len(weights)} of {len(weights)} tensors" in text
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_a_run_gives_its_last_snapshot(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=2)
    found = read_initial(folder.path)
    assert found.sha256 == folder.snapshots()[-1].sha256
    network = make()
    begin_with(network, found, CLASSIFIER)
    assert all(torch.equal(value, snapshot_weights(2)[name]) for name, value in network.state_dict().items())
    snapshot = read_initial(folder.path / folder.snapshots()[0].file)
    assert snapshot.sha256 == folder.snapshots()[0].sha256


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet8", CLASSIFIER),
        ("torchvision:resnet18", {"fc.weight", "fc.bias"}),
        ("torchvision:densenet121", {"classifier.weight", "classifier.bias"}),
        ("torchvision:squeezenet1_0", {"classifier.1.weight", "classifier.1.bias"}),
    ],
)
def test_the_classifier_is_what_depends_on_the_classes(name, expected):
    assert classifier_names(partial(make, name=name, device="meta"), 10) == expected


def test_a_classifier_of_another_size_is_made_anew_and_said_so(weights, tmp_path):
    path = saved(weights, tmp_path, "safetensors")
    network, fresh = make(classes=4), make(classes=4).state_dict()
    text = begin_with(network, read_initial(path), CLASSIFIER)
    assert "the classifier anew: 10 classes there, 4 here" in text
    for name, value in network.state_dict().items():
        assert torch.equal(value, fresh[name] if name in CLASSIFIER else weights[name])


def test_weights_of_16_bits_are_converted_and_said_so(weights, tmp_path):
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    network = make()
    text = begin_with(network, read_initial(saved(half, tmp_path, "safetensors")), CLASSIFIER)
    assert "converted from float16" in text
    assert torch.equal(network.conv1.weight, half["conv1.weight"].float())


def test_counters_that_older_files_lack_are_no_fault(weights, tmp_path):
    old = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    begin_with(make(), read_initial(saved(old, tmp_path, "state_dict")), CLASSIFIER)


def test_all_that_does_not_fit_is_in_one_error(weights, tmp_path):
    wrong = dict(weights)
    del wrong["conv1.weight"]
    wrong["extra"] = torch.zeros(1)
    wrong["bn1.weight"] = torch.zeros(5)
    wrong["bn1.bias"] = torch.full_like(weights["bn1.bias"], torch.nan)
    network, before = make(), make().state_dict()
    with pytest.raises(InitialWeightsError) as caught:
        begin_with(network, read_initial(saved(wrong, tmp_path, "safetensors")), CLASSIFIER)
    message = str(caught.value)
    assert "conv1.weight is missing" in message
    assert "extra is left over" in message
    assert "bn1.weight is [5] instead of [16]" in message
    assert "bn1.bias has NaN or infinite values" in message
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Code:
    """What a pickle would run."""

    def __reduce__(self):
        return (print, ("executed",))


def test_a_file_with_code_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"a": Code()}, tmp_path / "a.pt")
    with pytest.raises(InitialWeightsError, match="cannot be read as a PyTorch file of weights alone"):
        read_initial(tmp_path / "a.pt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.pt", "cannot be read as a PyTorch file"),
        (b"nonsense", "a.safetensors", "is no safetensors file"),
        (None, "a.pt", "cannot be read: No such file"),
    ],
)
def test_files_without_weights_are_errors(content, name, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InitialWeightsError, match=message):
        read_initial(tmp_path / name)


def test_a_file_of_something_else_and_a_run_without_snapshots_are_errors(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InitialWeightsError, match="holds no state_dict"):
        read_initial(tmp_path / "list.pt")
    with pytest.raises(InitialWeightsError, match="has no snapshot yet"):
        read_initial(small_run(tmp_path / "run", snapshots=0).path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="is not a run folder"):
        read_initial(tmp_path / "empty")


def test_a_run_goes_on_only_from_the_weights_that_it_began_with(weights, tmp_path):
    path = saved(weights, tmp_path, "safetensors")
    began = {"initial": str(path), "initial_sha256": read_initial(path).sha256}
    require_same_initial(str(path), began, "run")
    require_same_initial(None, {}, "run")
    for asked, there in ((None, began), (str(path), {"initial_sha256": None})):
        with pytest.raises(RunError, match="initial: "):
            require_same_initial(asked, there, "run")
    safetensors.torch.save_file(snapshot_weights(4), path)
    with pytest.raises(RunError, match="has other weights than the run began with"):
        require_same_initial(str(path), began, "run")
    path.unlink()
    require_same_initial(str(path), began, "run")  # not needed any more
