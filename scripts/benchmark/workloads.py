"""The workloads: model and batch sizes, lengths, and the settings of this library."""

import dataclasses
from typing import Any, Literal

import numpy as np

from rlhf_jax.models.settings import Attention, Remat

Kind = Literal["sft", "reward", "dpo", "generate", "ppo", "grpo"]


@dataclasses.dataclass(frozen=True)
class Ours:
    """The settings of this library for a workload, all of them settings of a configuration.

    Attributes:
      remat: `model.remat`.
      attention: `model.attention`.
      gradient_accumulation_steps: of the section `sft`, `reward`, `dpo`, `ppo` or `grpo`.
      score_batch_size: `ppo.score_batch_size`.
    """

    remat: Remat = "dots"
    attention: Attention = "blocks"
    gradient_accumulation_steps: int = 1
    score_batch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Llama:
    """The sizes and the weights that a Llama has beside the sizes of a GPT-2.

    Attributes:
      num_key_value_heads, intermediate_size, rope_theta, rms_norm_eps: as in config.json.
      path: the folder of its weights, for both sides; with None each side has random weights.
    """

    num_key_value_heads: int
    intermediate_size: int
    rope_theta: float
    rms_norm_eps: float
    path: str | None = None


@dataclasses.dataclass(frozen=True)
class Workload:
    """One line of the table.

    Attributes:
      name: its name in `--workloads`.
      kind: of the step.
      n_layer, n_embd, n_head, vocab_size, n_positions: of the model.
      llama: of a Llama with tied embeddings; None is a GPT-2 with random weights.
      batch_size: texts, pairs, or prompts of a step.
      prompt_length, response_length: in tokens, without padding; no token ends a response.
      num_layers_unfrozen: of `reward` in both libraries, of `ppo` in this one; TRL's PPO trains all
        layers.
      value_model: `ppo.value_model`; that of TRL is a separate model that starts as the reward
        model.
      num_ppo_epochs, num_mini_batches: of PPO in both libraries.
      num_generations: responses to each prompt of `grpo`; None is one.
      fixed_dtype: the compute dtype of both sides; None if the settings of the command choose it.
      dropout: of supervised fine-tuning in both libraries, whose default is 0.1; other steps have
        none.
      greedy: whether a generation takes the most likely tokens; otherwise it samples.
      has_peer: whether TRL is measured too.
      to_reach, towards: target ratios of TRL's time to that of this library, a first and a later.
      peak_to_reach: target share of the measured peak rate.
      floor_to_reach: target share of the roofline bound in the time of a step.
      ours: the settings of this library.
    """

    name: str
    kind: Kind
    n_layer: int
    n_embd: int
    n_head: int
    batch_size: int
    prompt_length: int
    response_length: int
    num_layers_unfrozen: int | None = None
    value_model: Literal["shared", "reward"] = "shared"
    num_ppo_epochs: int = 4
    num_mini_batches: int = 2
    num_generations: int | None = None
    vocab_size: int = 50257
    n_positions: int = 1024
    llama: Llama | None = None
    fixed_dtype: Literal["bfloat16"] | None = None
    dropout: float = 0.1
    greedy: bool = False
    has_peer: bool = True
    to_reach: float | None = None
    towards: float | None = None
    peak_to_reach: float | None = None
    floor_to_reach: float | None = None
    ours: Ours = Ours()

    @property
    def cached_width(self) -> int:
        """Numbers of the keys of one position in one layer."""
        heads = self.n_head if self.llama is None else self.llama.num_key_value_heads
        return heads * (self.n_embd // self.n_head)

    @property
    def tokens(self) -> int:
        """Tokens of a step: new tokens of `generate`, otherwise all, the prompt of a pair once."""
        prompt = 0 if self.kind == "generate" else self.prompt_length
        responses = 2 if self.kind in ("reward", "dpo") else self.num_generations or 1
        return self.batch_size * (prompt + responses * self.response_length)


_MID = {"n_layer": 6, "n_embd": 512, "n_head": 8}
_SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12}

# SmolLM2-135M.
_SMOLLM2 = {"n_layer": 30, "n_embd": 576, "n_head": 9, "vocab_size": 49152, "n_positions": 8192}
_DECODER: dict[str, Any] = {"llama": Llama(3, 1536, 100_000.0, 1e-5), "dropout": 0.0}


def _of(name: str, sizes: dict[str, int], batch: tuple[int, int, int], **others: Any) -> Workload:
    """A workload; `batch` is (batch size, prompt length, response length)."""
    kind: Any = name.partition("_")[0]
    batch_size, prompt_length, response_length = batch
    return Workload(
        name,
        kind,
        batch_size=batch_size,
        prompt_length=prompt_length,
        response_length=response_length,
        **sizes,  # type: ignore[arg-type]
        **others,
    )


