"""A state_dict of any optimizer as tensors and JSON, and back: what a checkpoint can hold without pickle.

The tree keeps its shape: {"dict": [[key, value], ...]}, {"list": [...]}, {"tuple": [...]}, {"tensor": name},
{"number": "inf"} for what JSON has not, and plain values as they are.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

PLAIN = (str, int, bool, float, type(None))
PREFIX = "optimizer."  # of the names of its tensors in a checkpoint


def pack(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of `state` by name, and the tree that refers to them.

    Raises ValueError, naming the place, for what is neither tensor nor JSON.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _packed(state, PREFIX, tensors)


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, Mapping):
        for key in value:
            _require_plain(key, f"{place}: the key")
        return {"dict": [[key, _packed(item, f"{place}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_packed(item, f"{place}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    _require_plain(value, place)
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    return value


def _require_plain(value: Any, place: str) -> None:
    if type(value) not in PLAIN:
        raise ValueError(
            f"the optimizer's state cannot be saved: {place} is a {type(value).__name__}, and a checkpoint holds "
            "tensors, numbers and text only. Leave optimizer out, and save checkpoints in the loop itself"
        )


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state_dict that `pack` was given. Raises ValueError for what is no such tree."""
    if isinstance(tree, PLAIN):
        return tree
    try:
        ((kind, value),) = tree.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {key: unpack(item, tensors) for key, item in value}
        if kind in ("list", "tuple"):
            items = [unpack(item, tensors) for item in value]
            return items if kind == "list" else tuple(items)
        if kind == "number":
            return float(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the optimizer's state is damaged: {error}") from error
    raise ValueError(f"the optimizer's state is damaged: {kind!r} is no part of one")
