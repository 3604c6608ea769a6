"""Members' logits to decide on: random ones, of which some know the labels better, and extreme ones."""

import torch
from torch import Tensor


def members_of(
    *noises: float, images: int = 400, classes: int = 7, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logits float32 [M, N, C] and labels [N]: a member for each noise, which the label has to overcome."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(classes, (images,), generator=generator)
    common_NC = torch.randn(images, classes, generator=generator)
    common_NC[torch.arange(images), labels_N] += 2
    own_MNC = torch.randn(len(noises), images, classes, generator=generator)
    noises_M = torch.tensor(noises)[:, None, None]
    return scale * (common_NC + noises_M * own_MNC), labels_N
