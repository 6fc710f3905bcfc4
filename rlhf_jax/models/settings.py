"""Settings of models, without an import of JAX."""

import dataclasses
from typing import Literal, get_args

from rlhf_jax.errors import InputError

Remat = Literal["none", "full", "dots"]
Attention = Literal["blocks", "cudnn"]


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The section `model`: where the parameters come from, or the sizes of a fresh GPT-2.

    Attributes:
      path: a Hugging Face folder or hub name to start from; null makes a fresh model.
      reward_path: likewise for the reward model that scores responses; PPO and evaluation read it.
      reference_path: likewise for the policy that evaluation compares with.
      value_path: likewise for the reward model that PPO's value model starts from, with
        `ppo.value_model: reward`; null takes the one at `reward_path`.
      n_layer, n_head, n_embd, n_positions: of a fresh model.
      dropout: of a fresh model, in supervised fine-tuning alone.
      dtype: of products; "auto" is bfloat16 on accelerators and float32 on the CPU.
      remat: what the backward pass of training computes again instead of keeping it, to save
        memory: "dots", norms and activations; "full", all of each layer but its input; "none".
      attention: what computes it but for single tokens of decoding: "blocks", this library on any
        device, or "cudnn" on an NVIDIA GPU, in bfloat16 and without dropout of its weights.
    """

    path: str | None = None
    reward_path: str | None = None
    reference_path: str | None = None
    value_path: str | None = None
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    n_positions: int = 256
    dropout: float = 0.1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Remat = "dots"
    attention: Attention = "blocks"

    def __post_init__(self) -> None:
        check_remat("model.remat", self.remat)
        check_attention("model.attention", self.attention)
        if self.attention == "cudnn" and self.dtype != "auto":
            check_cudnn_dtype(self.dtype)
        if not 0 <= self.dropout < 1:
            raise InputError(
                f"model.dropout must be at least 0 and below 1, but is {self.dropout}."
            )


def check_remat(name: str, remat: str) -> None:
    """Raises an InputError that names the setting if the rematerialization is unknown."""
    _check_choice(name, remat, get_args(Remat))


def check_attention(name: str, attention: str) -> None:
    """Raises an InputError that names the setting if the attention is unknown."""
    _check_choice(name, attention, get_args(Attention))


def _check_choice(name, value, allowed):
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, but is {value!r}.")


def check_cudnn_dtype(dtype: str) -> None:
    """Raises an InputError if cuDNN has no kernel in that dtype."""
    if dtype not in ("bfloat16", "float16"):
        raise InputError(
            f"The attention cudnn needs the dtype bfloat16 or float16, but it is {dtype}; set "
            "model.dtype to bfloat16, or model.attention to blocks."
        )
