"""Settings of adapters, without an import of JAX."""

import dataclasses
from typing import Literal

from rlhf_jax.checks import FractionBelowOne, PositiveFloat, PositiveInt, check_fields
from rlhf_jax.errors import InputError

Base = Literal["float32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The section `lora`: adapters that are trained in the place of a language model's parameters.

    Names are PEFT's. The base is frozen: it has neither gradients nor a state of the optimizer, and
    is the reference with the adapters off.

    Attributes:
      r: the rank of the adapters; null trains without any.
      alpha: the adapters' products are scaled by alpha / r.
      dropout: of the inputs of adapters, in supervised fine-tuning alone.
      target_modules: names of modules in the layers, or their last parts, such as q_proj; or
        all-linear.
      layers_to_transform: the layers that have adapters, from 0; an empty list means all.
      modules_to_save: modules that are trained in full and kept beside the adapters.
      use_rslora: scales by alpha / sqrt(r) (Kalajdzievski 2023; arXiv:2312.03732).
      use_dora: trains the norms of the kernels' columns apart from their directions (Liu et al.
        2024, DoRA; arXiv:2402.09353).
      init: "default", A uniform and B zero; or "pissa", both from the largest singular values of
        the kernel, which is then reduced by their product (Meng et al. 2024; arXiv:2404.02948).
      base: the type in which frozen kernels and embeddings are kept; "int8" is that of kernels,
        with a scale for each output, and leaves embeddings in bfloat16.
    """

    r: PositiveInt | None = None
    alpha: PositiveFloat = 32.0
    dropout: FractionBelowOne = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    layers_to_transform: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    init: Literal["default", "pissa"] = "default"
    base: Base = "float32"

    def __post_init__(self) -> None:
        check_fields("lora", self)
        if not self.target_modules:
            raise InputError(
                "lora.target_modules is empty: give names of modules such as [q_proj, v_proj], or "
                "[all-linear]."
            )
        if self.use_dora and self.dropout:
            raise InputError(
                f"lora.use_dora has no dropout, but lora.dropout is {self.dropout}; set it to 0."
            )
        if self.use_dora and self.base == "int8":
            raise InputError(
                "lora.use_dora needs the norms of the kernels, which lora.base int8 rounds; set "
                "lora.base to bfloat16, or lora.use_dora to false."
            )


def check_start(adapter_path: str | None, lora: LoraSettings) -> None:
    """Raises an InputError if settings of fresh adapters are given where there are none."""
    if adapter_path is not None and lora.r is not None:
        raise InputError(
            f"lora.r is {lora.r}, but training goes on with the adapters in model.adapter_path "
            f"{adapter_path}; leave lora.r out, or start from the run's hf/, which has them merged."
        )
    fields = dataclasses.fields(lora)
    changed = [each.name for each in fields if getattr(lora, each.name) != each.default]
    if adapter_path is not None:
        changed = [name for name in changed if name != "base"]
    if lora.r is None and changed:
        raise InputError(
            f"lora.{changed[0]} is given, but without lora.r there are no adapters; set it, such "
            "as to 16."
        )
