"""The models of the workloads in PyTorch; pictures are `[batch, channels, height, width]`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.workloads import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Workload


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut without parameters."""

    def __init__(self, inputs: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, features, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(features), nn.BatchNorm2d(features)
        self.stride, self.new_channels = stride, features - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the output of the block."""
        residual = F.relu(self.norm1(self.conv1(x)))
        residual = self.norm2(self.conv2(residual))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels)) + residual)


class Mean(nn.Module):
    """The mean over all pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[batch, channels]`."""
        return x.mean((2, 3))


class GPTBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(features), nn.RMSNorm(features)
        self.query, self.key, self.value, self.join = (
            nn.Linear(features, features, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(features, 4 * features, bias=False)
        self.down = nn.Linear(4 * features, features, bias=False)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the residual stream after the block."""
        h = self.norm1(x)
        query, key, value = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        h = F.scaled_dot_product_attention(rotary(query), rotary(key), value, is_causal=True)
        x = x + self.join(h.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def rotary(x: torch.Tensor) -> torch.Tensor:
    """Turns queries or keys `[batch, heads, length, features]` by their positions."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.outer(torch.arange(x.shape[2], device=x.device), frequencies)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def make_model(workload: Workload) -> nn.Module:
    """Returns the model of a workload."""
    if workload.name == "W1":
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    if workload.name == "W2":
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(7 * 7 * 64, 128), nn.ReLU(), nn.Linear(128, 10)),
        )
    if workload.name == "W3":
        stem = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        sizes = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        blocks = (ResidualBlock(*size) for size in sizes)
        return nn.Sequential(*stem, *blocks, Mean(), nn.Linear(64, 10))
    blocks = (GPTBlock(128, 4) for _ in range(4))
    head = nn.Linear(128, 256, bias=False)
    model = nn.Sequential(nn.Embedding(256, 128), *blocks, nn.RMSNorm(128), head)
    nn.init.normal_(model[0].weight, std=0.02)
    return model


def make_optimizer(workload: Workload, model: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer of a workload."""
    params = model.parameters()
    if workload.optimizer == "momentum":
        return torch.optim.SGD(params, LEARNING_RATE, momentum=MOMENTUM)
    if workload.optimizer == "adamw":
        return torch.optim.AdamW(params, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return torch.optim.Adam(params, LEARNING_RATE)


def measures(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean cross-entropy and accuracy."""
    logits, labels = logits.flatten(0, -2), labels.flatten()
    correct = (logits.detach().argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels), correct


def tensors(workload: Workload, inputs, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the arrays of an epoch as PyTorch wants them."""
    x, y = torch.from_numpy(inputs.copy()), torch.from_numpy(labels.copy()).long()
    return (x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x), y
