"""Transfer: linear probes that find out what the codes of an autoencoder know of the digits.

    .venv/bin/python examples/linear_probe.py --autoencoder runs/autoencoder/0003

It needs a run of `examples/autoencoder.py`. Two probes, `runs/random-probe` and
`runs/trained-probe`, stand on frozen encoders. The last has `accuracy.png`, beside two baselines.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import tyro
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distaff import Monitor, OptimizerConfig, data, optim, tasks, zoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    autoencoder: str = "runs/autoencoder/0003"
    num_epochs: int = 100
    root: str = "runs"


class Probe(nn.Module):
    encoder: nn.Module

    @nn.compact
    def __call__(self, image):
        return nn.Dense(10, name="head")(self.encoder(image))


class Probing(tasks.Classifier):
    monitor = Monitor("val/loss")  # 180 examples: the accuracy is too coarse to choose by
    encoder_params: Any = None  # without, the encoder stays as random as it began

    def run_model_init(self, example_batch, key):
        variables = super().run_model_init(example_batch, key)
        encoder = self.encoder_params or variables.params["encoder"]
        return variables._replace(params={**variables.params, "encoder": encoder})


def regression(loaders: tuple[data.ArrayLoader, ...], *steps: Any) -> float:
    train, _, test = ((x.arrays["image"].reshape(-1, 64), x.arrays["label"]) for x in loaders)
    pipeline = make_pipeline(*steps, StandardScaler(), LogisticRegression(max_iter=5000))
    return pipeline.fit(*train).score(*test)


def main(options: Options) -> dict[str, float]:
    loaders = data.digits(batch_size=32)
    trained = tasks.Autoencoder.load_from_checkpoint(options.autoencoder, zoo.MLPAutoencoder)
    encoder, variables = trained.bind_model().encoder.unbind()
    frozen = optim.ParamGroup("encoder/*", freeze=True)
    adam = OptimizerConfig("adam", learning_rate=3e-2, groups=(frozen,))
    scores = {}
    for name, params in {"random": None, "trained": variables["params"]}.items():
        trainer = Probing(Probe(encoder), optimizer=adam, name=f"{name}-probe", root=options.root)
        trainer.encoder_params = params
        result = trainer.train_model(*loaders, num_epochs=options.num_epochs)
        if result.status == "interrupted":
            raise SystemExit(130)  # as Ctrl-C ends a program; run it again to resume
        scores[f"{name} encoder"] = result.metrics["test/accuracy"]
    scores |= {"PCA": regression(loaders, PCA(encoder.features[-1])), "pixels": regression(loaders)}
    axes = Figure(figsize=(5, 2), layout="constrained").subplots()
    axes.bar_label(axes.barh([*scores], [*scores.values()]), fmt="%.3f")
    axes.set(xlabel="test accuracy", xlim=(0, 1.15))
    axes.figure.savefig(result.path / "accuracy.png")
    print("test accuracy:", {name: round(score, 4) for name, score in scores.items()})
    return scores


if __name__ == "__main__":
    main(tyro.cli(Options))
