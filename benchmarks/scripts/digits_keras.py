"""The handwritten digits with Keras on JAX: the same MLP, and the best weights in a file."""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

digits = load_digits()
images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
order = np.random.default_rng(0).permutation(len(labels))
train, val, test = np.split(order, [1257, 1437])
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)

model = keras.Sequential(
    [keras.Input((64,)), layers.Dense(128, activation="relu"), layers.Dense(10)]
)
model.compile(
    keras.optimizers.Adam(1e-3),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
best = folder / "best.weights.h5"
model.fit(
    images[train],
    labels[train],
    batch_size=64,
    epochs=20,
    validation_data=(images[val], labels[val]),
    callbacks=[
        keras.callbacks.CSVLogger(folder / "metrics.csv"),
        keras.callbacks.ModelCheckpoint(
            best, monitor="val_accuracy", mode="max", save_best_only=True, save_weights_only=True
        ),
    ],
)
model.load_weights(best)
print(model.evaluate(images[test], labels[test])[1])
