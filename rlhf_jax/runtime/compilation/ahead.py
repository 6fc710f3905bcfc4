"""The compiled steps of a trainer from shapes alone: no parameters, no data, no devices.

They derive from the trainer's record, and are those of its stage (`runtime/stages`), by the same
recipe (`runtime/program.py`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.batches import PairBatch, PromptBatch, RankingBatch, TextBatch, UnpairedBatch
from rlhf_jax.data.formats import Kind
from rlhf_jax.data.kinds import AnyBatch
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.data.sft import max_targets, target_width
from rlhf_jax.errors import InputError
from rlhf_jax.models.adapter_folders import with_settings
from rlhf_jax.models.adapters import fresh_params
from rlhf_jax.models.interface import Model
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.program import Placement
from rlhf_jax.runtime.rewards.sources import resolve_sources
from rlhf_jax.runtime.stages.checks import check_run
from rlhf_jax.training import dynamic_sampling, online
from rlhf_jax.training.state import make_optimizer


class Program(NamedTuple):
    """One step of a stage, before it is compiled.

    Attributes:
      name: "step"; or "rollout" and "update", the halves of an iteration around other rewards than
        one reward model.
      function: jitted.
      arguments: shapes, `jax.ShapeDtypeStruct` each.
      state_bytes: of the state, its first argument, on one device.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    state_bytes: int


def programs(
    config: RunConfig, model: Model, mesh: Mesh, *, num_responses: int = 4
) -> list[Program]:
    """The programs of a stage, to be traced under `jax.set_mesh(mesh)`.

    Examples have the greatest lengths that the configuration allows, and texts `max_targets` target
    tokens. Reward models have the policy's architecture. A schedule of the learning rate differs in
    a constant.

    Args:
      num_responses: K of rankings, which otherwise the data determine.

    Raises:
      InputError: of sizes, as the stage raises it, or responses have several turns.
    """
    if config.trainer.compares_groups and config.settings.environment_fn is not None:
        raise InputError(
            f"{config.trainer.name}.environment_fn calls a program for each turn, which is not "
            "compiled ahead of time; leave it out."
        )
    model = with_settings(model, config.lora)
    check_run(config, model, mesh)
    kind, settings = config.trainer.reads(config.settings), config.settings
    batch: Any = _batch(kind, settings.batch_size, config.data, num_responses)
    if not config.trainer.online:
        return [_offline(config, model, mesh, batch)]
    if config.trainer.mixes_texts and settings.ptx_coef:
        batch = batch._replace(texts=_texts(settings.num_texts, config.section("ptx")))
    return _online(config, model, mesh, batch)


def _offline(config: RunConfig, model: Model, mesh: Mesh, batch: Any) -> Program:
    steps, key = config.trainer.steps, _key()
    optimizer = make_optimizer(config.optimizer, models=[model])
    init = functools.partial(steps.init_state, model, settings=config.settings, optimizer=optimizer)
    place = Placement(mesh, model.partition_rules)
    params = jax.eval_shape(functools.partial(fresh_params, model), key)
    state = jax.eval_shape(init, params, key=key)
    if config.trainer.has_reference and config.settings.has_reference and state.reference is None:
        reference = steps.make_reference_step(model, config.settings)
        batch = batch._replace(**jax.eval_shape(reference, params, batch))
    step = place.step(steps.make_step(model, config.settings, optimizer=optimizer), state)
    return Program("step", step, (state, batch, key), place.bytes_on_device(state))


