"""Checks before any step: lengths, batch sizes on the mesh, and those of the trainer."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError
from rlhf_jax.models.adapters import fresh_params
from rlhf_jax.models.interface import Model
from rlhf_jax.parallel.partition import check_batch_size
from rlhf_jax.rollout.shaping import check_stop_tokens
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.loading import check_positions
from rlhf_jax.runtime.rewards.scorers import NamedSource, ScoreFunction, find_sources
from rlhf_jax.runtime.sampling.samples import check_sampled_positions, check_sources


def check_run(config: RunConfig, model: Model, mesh: Mesh) -> None:
    """Raises an InputError if a run of this model on this mesh cannot work.

    Checks the lengths of the examples against the positions of the model, the attention heads and
    the batch sizes against the mesh, and the settings by the trainer's `init_state`.
    """
    model.check_mesh(mesh)
    check_reference(config)
    check_adapters(config, model)
    (check_online if config.trainer.online else check_offline)(config, model, mesh)
    key = jax.eval_shape(functools.partial(jax.random.key, 0))
    params = jax.eval_shape(functools.partial(fresh_params, model), key)
    init = functools.partial(config.trainer.steps.init_state, model, settings=config.settings)
    options = {}
    if config.trainer.has_value_model:
        head = jax.ShapeDtypeStruct((model.config.n_embd,), "float32")
        options = {"value_params": {"model": params, "head": {"kernel": head}}}
    jax.eval_shape(init, params, key=key, **options)


def check_adapters(config: RunConfig, model: Model) -> None:
    """Raises an InputError if fresh adapters have a dropout and the trainer has none.

    Of adapters that were read, which keep it in their configuration, it is not an error.
    """
    if config.lora.dropout and not config.trainer.has_dropout:
        raise InputError(
            f"lora.dropout is {config.lora.dropout}, but {config.trainer.name} trains without "
            "dropout; set it to 0."
        )


def check_offline(config: RunConfig, model: Model, mesh: Mesh) -> None:
    """The lengths and batch sizes of an offline run."""
    name, settings = config.trainer.name, config.settings
    check_lengths(config.trainer.reads(settings), config.data, model)
    if config.trainer.samples_first:
        check_sampling(config, model, mesh)
    check_parts(mesh, f"{name}.batch_size", settings.batch_size, 1, settings, name)
    check_batch_size(mesh, f"{name}.eval_batch_size", settings.eval_batch_size)


def check_reference(config: RunConfig) -> None:
    """Raises an InputError if a reference is given that the run would not read."""
    name, settings = config.trainer.name, config.settings
    if config.model.reference_path is None:
        return
    if not config.trainer.has_reference:
        raise InputError(
            f"model.reference_path is given, but {name} does not read it; leave it out."
        )
    if not settings.has_reference:
        raise InputError(
            f"model.reference_path is given, but {name}.kind {settings.kind} has no reference; "
            "leave it out."
        )
    if not settings.precompute_ref:
        raise InputError(
            f"model.reference_path is given, but with {name}.precompute_ref false the reference "
            "is the model that the run begins with; set that to true, or leave the path out."
        )


def check_lengths(kind: str, data: DataSettings, model: Model, name: str = "data") -> None:
    """Raises an InputError if examples may be longer than the model has positions."""
    if kind == "text":
        check_positions(model, data.max_length, f"{name}.max_length")
        return
    longest = data.max_prompt_length + data.max_response_length
    check_positions(model, longest, f"{name}.max_prompt_length + {name}.max_response_length")


def check_sampling(config: RunConfig, model: Model, mesh: Mesh) -> None:
    """The lengths and batch sizes of responses that are sampled before the first step."""
    generation = config.section("generation")
    check_sampled_positions(model, config.data.max_prompt_length, generation)
    check_batch_size(mesh, "generation.batch_size", generation.batch_size)


def check_online(config: RunConfig, model: Model, mesh: Mesh) -> None:
    """The lengths and batch sizes of an online run."""
    name, settings = config.trainer.name, config.settings
    check_stop_tokens(settings, stop_token_ids=(0,))  # which token it is makes no difference here
    longest = config.data.max_prompt_length + settings.response_length
    check_positions(model, longest, f"data.max_prompt_length + {name}.response_length")
    batches = settings.batch_size // settings.minibatch_size
    check_parts(mesh, f"{name}.batch_size", settings.batch_size, batches, settings, name)
    if settings.score_batch_size is not None:
        check_batch_size(mesh, f"{name}.score_batch_size", settings.score_batch_size)
    check_batch_size(mesh, "evaluation.batch_size", config.section("evaluation").batch_size)
    if config.trainer.mixes_texts and settings.ptx_coef:
        check_lengths("text", config.section("ptx"), model, "ptx")
        check_parts(mesh, f"{name}.ptx_batch_size", settings.num_texts, batches, settings, name)


def check_parts(
    mesh: Mesh, key: str, batch_size: int, num_mini_batches: int, settings: Any, section: str
) -> None:
    """Raises an InputError if an optimizer step, or an accumulated part of it, misses the mesh."""
    steps = settings.gradient_accumulation_steps
    if num_mini_batches > 1:
        key = f"{key} / {section}.num_mini_batches"
    if steps > 1:
        key = f"{key} / {section}.gradient_accumulation_steps"
    check_batch_size(mesh, key, batch_size // num_mini_batches // steps)


def find_rewards(
    config: RunConfig, reward_fn: ScoreFunction | None, judge_fn: str | None = None
) -> list[NamedSource]:
    """The sources of scores of a run that starts from a policy; none where there is a judge.

    Raises:
      InputError: there is no policy, no source of scores, or both these and a judge.
    """
    title, name = config.trainer.title, config.trainer.name
    if config.model.path is None:
        raise InputError(
            f"{title} starts from a trained policy: give --model.path a folder or hub name."
        )
    sources = find_sources(config.model.reward_path, config.section("rewards"), reward_fn)
    if judge_fn is None:
        check_sources(sources, title, f", or call train_{name} with a reward_fn")
    elif sources:
        raise InputError(
            f"{name}.judge_fn takes the place of rewards, but there are rewards too: "
            f"{', '.join(each.name for each in sources)}; leave one of them out."
        )
    return sources


def check_scorer(config: RunConfig, scorer: Model) -> None:
    """Raises an InputError if a reward model of tokens has too few positions for the responses."""
    name, settings, data = config.trainer.name, config.settings, config.data
    lengths = {f"{name}.response_length": settings.response_length}
    if settings.subtract_reference_score:
        lengths["data.max_response_length"] = data.max_response_length
    for key, length in lengths.items():
        key = f"data.max_prompt_length + {key}, to be scored by the reward model,"
        check_positions(scorer, data.max_prompt_length + length, key)


def check_judged(kind: str, train: Any, held_out: Any | None) -> None:
    """Raises an InputError for judged responses that a policy cannot be trained on.

    That is responses of which the first token has no context, and labels that are all equal.
    """
    if kind not in ("pairs", "unpaired"):
        return
    present = [b.prompt_mask.any(axis=1) for b in (train, held_out) if b is not None]
    empty = sum(int((~each).sum()) for each in present)
    if empty:
        raise InputError(
            f"{empty} of {sum(map(len, present))} examples have an empty prompt, so that nothing "
            "predicts the first token of their responses; give them a prompt, or split full "
            "conversations by data.split_at."
        )
    if kind == "unpaired" and train.labels.all() == train.labels.any():
        raise InputError(
            f"All {len(train.labels)} training examples have the label "
            f"{str(bool(train.labels[0])).lower()}, so that they cannot be distinguished; give "
            "desirable and undesirable ones."
        )
