"""The section `optimizer` of a configuration."""

import dataclasses
from typing import Literal

from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a warm-up, a decay and clipped gradients (Loshchilov and Hutter 2019).

    Attributes:
      learning_rate: after the warm-up.
      schedule: "constant", or a "linear" or "cosine" decay to 0 at the end of the run.
      warmup_steps: updates over which the learning rate rises linearly from 0.
      weight_decay: of matrices and embeddings; biases and layer norms do not decay.
      b1, b2, eps: Adam's. openai/lm-human-preferences uses eps = 1e-5.
      max_grad_norm: gradients with a larger global norm are scaled down to it; null leaves them.
    """

    learning_rate: float = 5e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise InputError(
                f"optimizer.learning_rate must not be negative, but is {self.learning_rate}."
            )
        if self.warmup_steps < 0:
            raise InputError(
                f"optimizer.warmup_steps must not be negative, but is {self.warmup_steps}."
            )
        if self.weight_decay < 0 or self.eps <= 0:
            raise InputError(
                "optimizer.weight_decay must not be negative and optimizer.eps must be above 0, "
                f"but are {self.weight_decay} and {self.eps}."
            )
        for name, value in (("b1", self.b1), ("b2", self.b2)):
            if not 0 <= value < 1:
                raise InputError(
                    f"optimizer.{name} must be at least 0 and below 1, but is {value}."
                )
        if self.schedule not in ("constant", "linear", "cosine"):
            raise InputError(
                f"optimizer.schedule must be constant, linear or cosine, but is {self.schedule!r}."
            )
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise InputError(
                f"optimizer.max_grad_norm must be above 0, but is {self.max_grad_norm}."
            )
