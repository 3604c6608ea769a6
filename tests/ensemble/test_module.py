"""The ensemble as a module: what it computes against a plain loop, what moves and saves it, and what it refuses."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from made_pictures import picture, save
from PIL import Image
from small_run import EPOCHS, NET, UPDATES_PER_EPOCH, small_dataset, small_run, snapshot_weights
from torch import Tensor

import fastsnap
from fastsnap.data.headers import DamagedImage
from fastsnap.ensemble import members as members_module
from fastsnap.ensemble.combination import combine, combine_plainly
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.members import AllMembers, OneNetwork
from fastsnap.limits import Room
from fastsnap.nets.build import build_network
from fastsnap.run_files import RunError
from fastsnap.run_folder import DamagedSnapshot, RunFolder

FACTS: dict[str, Any] = {
    "class_names": [f"digit {number}" for number in range(10)],
    "mean": [77.87],
    "std": [95.87],
    "image_shape": [8, 8, 1],
    "resize": None,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Of three snapshots; its data set is nowhere."""
    return small_run(
        tmp_path_factory.mktemp("runs") / "run", snapshots=3, dataset="cifar10", data="gone", **FACTS
    )


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(small_dataset().test.images[:100])


def load(run: RunFolder, **options: Any) -> fastsnap.Ensemble:
    return fastsnap.load_ensemble(run.path, **({"device": "cpu"} | options))


def by_hand(images: Tensor, numbers: tuple[int, ...] = (1, 2, 3)) -> Tensor:
    """Probabilities float64 [M, N, C] of small_run's snapshots, in plain PyTorch."""
    pixels = (images.permute(0, 3, 1, 2).double() - 77.87) / 95.87
    outputs = []
    for number in numbers:
        network = build_network(NET, classes=10, in_channels=1)
        network.load_state_dict(snapshot_weights(number))
        with torch.no_grad():
            outputs.append(network.double().eval()(pixels).softmax(1))
    return torch.stack(outputs)


@pytest.mark.parametrize("resident", ["all", "one"])
def test_probabilities_are_the_mean_of_the_members(run: RunFolder, images: Tensor, resident: str) -> None:
    ensemble = load(run, resident=resident)
    assert ensemble.classes == tuple(FACTS["class_names"])
    assert ensemble.image_size == (8, 8)
    assert [entry.number for entry in ensemble.members] == [1, 2, 3]
    expected = by_hand(images)
    found = ensemble(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.mean(0), rtol=0, atol=1e-6)
    predictions = ensemble.predict(images, members=True)
    assert predictions.members is not None
    torch.testing.assert_close(predictions.members.double(), expected, rtol=0, atol=1e-6)
    average = expected.mean(0)
    entropy = -torch.xlogy(average, average).sum(1)
    own = -torch.xlogy(expected, expected).sum(2).mean(0)
    torch.testing.assert_close(predictions.entropy.double(), entropy, rtol=0, atol=1e-5)
    torch.testing.assert_close(predictions.mutual_information.double(), entropy - own, rtol=0, atol=1e-5)
    others = (expected.argmax(2) != average.argmax(1)).double().mean(0)
    torch.testing.assert_close(predictions.disagreement.double(), others, rtol=0, atol=1e-6)
    assert predictions.names == [FACTS["class_names"][index] for index in average.argmax(1).tolist()]


@pytest.mark.parametrize("numbers", [None, [1, 3]])
def test_it_errs_as_ensemble_eval_does(tmp_path: Path, numbers: list[int] | None) -> None:
    run = small_run(tmp_path / "run", snapshots=3, **FACTS)
    report = evaluate_run(run, device=torch.device("cpu"), precision="fp32", snapshots=numbers)
    test = small_dataset().test
    labels = torch.from_numpy(test.labels)
    ensemble = load(run, snapshots=numbers)
    pictures = ensemble.predict(list(test.images), batch_size=70).probabilities
    for probabilities in (ensemble(torch.from_numpy(test.images)), pictures):
        error = 100 * (probabilities.argmax(1) != labels).double().mean().item()
        nll = -probabilities.double().log().gather(1, labels[:, None]).mean().item()
        assert error == pytest.approx(report.metrics.last_m[-1].error, abs=1e-12)
        assert nll == pytest.approx(report.metrics.last_m[-1].nll, abs=1e-6)


