"""State that travels: other people's savers, hooks, states of older versions, and what is refused."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.optim import SnapshotSGD

SCHEDULE = Schedule("snapshot", 20, 3, 0.1)


def made(dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> tuple[nn.Module, SnapshotSGD]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)).to(dtype)
    groups = [
        {"params": list(net[0].named_parameters(prefix="0")), "weight_decay": 0.0},
        {"params": list(net[1].named_parameters(prefix="1")), "lr_scale": 0.5},
    ]
    return net, SnapshotSGD(groups, SCHEDULE, **options)


def train(net: nn.Module, optimizer: SnapshotSGD, steps: int) -> None:
    for _ in range(steps):
        generator = torch.Generator().manual_seed(optimizer.updates())
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer.step()
    optimizer.zero_grad()


def assert_goes_on_alike(one: tuple[nn.Module, SnapshotSGD], other: tuple[nn.Module, SnapshotSGD]) -> None:
    for net, optimizer in (one, other):
        train(net, optimizer, 3)
    assert one[1].updates() == other[1].updates()
    assert [g["lr"] for g in one[1].param_groups] == [g["lr"] for g in other[1].param_groups]
    for name in ("weights", "momentum", "average"):
        a, b = getattr(one[1], name), getattr(other[1], name)
        assert (a is None and b is None) or torch.equal(a, b), name


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


OPTIONS = [
    StateDictOptions(),
    StateDictOptions(flatten_optimizer_state_dict=True),
    StateDictOptions(full_state_dict=True, cpu_offload=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_of_torch_distributed_checkpoint_continues_bit_for_bit(dtype, options):
    net, optimizer = made(dtype, average_decay=0.9)
    train(net, optimizer, 7)
    saved = copy.deepcopy(get_state_dict(net, optimizer, options=options))
    other, fresh = made(dtype, seed=1, average_decay=0.9)
    set_state_dict(other, fresh, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    assert fresh.updates() == 7
    assert_goes_on_alike((net, optimizer), (other, fresh))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("flattened", [False, True])
def test_a_checkpoint_on_disk_of_torch_distributed_continues_bit_for_bit(one_process, tmp_path, flattened):
    options = StateDictOptions(flatten_optimizer_state_dict=flattened)
    net, optimizer = made(torch.bfloat16, average_decay=1.0)
    train(net, optimizer, 7)
    checkpoint.save(
        {"optim": get_optimizer_state_dict(net, optimizer, options=options)}, checkpoint_id=tmp_path
    )
    other, fresh = made(torch.bfloat16, seed=1, average_decay=1.0)
    state = {"optim": get_optimizer_state_dict(other, fresh, options=options)}
    checkpoint.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, fresh, state["optim"], options=options)
    assert_goes_on_alike((net, optimizer), (other, fresh))


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_parameters_whose_state_torch_leaves_out_stay_as_they_are(dtype, options):
    net, optimizer = made(dtype)
    other, fresh = made(dtype, seed=1)
    for used in (net, other):
        used[0].requires_grad_(False)
    train_head(net, optimizer, 4)
    saved = copy.deepcopy(get_state_dict(net, optimizer, options=options))
    set_state_dict(other, fresh, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    train_head(net, optimizer, 2)
    train_head(other, fresh, 2)
    assert fresh.updates() == 6
    assert torch.equal(fresh.weights, optimizer.weights)


def train_head(net: nn.Module, optimizer: SnapshotSGD, steps: int) -> None:
    for _ in range(steps):
        net[1].weight.grad = torch.ones_like(net[1].weight)
        optimizer.step()


def test_an_average_of_a_frozen_parameter_that_torch_leaves_out_is_missed_by_name():
    net, optimizer = made(average_decay=1.0)
    net[0].requires_grad_(False)
    train_head(net, optimizer, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    with pytest.raises(ValueError, match=r"no state of parameter 0\.weight.*call requires_grad_\(True\)"):
        set_optimizer_state_dict(net, optimizer, saved)
    net.requires_grad_(True)
    set_optimizer_state_dict(net, optimizer, saved)
    assert optimizer.updates() == 2


def test_counters_are_where_other_optimizers_keep_them_and_no_other_keys_are_needed():
    net, optimizer = made(average_decay=1.0)
    train(net, optimizer, 4)
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    for of_parameter in (*saved["state"].values(), *optimizer.state.values()):
        assert of_parameter.keys() == {"momentum_buffer", "average", "step", "averaged"}
        assert of_parameter["step"].item() == of_parameter["averaged"].item() == 4
    train(net, optimizer, 1)
    assert optimizer.state[net[0].weight]["step"].item() == 5


def test_the_state_of_a_parameter_is_saved_without_the_rest():
    net, optimizer = made()
    storages = [of["momentum_buffer"].untyped_storage() for of in optimizer.state.values()]
    assert [storage.nbytes() for storage in storages] == [4 * p.numel() for p in net.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == 4


def test_a_state_of_version_0_1_continues_bit_for_bit():
    net, optimizer = made(torch.bfloat16, average_decay=1.0)
    train(net, optimizer, 7)
    old = copy.deepcopy(optimizer.state_dict())
    old |= {"updates": 7, "averaged": 7}
    for of_parameter in old["state"].values():
        del of_parameter["step"], of_parameter["averaged"]
    old["param_groups"][0].pop("lr_scale")
    other, fresh = made(torch.bfloat16, seed=1, average_decay=1.0)
    fresh.load_state_dict(old)
    assert_goes_on_alike((net, optimizer), (other, fresh))


def test_what_a_hook_before_loading_changes_counts_and_is_what_is_checked():
    net, optimizer = made()
    train(net, optimizer, 7)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["dampening"] = 0.0  # would be refused
    other, fresh = made(seed=1)
    seen = []

    def before(used: SnapshotSGD, state: dict) -> dict:
        groups = [{k: v for k, v in g.items() if k != "dampening"} for g in state["param_groups"]]
        of_parameters = {i: {**tensors, "step": torch.tensor(9)} for i, tensors in state["state"].items()}
        return {"state": of_parameters, "param_groups": groups}

    def after(used: SnapshotSGD) -> None:
        seen.append((used.updates(), used.param_groups[0]["lr"], used.momentum.clone()))

    fresh.register_load_state_dict_pre_hook(before)
    fresh.register_load_state_dict_post_hook(after)
    fresh.load_state_dict(saved)
    ((updates, rate, momentum),) = seen
    assert updates == fresh.updates() == 9
    assert rate == SCHEDULE.rate(9)
    assert torch.equal(momentum, optimizer.momentum)
    assert other[0].weight.grad is None


def test_hooks_around_saving_see_and_change_everything():
    net, optimizer = made(torch.bfloat16)
    train(net, optimizer, 2)
    seen: list[dict] = []

    def write(used: SnapshotSGD) -> None:
        with torch.no_grad():
            net[0].weight.fill_(3)

    def after(used: SnapshotSGD, state: dict) -> dict:
        seen.append(state)
        return {**state, "epoch": 1}

    optimizer.register_state_dict_pre_hook(write)
    optimizer.register_state_dict_post_hook(after)
    saved = optimizer.state_dict()
    assert saved["epoch"] == 1
    assert (saved["state"][0]["master"] == 3).all()
    assert seen[0]["state"][3]["step"] == 2
    optimizer.load_state_dict(saved)  # what a hook has added is no reason to refuse
    assert optimizer.updates() == 2


def without_step(state: dict) -> None:
    del state["state"][2]["step"]


def of_several_runs(state: dict) -> None:
    state["state"][2]["step"] = torch.tensor(3)


def past_the_schedule(state: dict) -> None:
    for of_parameter in state["state"].values():
        of_parameter["step"] = torch.tensor(21)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_step, r"no 'step' of each parameter.*seek\(updates\)"),
        (of_several_runs, r"different numbers of updates, \[2, 3\]"),
        (past_the_schedule, "got 21: the schedule has 20 updates"),
        (lambda state: state["param_groups"][1].update(initial_lr=0.1), "lr_scheduler is or was attached"),
        (lambda state: state["param_groups"][1].update(lr_scale=0.0), "lr_scale must be finite and above 0"),
        (lambda state: state.pop("state"), r"has no \['state'\]: it is not an optimizer's"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_taken_over(damage, message):
    net, optimizer = made()
    train(net, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved)
    train(net, optimizer, 1)
    momentum = optimizer.momentum.clone()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.updates() == 3
    assert torch.equal(optimizer.momentum, momentum)
    train(net, optimizer, 1)
