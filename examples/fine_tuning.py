"""Fine-tuning: a network that knows ten digits learns to tell odd ones from even ones.

    .venv/bin/python examples/fine_tuning.py

The second run takes the body of the first, freezes it, and trains a new head on 100 images. The
Keras form takes 21 lines.
"""

from __future__ import annotations

import flax.linen as nn
import tyro

from distaff import InitFrom, OptimizerConfig, data, optim, tasks, zoo


class Net(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, image, train=True):
        features = zoo.MLP((64, 32), name="body")(image, train)
        return nn.Dense(self.classes, name="head")(nn.relu(features))


def main(num_epochs: int = 30, root: str = "runs") -> float:
    train, val, test = data.digits()
    digits = tasks.Classifier(Net(10), name="all-digits", root=root)
    source = digits.train_model(train, val, num_epochs=num_epochs).path
    body = InitFrom(source, only="body/*", unused="ignore")
    groups = (optim.ParamGroup("body/*", freeze=True),)
    frozen = OptimizerConfig("adamw", learning_rate=3e-2, groups=groups)
    few, *others = ((part.arrays["image"], part.arrays["label"] % 2) for part in (train, val, test))
    few = few[0][:100], few[1][:100]
    parity = tasks.Classifier(Net(2), init_from=body, optimizer=frozen, name="parity", root=root)
    result = parity.train_model(few, *others, num_epochs=num_epochs)
    print(f"odd or even, from 100 images: test accuracy {result.metrics['test/accuracy']:.4f}")
    return result.metrics["test/accuracy"]


if __name__ == "__main__":
    tyro.cli(main)
