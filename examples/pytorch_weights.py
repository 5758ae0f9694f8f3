"""Weights in PyTorch's form: a Flax network is written as PyTorch writes it, and read by Equinox.

    .venv/bin/python examples/pytorch_weights.py

The file is what `torch.nn.Sequential(Conv2d, ReLU, Conv2d, ReLU, Flatten, Linear)` takes in
`load_state_dict`. `runs/flax-digits` trains it; the Equinox network starts from the file.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
import tyro

from distaff import InitFrom, TorchRules, data, tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    num_epochs: int = 20
    root: str = "runs"


class FlaxNet(nn.Module):
    @nn.compact
    def __call__(self, image):  # [batch, height, width, channels]
        x = nn.relu(nn.Conv(16, (3, 3), 2, padding=1)(image))
        x = nn.relu(nn.Conv(32, (3, 3), 2, padding=1)(x))
        x = x.transpose(0, 3, 1, 2)  # PyTorch flattens images with their channels first
        return nn.Dense(10)(x.reshape(len(x), -1))


def equinox_net(key: jax.Array) -> eqx.nn.Sequential:
    first, second, last = jax.random.split(key, 3)
    relu, flat = eqx.nn.Lambda(jax.nn.relu), eqx.nn.Lambda(lambda x: x.reshape(-1))
    to_channels = eqx.nn.Lambda(lambda x: x.transpose(2, 0, 1))
    convs = eqx.nn.Conv2d(1, 16, 3, 2, 1, key=first), eqx.nn.Conv2d(16, 32, 3, 2, 1, key=second)
    linear = eqx.nn.Linear(128, 10, key=last)
    return eqx.nn.Sequential([to_channels, convs[0], relu, convs[1], relu, flat, linear])


def main(options: Options) -> dict[str, float]:
    train, val, test = data.digits(batch_size=64)
    flax = tasks.Classifier(FlaxNet(), name="flax-digits", root=options.root)
    flax.train_model(train, val, num_epochs=options.num_epochs)
    names = TorchRules({"0": "Conv_0", "2": "Conv_1", "5": "Dense_0"})
    path = flax.export_weights(f"{options.root}/digits.safetensors", rules=names)
    how = InitFrom(path, rules=TorchRules({"0": "layers/1", "2": "layers/3", "5": "layers/6"}))
    equinox = tasks.Classifier(equinox_net, init_from=how, example_batch=next(iter(train)))
    both = {"flax": flax, "equinox": equinox}
    scores = {name: trainer.eval_model(test)["accuracy"] for name, trainer in both.items()}
    print("test accuracy:", {name: round(score, 4) for name, score in scores.items()})
    return scores


if __name__ == "__main__":
    main(tyro.cli(Options))
