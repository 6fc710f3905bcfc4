"""What is measured: sizes, lengths and rows of each workload, and our settings for it."""

import dataclasses
from typing import Any, Literal

import numpy as np

from rlhf_jax.models.settings import Attention, Remat

Kind = Literal["sft", "reward", "generate", "ppo"]


@dataclasses.dataclass(frozen=True)
class Ours:
    """What we set for a workload, and any user can in a configuration.

    Attributes:
      remat: `model.remat`.
      attention: `model.attention`.
      gradient_accumulation_steps: of the section `sft`, `reward` or `ppo`.
      score_batch_size: `ppo.score_batch_size`.
    """

    remat: Remat = "dots"
    attention: Attention = "blocks"
    gradient_accumulation_steps: int = 1
    score_batch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Workload:
    """One line of the table.

    Attributes:
      name: as `--workloads` has it.
      kind: of the step.
      n_layer, n_embd, n_head, vocab_size, n_positions: of a GPT-2 with random weights.
      batch_size: rows, pairs, or prompts of a step.
      prompt_length, response_length: in tokens; no row is padded, and no token ends a response.
      num_layers_unfrozen: of `reward` in both libraries, of `ppo` in ours alone: TRL's PPO trains
        whole models.
      value_model: `ppo.value_model`; TRL's is a model of its own that starts as the reward model.
      num_ppo_epochs, num_mini_batches: of PPO in both.
      fixed_dtype: what both sides compute in; None where the command's settings choose.
      dropout: in supervised fine-tuning by both libraries, everywhere in the model; 0.1 is what
        both have by default. Elsewhere is none.
      has_peer: whether TRL is measured too.
      to_reach, towards: how many times faster than TRL the step is to be, and then is to become.
      peak_to_reach: which share of the measured peak its products are to reach.
      floor_to_reach: which share of its time the floor is to be.
      ours: our settings.
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
    vocab_size: int = 50257
    n_positions: int = 1024
    fixed_dtype: Literal["bfloat16"] | None = None
    dropout: float = 0.1
    has_peer: bool = True
    to_reach: float | None = None
    towards: float | None = None
    peak_to_reach: float | None = None
    floor_to_reach: float | None = None
    ours: Ours = Ours()

    @property
    def tokens(self) -> int:
        """Tokens of a step: new ones of `generate`, otherwise all, a pair's prompt once."""
        prompt = 0 if self.kind == "generate" else self.prompt_length
        responses = (2 if self.kind == "reward" else 1) * self.response_length
        return self.batch_size * (prompt + responses)


_MID = {"n_layer": 6, "n_embd": 512, "n_head": 8}
_SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12}


def _of(name: str, sizes: dict[str, int], rows: tuple[int, int, int], **others: Any) -> Workload:
    """A workload; `rows` are their number, the prompt's length and the response's."""
    kind: Any = name.partition("_")[0]
    batch_size, prompt_length, response_length = rows
    return Workload(
        name,
        kind,
        batch_size=batch_size,
        prompt_length=prompt_length,
        response_length=response_length,
        **sizes,  # type: ignore[arg-type]
        **others,
    )


# Our settings stand at the end of each line.
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
    _of("generate_mid", _MID, (16, 32, 32), to_reach=2.3, towards=3.0, ours=Ours()),
    _of("generate_small", _SMALL, (16, 32, 48), to_reach=1.9, towards=2.4, ours=Ours()),
    # Four models, as TRL has: policy, reference, reward model and a value model of its own.
    _of(
        "ppo_mid",
        _MID,
        (16, 32, 32),
        value_model="reward",
        to_reach=1.35,
        towards=1.7,
        ours=Ours(score_batch_size=8),
    ),
    # The same task with what we have: one trunk for policy, reference and values.
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
)

_XL = {"n_layer": 48, "n_embd": 1600, "n_head": 25}
# cuDNN drops no weights of attention, and so both libraries drop nothing anywhere.
_FAST: dict[str, Any] = {"fixed_dtype": "bfloat16", "dropout": 0.0, "ours": Ours(attention="cudnn")}

# Sizes that keep a GPU busy, and of which either side is reckoned to fit into 80 GB by itself. None
# was measured yet.
GPU_WORKLOADS: tuple[Workload, ...] = (
    # All 1024 positions, of which all but the first are learned.
    _of("sft_gpu_small", _SMALL, (32, 1, 1023), peak_to_reach=0.5, **_FAST),
    # The state takes 25 GB, and activations of TRL's would take more than 50: ours alone.
    _of("sft_gpu_xl", _XL, (8, 1, 1023), peak_to_reach=0.6, has_peer=False, **_FAST),
    _of("generate_gpu_small", _SMALL, (256, 64, 128), floor_to_reach=0.5, **_FAST),
    # Four models, as TRL has.
    _of("ppo_gpu_small", _SMALL, (128, 64, 64), value_model="reward", to_reach=10.0, **_FAST),
    # The same task with one trunk.
    _of(
        "ppo_gpu_shared_small",
        _SMALL,
        (128, 64, 64),
        num_layers_unfrozen=2,
        to_reach=10.0,
        **_FAST,
    ),
)


def in_float32(workload: Workload) -> Workload:
    """The same work in float32 on any device, without its targets: what is checked."""
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
    """Random tokens, without the last two ids, which are TRL's padding and end of text.

    Returns:
      prompts i32[B, P], chosen and rejected i32[B, T], tokens i32[B, P + T] and loss_mask
      bool[B, P + T], which is True on the last T.
    """
    random, rows = np.random.default_rng(0), workload.batch_size
    lengths = {
        "prompts": workload.prompt_length,
        "chosen": workload.response_length,
        "rejected": workload.response_length,
        "tokens": workload.prompt_length + workload.response_length,
    }
    arrays = {
        name: random.integers(0, workload.vocab_size - 2, (rows, length)).astype(np.int32)
        for name, length in lengths.items()
    }
    learned = np.arange(lengths["tokens"]) >= workload.prompt_length
    return arrays | {"loss_mask": np.broadcast_to(learned, (rows, lengths["tokens"]))}


LEARNING_RATE = 1e-5


def make_request(workload: Workload, dtype: str) -> dict[str, Any]:
    """What both sides are asked for, ready for JSON."""
    return dataclasses.asdict(workload) | {
        "dtype": dtype,
        "learning_rate": LEARNING_RATE,
        "eos_token_id": workload.vocab_size - 1,
        "pad_token_id": workload.vocab_size - 2,
    }


def read_request(request: dict[str, Any]) -> tuple[Workload, str]:
    """(workload, dtype) of what `make_request` made."""
    names = [field.name for field in dataclasses.fields(Workload)]
    values = {name: request[name] for name in names}
    return Workload(**values | {"ours": Ours(**request["ours"])}), request["dtype"]
