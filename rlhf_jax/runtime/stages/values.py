"""The reward model that a value model starts from."""

from typing import Any

from jax.sharding import Mesh

from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.loading import (
    check_positions,
    check_vocabulary,
    load_reward,
    shares_tokens,
)


def value_path(config: RunConfig) -> str | None:
    """The folder of the reward model that a value model "reward" starts from; None for others.

    Raises an InputError if there is none, or one is given that is not read.
    """
    model, name = config.model, config.trainer.name
    kind = config.settings.value_model if config.trainer.has_value_model else "shared"
    path = model.value_path or model.reward_path
    if kind == "reward" and path is None:
        raise InputError(
            f"{name}.value_model reward needs a reward model to start from: give "
            f"--model.value_path its folder, or set {name}.value_model to policy or shared."
        )
    if kind != "reward" and model.value_path is not None:
        raise InputError(
            f"model.value_path is read by {name}.value_model reward alone, but that is "
            f"{kind}; change one of them."
        )
    return path if kind == "reward" else None


def value_label(config: RunConfig) -> int | None:
    """The label of the classifier that the values start from: that of its source in `rewards`."""
    path, sources = value_path(config), config.section("rewards")
    same = (source.label for source in sources if source.path == path)
    bare = (source.label for source in sources if source.is_bare)
    return next(same if config.model.value_path else bare, None)


def load_value_model(
    config: RunConfig, tokenizer: Any, mesh: Mesh
) -> tuple[Model | None, Params | None]:
    """(model, parameters) of the reward model that the values start from; None without one.

    Raises an InputError if it cannot be read, has another tokenizer, or has too few positions.
    """
    path, name = value_path(config), config.trainer.name
    if path is None:
        return None, None
    model, params, theirs = load_reward(path, config.model, value_label(config), mesh)
    check_vocabulary(model, tokenizer, path)
    if not shares_tokens(tokenizer, theirs):
        raise InputError(
            f"The reward model in {path}, which the values are to start from, has another "
            "tokenizer than the policy: give --model.value_path one with the policy's, or set "
            f"{name}.value_model to policy or shared."
        )
    longest = config.data.max_prompt_length + config.settings.response_length
    key = f"data.max_prompt_length + {name}.response_length, to be valued by the value model,"
    check_positions(model, longest, key)
    return model, params
