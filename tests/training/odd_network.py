"""A small network that has what ours have not: tied and frozen parameters, buffers of many types, other layers."""

import torch
from torch import Tensor, nn


class OddNetwork(nn.Module):
    """Images [B, 1, 8, 8] -> logits [B, 10]. What training changes in a buffer has an effect on later steps."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._make()

    def _make(self) -> None:
        self.stem, self.group_norm = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.sequence, self.layer_norm = nn.Conv1d(8, 8, 3, padding=1), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.statistics = nn.BatchNorm1d(8, affine=False, momentum=None)  # a mean over all batches
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.turned = nn.Parameter(torch.randn(8, 8).t())
        self.unused = nn.Parameter(torch.randn(3))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.frozen_double = nn.Parameter(torch.rand(8, dtype=torch.float64), requires_grad=False)
        self.frozen_indices = nn.Parameter(torch.arange(10), requires_grad=False)
        whole = torch.arange(1.0, 5.0)
        for name, buffer in {
            "updates": torch.tensor(0),
            "mask": torch.tensor([True] * 7 + [False]),
            "total": torch.tensor(0.0, dtype=torch.float64),
            "rough": torch.zeros(8, dtype=torch.bfloat16),
            "wave": torch.randn(8, dtype=torch.complex64),
            "bytes": torch.arange(8, dtype=torch.uint8),
            "empty": torch.empty(0),
            "whole": whole,
            "part": whole[1:3],  # the same memory
            "again": whole,
            "image": torch.randn(1, 8, 8, 8).contiguous(memory_format=torch.channels_last),
        }.items():
            self.register_buffer(name, buffer)
        self.register_buffer("hidden", torch.tensor(0.0), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.group_norm(self.stem(images) + self.image)).flatten(2)
        rows = self.layer_norm(self.sequence(features).transpose(1, 2))
        rows = rows + self.attention(rows, rows, rows, need_weights=False)[0]
        values = self.statistics(rows.mean(1)) * self.mask + self.wave.abs() + self.bytes / 8
        values = self.second(torch.relu(self.first(values))) + self.frozen(values) @ self.turned
        values = values * self.frozen_double.float() * self.scale + self.rough.float() * self.part.sum()
        if self.training:
            with torch.no_grad():
                self.updates += 1
                self.total += values.mean().double() / 3
                self.rough += values.mean(0).bfloat16() / 8
                self.part += 0.125
                self.hidden += 1 / 16
        values = values + self.total.float() + self.hidden + self.updates / 64
        return self.head(values) + self.nothing.sum() + self.embedding(self.frozen_indices).sum(1)
