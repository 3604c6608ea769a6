"""The members of an ensemble as networks: all of them in memory, or one whose weights are swapped."""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor, nn

from fastsnap.device import free_device_memory
from fastsnap.ensemble.forwards import load_member
from fastsnap.limits import format_bytes
from fastsnap.run_folder import RunFolder
from fastsnap.run_schema import SnapshotEntry
from fastsnap.snapshot import COMPILED_PREFIX

Resident = Literal["auto", "all", "one"]
RESIDENT = ("auto", "all", "one")
PART_OF_MEMORY = 2  # the members may take a half of what is free: images and activations want some too


class AllMembers(nn.ModuleList):
    """A network per member."""

    @property
    def network(self) -> nn.Module:
        """One of them, to see what they are like."""
        return self[0]

    def take(self, index: int) -> nn.Module:
        """The network of member `index`."""
        return self[index]


class OneNetwork(nn.Module):
    """One network that takes the weights of each member in turn, from where they lie: in files, memory-mapped.
    Not for several threads at once.

    Its state_dict has the names and the values that AllMembers' has, so each loads what the other saved.
    """

    def __init__(self, network: nn.Module, states: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.states = states
        # In a list, so that it is no child, whose weights a state_dict would hold as one more member's.
        self._network = [network]
        self._last: int | None = None  # whose weights the network has

    @property
    def network(self) -> nn.Module:
        """With the weights of whichever member computed last."""
        return self._network[0]

    def __len__(self) -> int:
        return len(self.states)

    @torch.no_grad()
    def take(self, index: int) -> nn.Module:
        """The network with the weights of member `index`."""
        if index != self._last:
            self._last = None  # should this fail half-way
            tensors = self.network.state_dict()
            for name, value in self.states[index].items():
                tensors[name].copy_(value)
            self._last = index
        return self.network

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What .to() and .half() do, to the network: the states lie where they lie."""
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        like = self.network.state_dict()
        for index, state in enumerate(self.states):
            for name, tensor in state.items():
                destination[f"{prefix}{index}.{name}"] = tensor.to(like[name])  # its type and device

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes what is there for each member, and says what is not."""
        for index, state in enumerate(self.states):
            found = dict(state)
            for name, old in state.items():
                key = f"{prefix}{index}.{name}"
                if key not in state_dict:
                    missing_keys.append(key)
                elif state_dict[key].shape != old.shape:
                    error_msgs.append(
                        f"size mismatch for {key}: {list(state_dict[key].shape)} instead of {list(old.shape)}"
                    )
                else:
                    found[name] = state_dict[key].detach().to("cpu", copy=True)
            self.states[index] = found
        known = {f"{prefix}{index}.{name}" for index, state in enumerate(self.states) for name in state}
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        """To be pickled: each tensor by itself; as it is, each would bring its whole file."""
        return self.__dict__ | {
            "states": [{name: tensor.clone() for name, tensor in state.items()} for state in self.states]
        }


Members = AllMembers | OneNetwork


def load_members(
    folder: RunFolder, entries: list[SnapshotEntry], network: nn.Module, device: torch.device, resident: str
) -> Members:
    """The snapshots `entries`, their hashes verified, in networks like `network` on `device`, for evaluation.

    resident  "all": a network each; "one": one network, weights swapped; "auto": all where they take at most half of
              the memory that is free
    Raises RunError for a snapshot that is damaged or of another network, ValueError for another `resident`.
    """
    if resident not in RESIDENT:
        raise ValueError(f"resident must be one of {', '.join(RESIDENT)}, got {resident!r}")
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    if resident == "auto":
        resident = "all" if _fits(network, len(entries), device) else "one"
    if resident == "all":
        networks = []
        for entry in entries:
            networks.append(copy.deepcopy(network))
            load_member(networks[-1], folder, entry)
            networks[-1].to(device)
        return AllMembers(networks)
    states: list[dict[str, Tensor]] = []
    for entry in entries:
        load_member(network, folder, entry)
        states.append(_mapped(folder, entry))
    return OneNetwork(network.to(device), states)


def _fits(network: nn.Module, members: int, device: torch.device) -> bool:
    room = free_device_memory(device)
    return room is None or members * state_bytes(network) * PART_OF_MEMORY <= room.bytes


def state_bytes(network: nn.Module) -> int:
    """Of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])


def describe_members(members: Members) -> str:
    """For a log: how many, and how they are kept."""
    if isinstance(members, OneNetwork):
        return f"{len(members)} members, one at a time in {format_bytes(state_bytes(members.network))}"
    return f"{len(members)} members in {format_bytes(state_bytes(members))}"


def _mapped(folder: RunFolder, entry: SnapshotEntry) -> dict[str, Tensor]:
    """The tensors of a snapshot whose hash was verified just now, in its file: read when they are used."""
    with safetensors.safe_open(folder.path / entry.file, "pt") as file:
        return {name.replace(COMPILED_PREFIX, ""): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