def test_weights_and_temperature(run: RunFolder, images: Tensor) -> None:
    members = by_hand(images)
    weighted = load(run, weights=[1, 0, 3])(images).double()
    torch.testing.assert_close(weighted, members[0] / 4 + members[2] * 3 / 4, rtol=0, atol=1e-6)
    assert len(load(run, weights=[1, 0, 3]).members) == 2
    sharper = load(run, temperature=0.5).predict(images)
    squared = members.mean(0).square()
    expected = squared / squared.sum(1, keepdim=True)
    torch.testing.assert_close(sharper.probabilities.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        sharper.entropy.double(), -torch.xlogy(expected, expected).sum(1), rtol=0, atol=1e-5
    )
    plain = load(run).predict(images)
    assert torch.equal(sharper.mutual_information, plain.mutual_information)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_the_plain_combination_is_the_kernels(temperature: float, scale: float) -> None:
    """Also of logits whose softmax underflows."""
    logits = scale * torch.randn(4, 50, 7, generator=torch.Generator().manual_seed(0))
    weights = [0.1, 0.2, 0.3, 0.4]
    kernel, plain = combine(logits, weights, temperature), combine_plainly(logits, weights, temperature)
    for name in kernel._fields:
        torch.testing.assert_close(getattr(plain, name), getattr(kernel, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resident", ["all", "one"])
def test_it_is_pickled_copied_saved_and_loaded(run: RunFolder, images: Tensor, resident: str) -> None:
    ensemble = load(run, resident=resident)
    expected = ensemble(images)
    content = pickle.dumps(ensemble)
    assert len(content) < 1.5 * sum((run.path / entry.file).stat().st_size for entry in ensemble.members)
    for other in (pickle.loads(content), copy.deepcopy(ensemble)):
        assert torch.equal(other(images), expected)
    for kind in ("all", "one"):
        other = load(run, resident=kind, snapshots=[3, 1, 2])
        state = {name: torch.zeros_like(tensor) for name, tensor in other.state_dict().items()}
        other.load_state_dict(state)
        assert not torch.equal(other(images), expected)
        assert other.load_state_dict(ensemble.state_dict()) == ([], [])
        assert torch.equal(other(images), expected)


@pytest.mark.parametrize("resident", ["all", "one"])
def test_a_state_dict_that_does_not_fit_is_refused(run: RunFolder, resident: str) -> None:
    ensemble = load(run, resident=resident)
    state = ensemble.state_dict()
    fewer = {name: value for name, value in state.items() if name != "networks.1.linear.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key.*networks\.1\.linear\.bias"):
        ensemble.load_state_dict(fewer)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*networks\.7\.more"):
        ensemble.load_state_dict(state | {"networks.7.more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for networks\.2\.linear\.bias"):
        ensemble.load_state_dict(state | {"networks.2.linear.bias": torch.zeros(3)})


@pytest.mark.parametrize("resident", ["all", "one"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types(run: RunFolder, images: Tensor, resident: str, dtype: torch.dtype) -> None:
    ensemble = load(run, resident=resident)
    expected = ensemble(images)
    ensemble.to(dtype)
    state = ensemble.state_dict()
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {dtype}
    found = ensemble(images)
    assert found.dtype == torch.float32
    tolerance = {torch.float16: 2e-4, torch.bfloat16: 2e-3, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    if dtype != torch.float64:
        assert not torch.equal(found, expected)


def test_it_stays_in_evaluation_and_keeps_no_gradients(run: RunFolder, images: Tensor) -> None:
    ensemble = load(run)
    expected = ensemble(images)
    ensemble.train()
    assert not any(module.training for module in ensemble.modules())
    assert torch.equal(ensemble(images), expected)
    assert not ensemble(images).requires_grad
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_it_compiles_in_one_graph(run: RunFolder, images: Tensor) -> None:
    ensemble = load(run, temperature=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(ensemble, fullgraph=True)
    torch.testing.assert_close(compiled(images), ensemble(images), rtol=0, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "auto"])
def test_the_precision_is_the_evaluations(run: RunFolder, images: Tensor, precision: str) -> None:
    """On a CPU fp16 is computed in fp32."""
    ensemble = load(run, precision=precision)
    assert ensemble.precision in (("fp32",) if precision == "fp16" else ("fp32", "bf16"))
    torch.testing.assert_close(ensemble(images), load(run)(images), rtol=0, atol=5e-3)


@pytest.mark.parametrize(("free", "kind"), [(10**9, AllMembers), (10**6, OneNetwork), (None, AllMembers)])
def test_what_is_resident_is_what_fits(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, free: int | None, kind: type
) -> None:
    """The three members have 0.9 MB."""
    room = None if free is None else Room(free, "free")
    monkeypatch.setattr(members_module, "free_device_memory", lambda device: room)
    ensemble = load(run)
    assert isinstance(ensemble.networks, kind)
    assert ("one at a time" in repr(ensemble)) == (kind is OneNetwork)


def test_one_network_keeps_one_members_weights(run: RunFolder, images: Tensor) -> None:
    one, every = load(run, resident="one"), load(run, resident="all")
    assert isinstance(one.networks, OneNetwork)
    own = sum(parameter.numel() for parameter in one.networks.network.parameters())
    assert own * 3 == sum(parameter.numel() for parameter in every.parameters())
    assert torch.equal(one(images), every(images))
    assert torch.equal(one(images), every(images))  # the last member's weights were in it


def test_lists_of_any_sizes_are_brought_to_the_runs(run: RunFolder) -> None:
    ensemble = load(run)
    arrays = [
        np.asarray(picture(width, height, mode="L")) for width, height in ((8, 8), (1, 1), (30, 9), (7, 200))
    ]
    found = ensemble([*arrays[:2], arrays[2][..., None], torch.from_numpy(arrays[3].copy())])
    prepared = torch.from_numpy(np.stack([ensemble.preprocessing.of(array) for array in arrays]))
    assert prepared.shape == (4, 8, 8, 1)
    assert torch.equal(found, ensemble(prepared))
    assert torch.equal(prepared[0, ..., 0], torch.from_numpy(arrays[0].copy()))
    whole = torch.from_numpy(np.stack([arrays[2]] * 2)[..., None])
    torch.testing.assert_close(ensemble(whole), found[[2, 2]], rtol=0, atol=1e-7)


def test_empty_batches(run: RunFolder) -> None:
    ensemble = load(run)
    for nothing in (
        torch.empty(0, 8, 8, 1, dtype=torch.uint8),
        torch.empty(0, 9, 9, 1, dtype=torch.uint8),
        [],
    ):
        assert ensemble(nothing).shape == (0, 10)
    predictions = ensemble.predict([], members=True)
    assert (len(predictions), predictions.names, predictions.top(3)) == (0, [], [])
    assert predictions.members is not None
    assert predictions.members.shape == (3, 0, 10)


def test_predict_takes_paths_images_and_arrays(run: RunFolder, tmp_path: Path) -> None:
    ensemble = load(run)
    image = picture(40, 30)
    path = save(image, tmp_path / "a.png")
    grey = np.asarray(image.convert("L"))
    for one in (path, str(path), image, grey):
        predictions = ensemble.predict(one)
        assert len(predictions) == 1
        assert torch.equal(predictions.probabilities, ensemble.predict([grey]).probabilities)
    mixed = ensemble.predict(iter([path, image, grey]), batch_size=2)
    torch.testing.assert_close(
        mixed.probabilities, predictions.probabilities.expand(3, 10), rtol=0, atol=1e-6
    )
    best = mixed.top(2)[0]
    assert next(name for name, _ in best) == mixed.names[0]
    assert best[0][1] >= best[1][1]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 8, 8, 1), r"uint8, 0 to 255, got float32: .*\(images \* 255\)"),
        (np.full((2, 8, 8, 1), np.nan), r"got float64: .*NaN must be mended"),
        (torch.zeros(2, 8, 8, 1, dtype=torch.int64), r"got int64"),
        (np.full((2, 8, 8, 1), "x", dtype=object), r"got object"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r"\[N, height, width, 1\].*got \[2, 8, 8, 3\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"channels come last: permute\(0, 2, 3, 1\)"),
        (torch.zeros(8, 8, 1, dtype=torch.uint8), r"a single image is images\[None\]"),
        (torch.zeros(2, 0, 8, 1, dtype=torch.uint8), r"must have pixels"),
        ([np.zeros((8, 8), np.float32)], r"image 0 of the list must have pixels of uint8"),
        ([np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)], r"image 1 of the list .*alpha channel"),
        ("a.png", r"ensemble\.predict"),
        ([Image.new("L", (8, 8))], r"image 0 of the list must be"),
    ],
)
def test_other_images_are_refused_with_the_remedy(run: RunFolder, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(run)(images)


def test_predict_refuses_what_it_cannot_use(run: RunFolder, tmp_path: Path) -> None:
    ensemble = load(run)
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(DamagedImage, match=r"text\.jpg: it is no picture"):
        ensemble.predict([picture(9, 9), tmp_path / "text.jpg"])
    with pytest.raises(DamagedImage, match=r"missing\.jpg"):
        ensemble.predict(tmp_path / "missing.jpg")
    with pytest.raises(ValueError, match=r"image 1 must have pixels of uint8"):
        ensemble.predict([picture(9, 9), np.zeros((8, 8))])
    with pytest.raises(ValueError, match=r"got a int"):
        ensemble.predict([3])
    with pytest.raises(ValueError, match=r"got a int"):
        ensemble.predict(3)
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, got 0"):
        ensemble.predict([], batch_size=0)
    with pytest.raises(ValueError, match=r"count must be at least 1, got 0"):
        ensemble.predict([]).top(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 4}, r"last must be from 1 to the 3 snapshots"),
        ({"last": 0}, r"last must be from 1 to the 3 snapshots"),
        ({"last": 1, "snapshots": [1]}, r"exclude each other"),
        ({"snapshots": [4]}, r"among the 1, 2, 3"),
        ({"weights": [1, 2]}, r"weights must be 3 finite numbers"),
        ({"weights": [1, -2, 3]}, r"weights must be 3 finite numbers"),
        ({"weights": [0, 0, 0]}, r"not all 0"),
        ({"weights": [1, float("nan"), 1]}, r"weights must be 3 finite"),
        ({"temperature": 0}, r"temperature must be"),
        ({"temperature": float("nan")}, r"temperature must be"),
        ({"resident": "some"}, r"resident must be one of"),
        ({"precision": "fp8"}, r"precision must be one of auto, bf16, fp16, fp32, got 'fp8'"),
        ({"network": torch.nn.Linear(1, 1)}, r"network is for runs of SnapshotRecorder"),
    ],
)
def test_other_options_are_refused(run: RunFolder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(run, **options)


def test_a_gpu_that_is_not_there_is_a_clear_error(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda was asked for, but torch finds no CUDA device"):
        load(run, device="cuda")


def test_last_takes_the_last(run: RunFolder, images: Tensor) -> None:
    assert [entry.number for entry in load(run, last=2).members] == [2, 3]
    torch.testing.assert_close(
        load(run, last=1)(images).double(), by_hand(images, (3,))[0], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("resident", ["all", "one"])
def test_a_damaged_member_is_named(tmp_path: Path, resident: str) -> None:
    run = small_run(tmp_path / "run", snapshots=3, **FACTS)
    file = run.path / run.snapshots()[1].file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedSnapshot, match=r"snapshot 2 .*SHA-256"):
        load(run, resident=resident)
    assert len(load(run, resident=resident, snapshots=[1, 3]).members) == 2


def test_a_run_without_snapshots_and_one_of_another_net(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no snapshot yet"):
        load(small_run(tmp_path / "none", snapshots=0, **FACTS))
    with pytest.raises(RunError, match="is not a run folder"):
        load(RunFolder(tmp_path / "nowhere"))
    other = small_run(tmp_path / "other", snapshots=1, net="resnet14", **FACTS)
    with pytest.raises(RunError, match=r"snapshot 1 .*does not fit the net"):
        load(other)


def test_logits_that_are_no_numbers_name_the_snapshot(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", snapshots=1, **FACTS)
    broken = snapshot_weights(1)
    broken["linear.bias"][3] = float("nan")
    step = 2 * EPOCHS * UPDATES_PER_EPOCH // 3
    run.save_snapshot(broken, step=step, cycle=2, epoch=3, learning_rate=1e-4, train_loss=1)
    ensemble = load(run)
    with pytest.raises(ValueError, match=r"NaN or infinite logits from snapshot 2, in fp32"):
        ensemble(torch.zeros(1, 8, 8, 1, dtype=torch.uint8))


def test_a_run_of_an_old_version_asks_its_data_set(tmp_path: Path, images: Tensor) -> None:
    """The digits come with scikit-learn; of others the folder may be named."""
    old = load(small_run(tmp_path / "digits", snapshots=3))
    assert old.classes == tuple("0123456789")
    torch.testing.assert_close(old(images).double(), by_hand(images).mean(0), rtol=0, atol=1e-6)
    lost = small_run(tmp_path / "lost", snapshots=3, dataset="cifar10", data="gone")
    with pytest.raises(RunError, match=r"old version.*class_names, mean, std, image_shape.*--data"):
        load(lost)
    known = fastsnap.Preprocessing(tuple(FACTS["class_names"]), (8, 8, 1), (77.87,), (95.87,))
    assert torch.equal(load(lost, preprocessing=known)(images), old(images))


def test_preprocessing_is_checked() -> None:
    with pytest.raises(ValueError, match=r"image_shape must be .* got \[8, 8, 2\]"):
        fastsnap.Preprocessing(("a", "b"), (8, 8, 2), (1.0,), (1.0,))
    with pytest.raises(ValueError, match=r"one value for each of the 3 channels"):
        fastsnap.Preprocessing(("a", "b"), (8, 8, 3), (1.0,), (1.0,))
    with pytest.raises(ValueError, match=r"std above 0"):
        fastsnap.Preprocessing(("a", "b"), (8, 8, 1), (1.0,), (0.0,))
    with pytest.raises(ValueError, match=r"resize must be at least the 8 pixels of image_shape, got 7"):
        fastsnap.Preprocessing(("a", "b"), (8, 8, 1), (1.0,), (1.0,), resize=7)
    with pytest.raises(ValueError, match=r"classes must be at least 2"):
        fastsnap.Preprocessing(("a",), (8, 8, 1), (1.0,), (1.0,))


def test_snapshots_stay_files_of_their_own(run: RunFolder) -> None:
    """What is swapped comes from the files, memory-mapped: nothing writes to them."""
    before = [(run.path / entry.file).read_bytes() for entry in run.snapshots()]
    ensemble = load(run, resident="one")
    ensemble(torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
    ensemble.load_state_dict({name: value + 1 for name, value in ensemble.state_dict().items()})
    ensemble(torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
    assert [(run.path / entry.file).read_bytes() for entry in run.snapshots()] == before
    assert safetensors.torch.load(before[0]).keys() == snapshot_weights(1).keys()
