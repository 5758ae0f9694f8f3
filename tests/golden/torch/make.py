"""Makes the files of this folder with PyTorch 2.13.0 (CPU): `python make.py`.

It needs `torch==2.13.0`, `safetensors` and `numpy`; nothing in the package or its tests does. A
file is never made again: it stands for the files that users have. Each model is written as
`NAME.safetensors`, all arrays of its `state_dict`, and `NAME.npz`, inputs `x` and outputs `y` in
evaluation mode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

HERE = Path(__file__).parent


class Encoder(nn.Module):
    """Two post-norm blocks; fused QKV of 2 heads, square projections, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """A ResNet block with a stride, BatchNorm and a projection of the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Convs(nn.Module):
    """Convolutions in one to three dimensions, grouped, depthwise and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 4, 3, padding=1)
        self.three = nn.Conv3d(4, 4, 2)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, 4, 4, 4]
        x = self.one(x.flatten(2)).reshape(x.shape)
        y = self.three(x[..., None, :].repeat(1, 1, 1, 2, 1))  # [batch, 4, 3, 1, 3]
        return self.up(self.depthwise(self.grouped(y[..., 0, :])))


class Lstm(nn.Module):
    """Two layers of an LSTM, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


class Gru(nn.Module):
    """One layer of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(5, 6, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(x)[0]


class Conv1D(nn.Module):
    """A linear layer as in GPT-2 of Hugging Face: its weight is `[in, out]`."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Attention(nn.Module):
    """Causal attention of 2 heads with fused QKV, as in GPT-2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_attn = Conv1D(3 * width, width)
        self.c_proj = Conv1D(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (*x.shape[:2], 2, x.shape[2] // 2)
        q, k, v = (each.reshape(heads).transpose(1, 2) for each in self.c_attn(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class Gpt2(nn.Module):
    """One block of GPT-2 between its embeddings and its last norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, width), nn.Embedding(5, width)
        block: dict[str, nn.Module] = {"ln_1": nn.LayerNorm(width), "ln_2": nn.LayerNorm(width)}
        block["attn"] = Attention(width)
        block["mlp"] = nn.ModuleDict(
            {"c_fc": Conv1D(4 * width, width), "c_proj": Conv1D(width, 4 * width)}
        )
        self.h = nn.ModuleList([nn.ModuleDict(block)])
        self.ln_f = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = x + block["attn"](block["ln_1"](x))
            y = nn.functional.gelu(block["mlp"]["c_fc"](block["ln_2"](x)), approximate="tanh")
            x = x + block["mlp"]["c_proj"](y)
        return self.ln_f(x)


def perturb(module: nn.Module) -> None:
    """Moves every array away from initial values such as 0 and 1."""
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                value += 0.1 * (
                    torch.rand_like(value) if "var" in name else torch.randn_like(value)
                )


def write(name: str, module: nn.Module, x: torch.Tensor) -> None:
    """Writes a model, an input and its output."""
    perturb(module)
    if x.is_floating_point():
        module.train()(x)  # moves running statistics
    with torch.no_grad():
        y = module.eval()(x)
    arrays: dict[str, Any] = {key: value.numpy() for key, value in module.state_dict().items()}
    save_file(arrays, HERE / f"{name}.safetensors")
    np.savez(HERE / f"{name}.npz", x=x.numpy(), y=y.numpy())


def main() -> None:
    """Writes all files."""
    assert torch.__version__.startswith("2.13.0"), torch.__version__
    torch.manual_seed(0)
    write("encoder", Encoder(), torch.randint(0, 11, (2, 5)))
    write("block", Block(), torch.randn(3, 4, 6, 6))
    write("convs", Convs(), torch.randn(2, 4, 4, 4))
    write("lstm", Lstm(), torch.randn(2, 4, 6))
    write("gru", Gru(), torch.randn(2, 4, 5))
    write("gpt2", Gpt2(), torch.randint(0, 11, (2, 5)))


if __name__ == "__main__":
    main()
