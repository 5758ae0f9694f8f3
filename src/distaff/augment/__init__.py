"""Augmentation: random changes of pictures on the device, inside the training step.

Each function takes a random key and pictures `[batch, height, width, channels]`, and draws for each
picture anew. Shapes are static and dtypes are kept, so that all of them run under `jax.jit`. What
is drawn depends on the key alone; `TrainerModule.augment` is given the key of a step.
"""

from __future__ import annotations

from distaff.augment.boxes import cutout
from distaff.augment.color import color_jitter
from distaff.augment.geometry import random_crop, random_flip
from distaff.augment.mixing import cutmix, mixup

__all__ = ["color_jitter", "cutmix", "cutout", "mixup", "random_crop", "random_flip"]
