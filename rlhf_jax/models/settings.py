"""Settings of models, without an import of JAX."""

import dataclasses
from typing import Literal

from rlhf_jax.checks import FractionBelowOne, PositiveInt, check_fields
from rlhf_jax.errors import InputError

Remat = Literal["none", "full", "dots"]
Attention = Literal["blocks", "cudnn"]


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The section `model`: where the parameters come from, or the sizes of a fresh model.

    Attributes:
      path: a Hugging Face folder or hub name to start from; null makes a fresh model.
      adapter_path: a folder of an adapter in PEFT's format, on the model at `path`, with which
        training goes on.
      reward_path: folder or hub name of the reward model that scores responses.
      reference_path: folder or hub name of the policy that evaluation compares with, and of the
        reference of DPO and KTO, or an adapter on the model at `path`; null means the model that
        they begin with.
      value_path: folder or hub name of the reward model that PPO's value model starts from, with
        `ppo.value_model: reward`; null means `reward_path`.
      family: `model_type` of a fresh model, such as gpt2, llama, qwen3 or gemma3_text.
      n_layer, n_head, n_embd, n_positions: of a fresh model.
      dropout: of a fresh model, in supervised fine-tuning alone.
      dtype: of products; "auto" is bfloat16 on accelerators and float32 on the CPU.
      remat: values that the backward pass of training computes again instead of keeping them, to
        save memory: "dots", norms and activations; "full", all of each layer but its input; "none".
      attention: its implementation, except for single tokens in decoding: "blocks", on any device,
        or "cudnn" on an NVIDIA GPU, in bfloat16 and without dropout of its weights.
    """

    path: str | None = None
    adapter_path: str | None = None
    reward_path: str | None = None
    reference_path: str | None = None
    value_path: str | None = None
    family: str = "gpt2"
    n_layer: PositiveInt = 4
    n_head: PositiveInt = 4
    n_embd: PositiveInt = 128
    n_positions: PositiveInt = 256
    dropout: FractionBelowOne = 0.1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Remat = "dots"
    attention: Attention = "blocks"

    def __post_init__(self) -> None:
        check_fields("model", self)
        if self.adapter_path is not None and self.path is None:
            raise InputError(
                f"model.adapter_path is {self.adapter_path}, but there is no base for it: give "
                "--model.path the model that it was trained on."
            )
        if self.attention == "cudnn" and self.dtype != "auto":
            check_cudnn_dtype(self.dtype)


def check_cudnn_dtype(dtype: str) -> None:
    """Raises an InputError if cuDNN has no kernel in that dtype."""
    if dtype not in ("bfloat16", "float16"):
        raise InputError(
            f"The attention cudnn needs the dtype bfloat16 or float16, but it is {dtype}; set "
            "model.dtype to bfloat16, or model.attention to blocks."
        )
