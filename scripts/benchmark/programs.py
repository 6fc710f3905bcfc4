"""A workload in this library: a public step, its state and its batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from rlhf_jax.backend import compiler_options
from rlhf_jax.batches import PairBatch, PromptBatch, TextBatch
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_config import DecoderConfig
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.models.huggingface import load_pretrained
from rlhf_jax.models.interface import Params
from rlhf_jax.models.rope import Rope
from rlhf_jax.rollout.generation import generate
from rlhf_jax.training import dpo, grpo, ppo, reward, sft
from rlhf_jax.training.reward import init_params as init_reward
from rlhf_jax.training.state import OptimizerSettings, make_optimizer
from scripts.benchmark.workloads import LEARNING_RATE, Llama, Workload


class Program(NamedTuple):
    """A workload before compilation.

    Attributes:
      model: the language model.
      init: a function key -> state; pure unless it reads weights from a folder.
      step: a pure function (state, batch, key) -> output. The output is (next state, metrics, ...),
        or of a generation a `Rollout`.
      batch: NumPy arrays, as in a command.
      loss: the key of the loss in the metrics; None for generation.
      is_pure: whether `init` may be compiled.
    """

    model: GPT2 | Decoder
    init: Callable[[jax.Array], Any]
    step: Callable[[Any, Any, jax.Array], Any]
    batch: Any
    loss: str | None
    is_pure: bool = True

    @property
    def jitted(self) -> Any:
        """The step with the compiler options of the commands; it donates its state."""
        return jax.jit(
            self.step,
            donate_argnums=() if self.loss is None else 0,
            compiler_options=compiler_options(jax.default_backend()),
        )


def make_program(
    workload: Workload,
    arrays: Mapping[str, np.ndarray],
    dtype: str = "float32",
    *,
    optimizer: optax.GradientTransformation | None = None,
    dropout: bool = True,
) -> Program:
    """A workload in this library.

    Args:
      arrays: as from `make_arrays`.
      dtype: `model.dtype`.
      optimizer: by default AdamW with gradients clipped to a norm of 1, as in TRL.
      dropout: whether supervised fine-tuning has the dropout of the workload.
    """
    model = make_model(workload, dtype)
    optimizer = optimizer or make_optimizer(OptimizerSettings(learning_rate=LEARNING_RATE))
    if workload.kind == "sft":
        return _sft(workload, arrays, model, optimizer, dropout)
    if workload.kind == "reward":
        return _reward(workload, arrays, model, optimizer)
    if workload.kind == "dpo":
        return _dpo(workload, arrays, model, optimizer)
    if workload.kind == "generate":
        return _generate(workload, arrays, model)
    if workload.kind == "grpo":
        return _grpo(workload, arrays, model, optimizer)
    return _ppo(workload, arrays, model, optimizer)


def abstract(program: Program) -> tuple[Any, Any, Any]:
    """Shapes and dtypes of (state, batch, key)."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.batch)
    return jax.eval_shape(program.init, key), batch, key


def without_remat(workload: Workload) -> Workload:
    """The same workload without rematerialization, for any device."""
    ours = dataclasses.replace(workload.ours, remat="none", attention="blocks")
    return dataclasses.replace(workload, ours=ours)


def make_model(workload: Workload, dtype: str = "float32") -> GPT2 | Decoder:
    """The model of a workload, without parameters."""
    ours = workload.ours
    if workload.llama is not None:
        return Decoder(_decoder_config(workload, workload.llama), dtype, ours.remat, ours.attention)
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    config = GPT2Config(
        **{name: getattr(workload, name) for name in names},
        resid_pdrop=workload.dropout,
        embd_pdrop=workload.dropout,
        attn_pdrop=workload.dropout,
    )
    return GPT2(config, dtype, ours.remat, ours.attention)


def _decoder_config(workload: Workload, llama: Llama) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=workload.vocab_size,
        hidden_size=workload.n_embd,
        intermediate_size=llama.intermediate_size,
        num_hidden_layers=workload.n_layer,
        num_attention_heads=workload.n_head,
        num_key_value_heads=llama.num_key_value_heads,
        head_dim=workload.n_embd // workload.n_head,
        max_position_embeddings=workload.n_positions,
        rms_norm_eps=llama.rms_norm_eps,
        tie_word_embeddings=True,
        rope=Rope(llama.rope_theta),
    )


def _has_random_weights(workload: Workload) -> bool:
    return workload.llama is None or workload.llama.path is None


def _init_params(workload: Workload, model: GPT2 | Decoder, key: jax.Array) -> Params:
    """Random parameters, or those of the folder."""
    if workload.llama is None or workload.llama.path is None:
        return model.init(key)
    return load_pretrained(workload.llama.path)[1]


