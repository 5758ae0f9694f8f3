"""The option `precision`, and its exceptions."""

from __future__ import annotations

import dataclasses
from dataclasses import KW_ONLY
from typing import Any, Literal, TypeAlias, get_args

import jax.numpy as jnp

from distaff.core.config.argument import Argument
from distaff.core.config.options import Options, check_choice, option
from distaff.errors import ConfigError

PrecisionName: TypeAlias = Literal["float32", "bf16", "bf16-params", "fp16"]

MomentsName: TypeAlias = Literal["float32", "bfloat16"]
SumsName: TypeAlias = Literal["float32", "half"]

MatmulPrecision: TypeAlias = Literal[
    "default", "high", "highest", "bfloat16", "tensorfloat32", "float32"
]

_COMPUTE = {
    "float32": None,
    "bf16": jnp.bfloat16,
    "bf16-params": jnp.bfloat16,
    "fp16": jnp.float16,
}


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """The dtypes of a model's products, with exceptions.

    Args:
        name: `"float32"`, or `"bf16"` to compute matrix products and convolutions of the forward
            and the backward pass in bfloat16. Parameters, optimizer, losses, softmax, statistics
            of norm layers and metrics stay in float32. `"fp16"` computes them in float16, with a
            dynamic loss scale. `"bf16-params"` also stores the parameters in bfloat16, with a
            float32 copy in the optimizer's state.
        float32: shell patterns for the paths of parameters, such as `"head/*"`, whose products
            stay in float32. Under `"bf16-params"` they are also stored in float32.
        moments: dtype in which the optimizer stores both moments of Adam, `"float32"` or
            `"bfloat16"`.
        matmul_precision: how an accelerator computes the products of the model that stay in
            float32, such as `"highest"`; see `jax.default_matmul_precision`. None for JAX's
            setting.
        loss_scale: the loss scale of the first step for `"fp16"`, a power of two.
        gradient_sums: dtype in which the devices of a mesh add up the gradients of matrix products,
            `"float32"` or `"half"` for that of the products. In float32, the products have no
            forward-mode derivative (`jax.jvp`). Convolutions always use that of the products.

    Raises:
        ConfigError: a value is unknown or out of range, or `float32` is not a tuple of patterns.
    """

    name: PrecisionName = "bf16"
    _: KW_ONLY
    float32: tuple[str, ...] = ()
    moments: MomentsName = "float32"
    matmul_precision: MatmulPrecision | None = None
    loss_scale: float = 2.0**24
    gradient_sums: SumsName = "float32"

    def __post_init__(self) -> None:
        check_choice("The name of a PrecisionConfig", self.name, PrecisionName)
        check_choice("moments", self.moments, MomentsName)
        check_choice("gradient_sums", self.gradient_sums, SumsName)
        if self.matmul_precision is not None:
            check_choice("matmul_precision", self.matmul_precision, MatmulPrecision)
        is_sequence = isinstance(self.float32, tuple | list)
        if not is_sequence or not all(isinstance(each, str) and each for each in self.float32):
            raise ConfigError(
                "float32 of a PrecisionConfig must be a tuple of patterns for the paths of "
                f"parameters, such as ('head/*',); got {self.float32!r}."
            )
        object.__setattr__(self, "float32", tuple(self.float32))
        if self.loss_scale not in [2.0**power for power in range(41)]:
            raise ConfigError(
                f"loss_scale must be a power of two from 1 to 2**40; got {self.loss_scale!r}. A "
                "product with a power of two is exact."
            )

    @property
    def compute(self) -> Any:
        """The dtype of products; None to leave each as the model has it."""
        return _COMPUTE[self.name]

    @property
    def params(self) -> Any:
        """The dtype of stored parameters; None to leave each as the model has it."""
        return jnp.bfloat16 if self.name == "bf16-params" else None

    @property
    def is_scaled(self) -> bool:
        """Whether training needs a loss scale."""
        return self.name == "fp16"

    @property
    def is_off(self) -> bool:
        """Whether the model runs as it is."""
        return self.compute is None and self.matmul_precision is None


_ELSEWHERE = {
    **dict.fromkeys(("bfloat16", "mixed_bfloat16", "bf16-mixed"), "bf16"),
    **dict.fromkeys(("float16", "mixed_float16", "16-mixed", "f16"), "fp16"),
    **dict.fromkeys(("32-true", "fp32", "f32"), "float32"),
    "bf16-true": "bf16-params",
}
"""Names of Keras and Lightning, and what to write instead."""


def as_precision(name: str, value: Any) -> Any:
    """Checks that a value is the name of a precision, or a `PrecisionConfig`."""
    if isinstance(value, PrecisionConfig):
        return value
    if not isinstance(value, str):
        raise ConfigError(
            f"{name} must be one of {', '.join(map(repr, get_args(PrecisionName)))}, or a "
            f"distaff.PrecisionConfig; got {value!r}."
        )
    if value in _ELSEWHERE:
        raise ConfigError(f"{name} has no value {value!r}. Write {name}={_ELSEWHERE[value]!r}.")
    return check_choice(name, value, PrecisionName)


def precision_of(value: PrecisionName | PrecisionConfig) -> PrecisionConfig:
    """Returns the `PrecisionConfig` of an option."""
    return value if isinstance(value, PrecisionConfig) else PrecisionConfig(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionOptions(Options):
    """The dtypes in which a model computes."""

    precision: Argument[PrecisionName | PrecisionConfig] = option(
        "float32",
        """Dtype of the model's matrix products and convolutions, forward and backward; "bf16"
        computes them in bfloat16 and keeps all else in float32; "fp16" in float16, with a dynamic
        loss scale; "bf16-params" also stores the parameters in bfloat16, with a float32 copy in
        the optimizer. A `PrecisionConfig` makes exceptions.""",
        check=as_precision,
    )