WORKLOADS: tuple[Workload, ...] = (
    _of("sft_mid", _MID, (4, 192, 32), to_reach=1.8, towards=2.2, ours=Ours()),
    _of("sft_small", _SMALL, (2, 448, 48), to_reach=1.5, towards=1.9, ours=Ours()),
    _of("reward_mid", _MID, (4, 192, 32), to_reach=1.5, towards=1.8, ours=Ours()),
    _of("reward_small", _SMALL, (2, 448, 48), to_reach=1.6, towards=2.0, ours=Ours()),
    # 70 % of the layers, round(0.7 * 12) = 8, are frozen.
    _of(
        "reward_frozen_small",
        _SMALL,
        (2, 448, 48),
        num_layers_unfrozen=4,
        to_reach=2.5,
        towards=3.0,
        ours=Ours(),
    ),
    _of("dpo_mid", _MID, (4, 192, 32), to_reach=2.5, ours=Ours()),
    _of("dpo_small", _SMALL, (2, 448, 48), to_reach=2.2, ours=Ours()),
    _of("generate_mid", _MID, (16, 32, 32), to_reach=2.3, towards=3.0, ours=Ours()),
    _of("generate_small", _SMALL, (16, 32, 48), to_reach=1.9, towards=2.4, ours=Ours()),
    # Four models as in TRL: policy, reference, reward model and a separate value model.
    _of(
        "ppo_mid",
        _MID,
        (16, 32, 32),
        value_model="reward",
        to_reach=1.35,
        towards=1.7,
        ours=Ours(score_batch_size=8),
    ),
    # The same task with frozen lower layers shared by policy, reference and values.
    _of(
        "ppo_shared_mid",
        _MID,
        (16, 32, 32),
        num_layers_unfrozen=2,
        to_reach=3.5,
        towards=4.5,
        ours=Ours(score_batch_size=8),
    ),
    _of(
        "ppo_shared_small",
        _SMALL,
        (16, 32, 48),
        num_layers_unfrozen=2,
        to_reach=5.0,
        towards=8.0,
        ours=Ours(score_batch_size=8),
    ),
    # One update an iteration, no reference, and a reward that takes no time: as TRL's defaults.
    _of("grpo_mid", _MID, (4, 192, 32), num_generations=8, to_reach=3.0, towards=5.0, ours=Ours()),
    _of("sft_smollm2", _SMOLLM2, (2, 448, 64), to_reach=1.25, towards=1.5, **_DECODER),
    _of("generate_smollm2", _SMOLLM2, (16, 128, 64), to_reach=1.5, greedy=True, **_DECODER),
)

_XL = {"n_layer": 48, "n_embd": 1600, "n_head": 25}
# cuDNN's attention has no dropout, and so neither library has any.
_FAST: dict[str, Any] = {"fixed_dtype": "bfloat16", "dropout": 0.0, "ours": Ours(attention="cudnn")}

# Sizes that use a GPU fully; each side alone is estimated to fit into 80 GB.
GPU_WORKLOADS: tuple[Workload, ...] = (
    # All 1024 positions, all but the first of them targets.
    _of("sft_gpu_small", _SMALL, (32, 1, 1023), peak_to_reach=0.5, **_FAST),
    # The state takes 25 GB, and the activations of TRL would take more than 50.
    _of("sft_gpu_xl", _XL, (8, 1, 1023), peak_to_reach=0.6, has_peer=False, **_FAST),
    _of("generate_gpu_small", _SMALL, (256, 64, 128), floor_to_reach=0.5, **_FAST),
    # Four models as in TRL.
    _of("ppo_gpu_small", _SMALL, (128, 64, 64), value_model="reward", to_reach=10.0, **_FAST),
    # The same task with shared frozen layers.
    _of(
        "ppo_gpu_shared_small",
        _SMALL,
        (128, 64, 64),
        num_layers_unfrozen=2,
        to_reach=10.0,
        **_FAST,
    ),
)


def with_weights(workload: Workload, path: str | None) -> Workload:
    """The same workload with the weights of a folder, if its model is a Llama."""
    if workload.llama is None:
        return workload
    return dataclasses.replace(workload, llama=dataclasses.replace(workload.llama, path=path))


def in_float32(workload: Workload) -> Workload:
    """The same workload in float32 for any device, without targets, for the checks."""
    return dataclasses.replace(
        workload,
        fixed_dtype=None,
        dropout=0.1,
        has_peer=True,
        peak_to_reach=None,
        floor_to_reach=None,
        ours=dataclasses.replace(workload.ours, attention="blocks"),
    )


def make_arrays(workload: Workload) -> dict[str, np.ndarray]:
    """Random tokens below the last two ids, which are the padding and the end of text of TRL.

    Returns:
      prompts i32[B, P], chosen and rejected i32[B, T], tokens i32[B, P + T] and loss_mask
      bool[B, P + T], which is True on the last T.
    """
    random, batch_size = np.random.default_rng(0), workload.batch_size
    lengths = {
        "prompts": workload.prompt_length,
        "chosen": workload.response_length,
        "rejected": workload.response_length,
        "tokens": workload.prompt_length + workload.response_length,
    }
    arrays = {
        name: random.integers(0, workload.vocab_size - 2, (batch_size, length)).astype(np.int32)
        for name, length in lengths.items()
    }
    mask = np.arange(lengths["tokens"]) >= workload.prompt_length
    return arrays | {"loss_mask": np.broadcast_to(mask, (batch_size, lengths["tokens"]))}


LEARNING_RATE = 1e-5


def make_request(workload: Workload, dtype: str) -> dict[str, Any]:
    """The request to a side, ready for JSON."""
    return dataclasses.asdict(workload) | {
        "dtype": dtype,
        "learning_rate": LEARNING_RATE,
        "eos_token_id": workload.vocab_size - 1,
        "pad_token_id": workload.vocab_size - 2,
    }


def read_request(request: dict[str, Any]) -> tuple[Workload, str]:
    """(workload, dtype) of a request."""
    names = [field.name for field in dataclasses.fields(Workload)]
    values = {name: request[name] for name in names}
    values["ours"] = Ours(**request["ours"])
    if request["llama"] is not None:
        values["llama"] = Llama(**request["llama"])
    return Workload(**values), request["dtype"]
