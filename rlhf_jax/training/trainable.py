"""Parameters in two parts: those that are trained, and the frozen ones beside them.

A step differentiates by `trained` alone and hands it to the optimizer; `frozen` travels in the
state. They are divided here alone: with `num_layers_unfrozen = None` all parameters are trained;
otherwise the upper layers with the final layer norm are.

Every pass goes through `stacks`: the parameters of the upper layers, which need a backward pass,
and of the layers below, whose results `frozen_states` computes once for all epochs. Adapters beside
a frozen base fit the same functions: `stacks` returns the base's kernels with their adapters as the
upper part, and the reference policy is the base without them.
"""

from typing import NamedTuple

import jax

from rlhf_jax.batches import Sequences
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params, positions_from
from rlhf_jax.rollout import score


class Trainable(NamedTuple):
    """The parameters of a language model.

    Attributes:
      trained: the parameters that the optimizer updates.
      frozen: the parameters that no step changes; None where all parameters are trained.
    """

    trained: Params
    frozen: Params | None = None


def split(model: Model, params: Params, num_layers_unfrozen: int | None, section: str) -> Trainable:
    """The two parts of a model's full parameters.

    Args:
      section: of the setting, such as "ppo".

    Raises:
      InputError: more layers are to be trained than the model has.
    """
    if num_layers_unfrozen is None:
        return Trainable(params)
    layers = model.config.n_layer
    if not 0 <= num_layers_unfrozen <= layers:
        raise InputError(
            f"{section}.num_layers_unfrozen must be from 0 to the model's n_layer = {layers}, but "
            f"is {num_layers_unfrozen}; null trains all layers and the embeddings."
        )
    frozen, trained = model.split(params, num_layers_unfrozen)
    return Trainable(trained, frozen)


def full_params(model: Model, params: Trainable) -> Params:
    """The full parameters that `split` divided; under jit, unread ones cost nothing."""
    return params.trained if params.frozen is None else model.merge(params.frozen, params.trained)


def stacks(params: Trainable) -> tuple[Params, Params | None]:
    """(upper, lower): parameters of the layers from the lowest trained one on, and of those below.

    `rollout.score` reads them as `params` and `frozen`. The lower part, None where the lowest
    layer is trained, holds the embeddings too.
    """
    return params.trained, params.frozen


def frozen_states(model: Model, params: Trainable, sequences: Sequences) -> jax.Array | None:
    """[B, L, D]: the results of the layers below all trained ones; None if there are none."""
    _, lower = stacks(params)
    return None if lower is None else score.frozen_states(model, lower, sequences)


def text_hidden(
    model: Model,
    params: Trainable,
    tokens: jax.Array,
    segments: jax.Array,
    *,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """[B, L, D] after the final layer norm, of i32[B, L] tokens of packed texts.

    The backward pass ends above the lower stack, for it is run as a stack of its own.
    """
    upper, lower = stacks(params)
    if lower is None:
        return model.hidden(upper, tokens, segments, dropout_key=dropout_key)
    keys = (None,) * 3 if dropout_key is None else tuple(jax.random.split(dropout_key, 3))
    positions = positions_from(segments)
    x = model.embed(lower, tokens, positions, dropout_key=keys[0])
    for stack, key in ((lower, keys[1]), (upper, keys[2])):
        x, _ = model.layers(stack["layers"], x, segments, positions, dropout_key=key)
    return model.final(upper, x)