def _sft(workload, arrays, model, optimizer, dropout):
    settings = sft.Settings(
        batch_size=workload.batch_size,
        gradient_accumulation_steps=workload.ours.gradient_accumulation_steps,
        dropout=dropout and workload.dropout > 0,
    )
    tokens, loss_mask = arrays["tokens"], arrays["loss_mask"]
    # All sequences have the same number of targets.
    target_positions = np.nonzero(loss_mask)[1].reshape(len(tokens), -1).astype(np.int32)
    batch = TextBatch(tokens, np.ones_like(tokens), loss_mask, target_positions)

    def init(key):
        params = _init_params(workload, model, key)
        return sft.init_state(model, params, settings, key, optimizer=optimizer)

    step = sft.make_step(model, settings, optimizer=optimizer)
    return Program(model, init, step, batch, "train/loss", _has_random_weights(workload))


def _reward(workload, arrays, model, optimizer):
    settings = reward.Settings(
        batch_size=workload.batch_size,
        gradient_accumulation_steps=workload.ours.gradient_accumulation_steps,
        num_layers_unfrozen=workload.num_layers_unfrozen,
    )

    def init(key):
        return reward.init_state(model, model.init(key), settings, key, optimizer=optimizer)

    step = reward.make_step(model, settings, optimizer=optimizer)
    return Program(model, init, step, _pairs(arrays), "train/loss")


def _pairs(arrays):
    prompts, chosen, rejected = (arrays[name] for name in ("prompts", "chosen", "rejected"))
    margin: Any = np.zeros(len(prompts), np.float32)
    return PairBatch(
        prompts,
        _full_mask(prompts),
        chosen,
        _full_mask(chosen),
        rejected,
        _full_mask(rejected),
        margin,
        _full_mask(margin),
    )


def _dpo(workload, arrays, model, optimizer):
    """With log-probabilities of a reference that finds both responses equally likely."""
    settings = dpo.Settings(
        batch_size=workload.batch_size,
        gradient_accumulation_steps=workload.ours.gradient_accumulation_steps,
    )
    batch = _pairs(arrays)
    batch = batch._replace(ref_chosen=batch.margin, ref_rejected=batch.margin)

    def init(key):
        return dpo.init_state(model, model.init(key), settings, key, optimizer=optimizer)

    step = dpo.make_step(model, settings, optimizer=optimizer)
    return Program(model, init, step, batch, "train/loss")


def _generate(workload, arrays, model):
    prompts = arrays["prompts"]

    def step(params, batch, key):
        prompts, mask = batch
        return generate(
            model,
            params,
            prompts,
            mask,
            key,
            max_new_tokens=workload.response_length,
            temperature=0.0 if workload.greedy else 1.0,
            num_responses=workload.num_generations,
        )

    def init(key):
        return model.for_decoding(_init_params(workload, model, key))

    batch = prompts, _full_mask(prompts)
    return Program(model, init, step, batch, None, _has_random_weights(workload))


def ppo_settings(workload: Workload) -> ppo.Settings:
    """The section `ppo` of a configuration with the settings of a workload."""
    return ppo.Settings(
        batch_size=workload.batch_size,
        num_ppo_epochs=workload.num_ppo_epochs,
        num_mini_batches=workload.num_mini_batches,
        gradient_accumulation_steps=workload.ours.gradient_accumulation_steps,
        score_batch_size=workload.ours.score_batch_size,
        response_length=workload.response_length,
        num_layers_unfrozen=workload.num_layers_unfrozen,
        value_model=workload.value_model,
    )


def _ppo(workload, arrays, model, optimizer):
    settings, batch = ppo_settings(workload), _prompts(arrays)

    def init(key):
        policy_key, reward_key, head_key = jax.random.split(key, 3)
        scorer = init_reward(model, model.init(reward_key), head_key)
        params = model.init(policy_key)
        return ppo.init_state(
            model, params, settings, key, optimizer=optimizer, reward_params=scorer
        )

    step = ppo.make_step(model, settings, optimizer=optimizer)
    return Program(model, init, step, batch, "loss/policy_avg")


def _grpo(workload, arrays, model, optimizer):
    """With the share of odd tokens as the reward."""
    settings = grpo.Settings(
        batch_size=workload.batch_size,
        num_generations=workload.num_generations,
        gradient_accumulation_steps=workload.ours.gradient_accumulation_steps,
        score_batch_size=workload.ours.score_batch_size,
        response_length=workload.response_length,
    )
    sample = grpo.make_rollout_step(model, settings)
    update = grpo.make_update_step(model, settings, optimizer=optimizer)

    def init(key):
        return grpo.init_state(model, model.init(key), settings, key, optimizer=optimizer)

    def step(state, batch, key):
        sample_key, update_key = jax.random.split(key)
        rollout = sample(state, batch, sample_key)
        return update(state, batch, rollout, (rollout.tokens % 2).mean(axis=-1), update_key)

    return Program(model, init, step, _prompts(arrays), "train/loss")


def _prompts(arrays):
    prompts = arrays["prompts"]
    indices: Any = np.arange(len(prompts), dtype=np.int32)
    return PromptBatch(prompts, _full_mask(prompts), indices)


def _full_mask(tokens):
    return np.ones(tokens.shape, bool)