def _online(config: RunConfig, model: Model, mesh: Mesh, batch: Any) -> list[Program]:
    steps, key, settings = config.trainer.steps, _key(), config.settings
    if isinstance(settings.truncate_token, str):  # its id makes no difference to the program
        settings = dataclasses.replace(settings, truncate_token=0)
    optimizer = make_optimizer(config.optimizer, settings.num_updates, models=[model])
    eos = model.config.eos_token_id
    stops = (model.config.vocab_size - 1 if eos is None else eos,)
    num_scorers, is_single = _reward_models(config)
    params = jax.eval_shape(functools.partial(fresh_params, model), key)
    head = {"kernel": _array(jnp.float32, model.config.n_embd)}
    scorer_params = jax.eval_shape(model.init, key)  # without adapters
    scorer = {"model": model.without_unembedding(scorer_params), "head": head}
    scorers: dict[str, Any] = {
        "reward_params": scorer if is_single else (scorer,) * num_scorers or None
    }
    options: dict[str, Any] = {"optimizer": optimizer, "stop_token_ids": stops}
    if config.trainer.has_value_model:
        scorers["value_params"], options["value_model"] = scorer, model
    init = functools.partial(steps.init_state, model, settings=settings, optimizer=optimizer)
    state = jax.eval_shape(init, params, key=key, **scorers)
    place = Placement(mesh, model.partition_rules)
    size = place.bytes_on_device(state)
    update = steps.make_update_step(model, settings, **options)
    if is_single:
        if settings.max_sampling_rounds > 1:
            batch = (batch,) * settings.max_sampling_rounds
        step = dynamic_sampling.make_step(model, settings, update, stop_token_ids=stops)
        step = place.step(step, state, returns_batch=True)
        return [Program("step", step, (state, batch, key), size)]
    sample = online.make_rollout_step(model, settings, stop_token_ids=stops)
    update = place.update(update, state)
    rollout = jax.eval_shape(sample, state, batch, key)
    scores = _array(jnp.float32, *rollout.tokens.shape[:-1])
    return [
        Program("rollout", place.rollout(sample, state), (state, batch, key), size),
        Program("update", update, (state, batch, rollout, scores, key), size),
    ]


def _reward_models(config: RunConfig) -> tuple[int, bool]:
    """(the number of reward models, whether one alone is part of a full step).

    Without any source of rewards, one reward model is assumed, unless there is a judge.
    """
    if config.settings.judge_fn is not None:
        return 0, False
    listed, path = config.section("rewards"), config.model.reward_path
    if path is None and (not listed or any(source.is_bare for source in listed)):
        path = "reward"
    sources = resolve_sources(path, listed)
    count = sum(source.function is None for source in sources)
    is_alone = len(sources) == count == 1 and sources[0].weight == 1.0
    return count, is_alone and not config.settings.subtract_reference_score


def _key() -> Any:
    return jax.eval_shape(functools.partial(jax.random.key, 0))


def _batch(kind: Kind, batch_size: int, data: DataSettings, num_responses: int) -> AnyBatch:
    """A batch as its encoder returns it."""
    if kind == "text":
        return _texts(batch_size, data)
    prompts = _sequences(batch_size, data.max_prompt_length)
    if kind in ("prompts", "references"):
        return PromptBatch(*prompts, _array(jnp.int32, batch_size))
    if kind == "rankings":
        responses = _sequences(batch_size, num_responses, data.max_response_length)
        return RankingBatch(*prompts, *responses)
    responses = _sequences(batch_size, data.max_response_length)
    valid = _array(jnp.bool_, batch_size)
    if kind == "unpaired":
        return UnpairedBatch(*prompts, *responses, *responses, valid, valid)
    return PairBatch(*prompts, *responses, *responses, _array(jnp.float32, batch_size), valid)


def _texts(batch_size: int, data: DataSettings) -> TextBatch:
    width = target_width([max_targets(data)], data.max_length)
    targets = None if width is None else _array(jnp.int32, batch_size, width)
    tokens, mask = _sequences(batch_size, data.max_length)
    return TextBatch(tokens, tokens, mask, targets)


def _sequences(*shape: int) -> tuple[Any, Any]:
    """(tokens, mask)."""
    return _array(jnp.int32, *shape), _array(jnp.bool_, *shape)


def _array(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
