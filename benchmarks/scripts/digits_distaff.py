"""The handwritten digits with Distaff: an MLP for 20 epochs."""

import sys

from distaff import OptimizerConfig, data, tasks, zoo

train, val, test = data.digits(batch_size=64)
trainer = tasks.Classifier(
    zoo.MLP((128, 10)),
    optimizer=OptimizerConfig("adam", learning_rate=1e-3),
    root=sys.argv[1],
)
result = trainer.train_model(train, val, test, num_epochs=20)
print(result.metrics["test/accuracy"])
