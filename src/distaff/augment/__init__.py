"""Augmentation: random changes of pictures on the device, inside the training step.

Each function takes a random key and pictures `[batch, height, width, channels]`, and samples
independently for each picture. Shapes are static and dtypes are preserved, so all functions work
under `jax.jit`. Samples depend on the key alone; `TrainerModule.augment` gets the key of a step.
"""

from __future__ import annotations

from distaff.augment.boxes import cutout
from distaff.augment.color import color_jitter
from distaff.augment.geometry import random_crop, random_flip
from distaff.augment.mixing import cutmix, mixup

__all__ = ["color_jitter", "cutmix", "cutout", "mixup", "random_crop", "random_flip"]
