"""The compiled steps of a stage without its parameters, its data and its devices.

The steps, shardings and donations are those of `runtime/supervised.py` and `runtime/ppo.py`, from
shapes alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.backend import compiler_options
from rlhf_jax.batches import PairBatch, PromptBatch, RankingBatch, Rollout, TextBatch
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.data.sft import max_targets, target_width
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model
from rlhf_jax.parallel.partition import batch_sharding, replicated, tree_shardings
from rlhf_jax.runtime.config import PPOConfig, RewardConfig, SFTConfig
from rlhf_jax.runtime.stages import ppo as ppo_stage
from rlhf_jax.runtime.stages import reward as reward_stage
from rlhf_jax.runtime.stages import sft as sft_stage
from rlhf_jax.training import ppo, reward, sft
from rlhf_jax.training.state import make_optimizer

StageConfig = SFTConfig | RewardConfig | PPOConfig


class Program(NamedTuple):
    """One compiled step of a stage, before it is compiled.

    Attributes:
      name: "step"; or "rollout" and "update", the two halves of PPO around rewards that are not one
        reward model.
      function: jitted.
      arguments: shapes, `jax.ShapeDtypeStruct` each.
      state_bytes: of the first of them, the state, on one device.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    state_bytes: int


def programs(
    config: StageConfig,
    model: Model,
    mesh: Mesh,
    *,
    num_responses: int = 4,
    learned_tokens: int | None = None,
) -> list[Program]:
    """What a stage compiles for its steps. To be traced under `jax.set_mesh(mesh)`.

    Rows have the greatest lengths that the configuration allows. Reward models have the policy's
    form. A schedule of the learning rate spans one step, which changes no more than a constant.

    Args:
      num_responses: K of rankings, which is otherwise that of the data.
      learned_tokens: of a row of texts, at most, which is that of the data, too. By default that of
        rows full of prompts and completions of the greatest lengths, `max_targets`.

    Raises:
      InputError: what the stage itself would raise of sizes, `num_seeds` above 1, or
        `learned_tokens` below 1.
    """
    if learned_tokens is not None and learned_tokens < 1:
        raise InputError(f"learned_tokens is {learned_tokens}: set it to 1 or more.")
    key = jax.eval_shape(functools.partial(jax.random.key, 0))
    if isinstance(config, SFTConfig):
        sft_stage.check_sizes(config, model, mesh)
        batch: Any = _texts(config.sft.batch_size, config.data, learned_tokens)
        return [_supervised(config, sft, config.sft, model, mesh, batch, key)]
    if isinstance(config, RewardConfig):
        reward_stage.check_sizes(config, model, mesh)
        batch = _compared(config, num_responses)
        return [_supervised(config, reward, config.reward, model, mesh, batch, key)]
    ppo_stage.check_sizes(config, model, mesh)
    if config.num_seeds > 1:
        raise InputError(
            f"num_seeds is {config.num_seeds}, but one run is compiled ahead; give --num_seeds 1."
        )
    return _ppo(config, model, mesh, key, _prompts(config, learned_tokens))


