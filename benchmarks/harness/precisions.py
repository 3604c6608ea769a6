"""In which precision a case is compared: in each contender's best by default, or in one that is asked of all.

By default the project takes what `auto` is, and whoever writes a loop by hand would try both and keep the faster. A
user who needs one precision asks it of everybody; contenders that offer no choice compute in fp32 as ever.
"""

import torch

from fastsnap.device import choose_precision

DEFAULT = "auto"


def compared(asked: str | None, device: str) -> tuple[str, ...]:
    """The precisions to measure in, as the command line names them: the one `asked` for; None: the default and, where
    that is another, fp32 as well.
    """
    if asked is not None:
        return (asked,)
    return (DEFAULT,) if _chosen(device) == "fp32" else (DEFAULT, "fp32")


def tried_by_hand(asked: str, device: str) -> tuple[str, ...]:
    """What a careful opponent tries: both precisions where PyTorch computes in bf16 at all, unless one is asked for."""
    if asked != DEFAULT:
        return (asked,)
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ("bf16", "fp32") if has_bf16 else ("fp32",)


def text_of(asked: str, device: str) -> str:
    """For the name of a case: "bf16 by default" or "fp32 asked of all"."""
    return by_default(_chosen(device)) if asked == DEFAULT else asked_of_all(asked)


def by_default(precision: str) -> str:
    """The text where the project's default is `precision`, and a careful opponent takes the better of both."""
    return f"{precision} by default"


def asked_of_all(precision: str) -> str:
    """The text where `precision` is asked of all."""
    return f"{precision} asked of all"


def _chosen(device: str) -> str:
    return choose_precision("auto", torch.device(device)).name
