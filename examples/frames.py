"""A data frame: prices of flats from numbers and a city, with a network that embeds the city.

    .venv/bin/python examples/frames.py

It needs `pip install pandas`. The model keeps the coding of the columns: the loaded one reads a new
frame, with its columns in any order.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from distaff import OptimizerConfig, data, metrics, tasks, zoo

FACTORS = {"Bonn": 1.0, "Oslo": 1.6, "Rome": 1.3}


class Prices(nn.Module):
    num_cities: int

    @nn.compact
    def __call__(self, x, train=True):
        city = nn.Embed(self.num_cities, 4)(x["city"])
        return zoo.MLP((32, 1))(jnp.concatenate([x["numbers"], city], axis=1), train)


def flats(number: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"area": rng.uniform(30, 150, number)})
    frame["rooms"] = (frame["area"] / 30 + rng.uniform(1, 2, number)).astype(int)
    frame["city"] = rng.choice(list(FACTORS), number)
    base = 2 * frame["area"] + 10 * frame["rooms"]
    frame["price"] = base * frame["city"].map(FACTORS) + rng.normal(0, 10, number)
    return frame


def main(num_epochs: int = 50, root: str = "runs") -> float:
    table = data.from_frame(flats(1000, seed=0), target=["price"])
    train, val = data.split(table, (0.8, 0.2), seed=0)
    model = Prices(len(table.coding.categories["city"]))
    scale, adamw = data.Standardize.fit(train), OptimizerConfig("adamw", learning_rate=0.1)
    trainer = tasks.Regressor(
        model, coding=table.coding, standardize=scale, optimizer=adamw, name="flats", root=root
    )
    path = trainer.train_model(train, val, num_epochs=num_epochs).path
    new = flats(200, seed=1)
    prices = tasks.Regressor.load_from_checkpoint(path).predict(new.drop(columns="price"))
    score = metrics.R2.per_example(new["price"].to_numpy(), prices[:, 0]).compute()
    print(f"R2 {score:.4f} of {len(new)} new flats")
    return score


if __name__ == "__main__":
    tyro.cli(main)