def _supervised(config, training, settings, model, mesh, batch, key) -> Program:
    optimizer = make_optimizer(config.optimizer)
    init = functools.partial(_init_supervised, training, model, settings, optimizer)
    shape = jax.eval_shape(init, jax.eval_shape(model.init, key), key)
    state, rows, whole = (
        tree_shardings(mesh, shape, model.partition_rules),
        batch_sharding(mesh),
        replicated(mesh),
    )
    step = jax.jit(
        training.make_step(model, settings, optimizer=optimizer),
        in_shardings=(state, rows, whole),
        out_shardings=(state, whole),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
    return Program("step", step, (shape, batch, key), _bytes_on_device(shape, state))


def _init_supervised(training, model, settings, optimizer, params, key):
    return training.init_state(model, params, settings, key, optimizer=optimizer)


def _ppo(config: PPOConfig, model: Model, mesh: Mesh, key: Any, batch: Any) -> list[Program]:
    settings = config.ppo
    if isinstance(settings.truncate_token, str):  # which one it is makes no difference here
        settings = dataclasses.replace(settings, truncate_token=0)
    optimizer = make_optimizer(config.optimizer, config.ppo.num_updates)
    eos = model.config.eos_token_id
    stops = (model.config.vocab_size - 1 if eos is None else eos,)
    scorers, is_whole = _scorers(config)
    shape = _ppo_state(config, settings, model, optimizer, key, scorers, is_whole)
    state, rows, whole = (
        tree_shardings(mesh, shape, model.partition_rules),
        batch_sharding(mesh),
        replicated(mesh),
    )
    value_model = model if settings.value_model == "reward" else None
    made = {"optimizer": optimizer, "stop_token_ids": stops, "value_model": value_model}
    size = _bytes_on_device(shape, state)
    if is_whole:
        step = jax.jit(
            ppo.make_step(model, settings, reward_model=model, **made),
            in_shardings=(state, rows, whole),
            out_shardings=(state, whole, rows),
            donate_argnums=0,
            compiler_options=compiler_options(mesh.devices.flat[0].platform),
        )
        return [Program("step", step, (shape, batch, key), size)]
    sample = jax.jit(
        ppo.make_rollout_step(model, settings, stop_token_ids=stops),
        in_shardings=(state, rows, whole),
        out_shardings=rows,
    )
    update = jax.jit(
        ppo.make_update_step(model, settings, **made),
        in_shardings=(state, rows, rows, rows, whole),
        out_shardings=(state, whole, rows),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
    rollout = (settings.batch_size, settings.response_length)
    responses = Rollout(*(_array(dtype, *rollout) for dtype in (jnp.int32, bool, float)))
    scores = _array(float, settings.batch_size)
    return [
        Program("rollout", sample, (shape, batch, key), size),
        Program("update", update, (shape, batch, responses, scores, key), size),
    ]


def _scorers(config: PPOConfig) -> tuple[int, bool]:
    """(reward models that the state holds, whether one of them is part of a whole step)."""
    models = [source for source in config.rewards if source.function is None]
    has_bare = any(source.is_bare for source in models)
    count = len(models) + ((config.model.reward_path is not None) and not has_bare)
    if not config.rewards:
        count = 1
    alone = count == 1 and len(config.rewards) <= 1
    weights = [source.weight for source in config.rewards]
    is_whole = alone and weights in ([], [1.0]) and not config.ppo.subtract_reference_score
    return count, is_whole


def _ppo_state(config, settings, model, optimizer, key, scorers, is_whole):
    """Shapes of the state before the first iteration."""
    params = jax.eval_shape(model.init, key)
    scorer = {"model": params, "head": {"kernel": _array(float, model.config.n_embd)}}
    rewards = scorer if is_whole else (scorer,) * scorers or None
    value = scorer if settings.value_model == "reward" else None
    init: Callable[..., Any] = functools.partial(_init_ppo, model, settings, optimizer)
    return jax.eval_shape(init, params, rewards, value, key)


def _init_ppo(model, settings, optimizer, params, rewards, value, key):
    return ppo.init_state(
        model,
        params,
        settings,
        key,
        optimizer=optimizer,
        reward_params=rewards,
        value_params=value,
    )


def _bytes_on_device(shape: Any, shardings: Any) -> int:
    """What one device holds of arrays."""

    def of(leaf, sharding):
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of, shape, shardings)))


def _array(dtype: Any, *shape: int) -> Any:
    """The shape of an array, which stands for the array itself."""
    return jax.ShapeDtypeStruct(shape, jnp.float32 if dtype is float else dtype)


def _texts(rows: int, data: DataSettings, learned_tokens: int | None) -> TextBatch:
    most = max_targets(data) if learned_tokens is None else learned_tokens
    length = target_width([most], data.max_length)
    learned = None if length is None else _array(jnp.int32, rows, length)
    size = (rows, data.max_length)
    tokens, segments = (_array(jnp.int32, *size) for _ in range(2))
    return TextBatch(tokens, segments, _array(bool, *size), learned)


def _compared(config: RewardConfig, num_responses: int) -> PairBatch | RankingBatch:
    rows, data = config.reward.batch_size, config.data
    prompts = (rows, data.max_prompt_length)
    before = (_array(jnp.int32, *prompts), _array(bool, *prompts))
    if config.reward.objective == "ranking":
        size = (rows, num_responses, data.max_response_length)
        return RankingBatch(*before, _array(jnp.int32, *size), _array(bool, *size))
    length = data.max_response_length
    response = (_array(jnp.int32, rows, length), _array(bool, rows, length))
    return PairBatch(*before, *response, *response, _array(float, rows), _array(bool, rows))


def _prompts(config: PPOConfig, learned_tokens: int | None) -> PromptBatch:
    rows, texts = config.ppo.batch_size, None
    if config.ppo.ptx_coef:
        texts = _texts(config.ppo.num_texts, config.ptx, learned_tokens)
    size = (rows, config.data.max_prompt_length)
    tokens, mask = _array(jnp.int32, *size), _array(bool, *size)
    return PromptBatch(tokens, mask, _array(jnp.int32, rows), texts)
