"""What networks return, in whatever form, as logits."""

from typing import Any

from torch import Tensor


def logits_of(output: Any, count: int, classes: int) -> Tensor:
    """Logits [count, classes], float32, from what a network returned: them, an object that has them as `.logits`, or a
    tuple of them and more. Raises ValueError for anything else.
    """
    if not isinstance(output, Tensor):
        output = getattr(output, "logits", output)
        output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor) or output.shape != (count, classes):
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"the network must return logits [{count}, {classes}], the images and the classes of the run, or an object "
            f"with .logits, got {got}"
        )
    return output.float()
