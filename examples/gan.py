"""A GAN on a ring of eight Gaussians: two networks and two optimizers, in a step of your own.

.venv/bin/python examples/gan.py    # leaves runs/gan/<version>/images: the samples over training
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import distaff
from distaff import data, optim, zoo

RING = zoo.GaussianRing(modes=8, radius=2.0, sigma=0.05)


class Networks(nn.Module):
    @nn.compact
    def __call__(self, noise, real):
        fake = zoo.MLP((128, 128, 2), name="generator")(noise)
        discriminator = zoo.MLP((128, 128, 1), name="discriminator")
        return fake, discriminator(fake)[:, 0], discriminator(real)[:, 0]


class GAN(distaff.TrainerModule):
    monitor = distaff.Monitor("val/rarest_mode", "max")
    picture = np.ones((160, 0))

    def model_inputs(self, batch):
        return batch  # (noise, real)

    def create_functions(self):
        def train_step(state, batch):
            def game(params):  # relativistic pairs (arXiv:1807.00734) with R1 (arXiv:1801.04406)
                noise, real = batch
                judge = functools.partial(state.apply_fn, {"params": params}, noise)
                _, of_fake, of_real = judge(real)
                slopes = jax.grad(lambda points: judge(points)[2].sum())(real)
                return (nn.softplus(of_fake - of_real) + jnp.square(slopes).sum(axis=1) / 2).mean()

            loss, grads = jax.value_and_grad(game)(state.params)  # what one network wins,
            grads["generator"] = jax.tree.map(jnp.negative, grads["generator"])  # the other loses
            return state.apply_gradients(grads=grads), {"loss": loss}

        def eval_step(state, batch):
            return RING.coverage(state.apply_fn({"params": state.params}, *batch)[0])

        return train_step, eval_step

    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        counts, *_ = np.histogram2d(*self.predict(val_loader)[0].T, 160, [(-2.5, 2.5)] * 2)
        self.picture = np.hstack([self.picture, np.minimum(counts, 1), np.ones((160, 4))])
        self.last_run.logger.log_image("samples", self.picture, step=self.step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    num_epochs: int = 200
    seed: int = 0


def main(options: Options) -> distaff.TrainResult:
    noise, real = np.random.default_rng(0).normal(size=(32_000, 4)), RING.sample(32_000, seed=1)
    train = data.ArrayLoader((noise[8000:], real[8000:]), 256, shuffle=True, seed=options.seed)
    val, test = (data.ArrayLoader((noise[i:][:4000], real[i:][:4000]), 4000) for i in (0, 4000))
    adam = distaff.OptimizerConfig("adam", options={"b1": 0.0, "b2": 0.99})
    both = dataclasses.replace(adam, groups=(optim.ParamGroup("discriminator/*", optimizer=adam),))
    every = max(1, options.num_epochs // 5)
    trainer = GAN(Networks(), optimizer=both, seed=options.seed, check_val_every_n_epoch=every)
    result = trainer.train_model(train, val, test, num_epochs=options.num_epochs)
    print(result.status, {name: x for name, x in result.metrics.items() if "test/" in name})
    return result


if __name__ == "__main__":
    main(tyro.cli(Options))
