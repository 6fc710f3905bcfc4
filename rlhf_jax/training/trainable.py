"""Parameters in two parts: those that are trained, and the frozen ones beside them.

A step differentiates by `trained` alone and hands it to the optimizer; `frozen` travels in the
state. They are divided here alone: a model with adapters (`StackedModel.adapters`) trains these,
beside a frozen base; with `num_layers_unfrozen` the upper layers with the final layer norm are
trained; otherwise all parameters are.

Every pass goes through `stacks`: the parameters of the upper layers, which need a backward pass,
and of the layers below, whose results `frozen_states` computes once for all epochs. With adapters
the upper layers are those from the lowest one with an adapter on. The reference is then the base
alone, `reference_part`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.batches import Sequences
from rlhf_jax.errors import InputError
from rlhf_jax.models.adapters import (
    adapters_of,
    merged_trees,
    split_adapters,
    without_adapters,
)
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


class Base(NamedTuple):
    """The frozen parameters below and beside adapters.

    Attributes:
      lower: those of the embeddings and of the layers below all adapters; None where embeddings are
        trained.
      upper: those of the layers from the lowest one with an adapter on, and all others.
    """

    lower: Params | None
    upper: Params


def split(model: Model, params: Params, num_layers_unfrozen: int | None, section: str) -> Trainable:
    """The two parts of a model's full parameters.

    Args:
      section: of the setting, such as "ppo".

    Raises:
      InputError: more layers are to be trained than the model has, or some of a model with
        adapters.
    """
    adapters = adapters_of(model)
    if adapters is not None:
        if num_layers_unfrozen is not None:
            raise InputError(
                f"{section}.num_layers_unfrozen is {num_layers_unfrozen}, but only adapters are "
                "trained; set it to null, and lora.layers_to_transform to the upper layers."
            )
        return _split_adapters(model, adapters, params)
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


def _split_adapters(model, adapters, params):
    trained, base = split_adapters(adapters, params)
    if any("embedding" in part for part in model.without_unembedding(trained).values()):
        return Trainable(trained, Base(None, base))
    first = adapters.lowest_layer
    if "layers" in trained and first:
        trained["layers"] = jax.tree.map(lambda leaf: leaf[first:], trained["layers"])
    count = model.config.n_layer - first
    lower, _ = model.split(without_adapters(params), count)
    saved = {name: part for name, part in trained.items() if name not in base}
    _, upper = model.split(merged_trees(base, saved), count)
    return Trainable(trained, Base(_without(lower, saved), _without(upper, saved)))


def _without(params, names):
    return {name: part for name, part in params.items() if name not in names}


def full_params(model: Model, params: Trainable) -> Params:
    """The full parameters that `split` divided; under jit, unread ones cost nothing."""
    upper, lower = stacks(params)
    return upper if lower is None else model.merge(lower, upper)


def stacks(params: Trainable) -> tuple[Params, Params | None]:
    """(upper, lower): parameters of the layers from the lowest trained one on, and of those below.

    `rollout.score` reads them as `params` and `frozen`. The lower part holds the embeddings too;
    it is None where these, or with `num_layers_unfrozen` the lowest layer, are trained.
    """
    if isinstance(params.frozen, Base):
        return merged_trees(params.frozen.upper, params.trained), params.frozen.lower
    return params.trained, params.frozen


def reference_part(model: Model, trained: Params) -> Params:
    """The trained part of a reference that is the policy as it is now: a copy.

    Of fresh adapters it is the part without them, for their products are 0, and takes no memory.
    """
    adapters = adapters_of(model)
    if adapters is not None and adapters.is_fresh:
        trained = without_adapters(trained)
    # A copy, since a step that donates its state must not hold one buffer twice.
    return jax.tree.map(jnp.copy, trained)


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
    for stack, first, key in ((lower, 0, keys[1]), (upper, None, keys[2])):
        x, _ = model.layers(
            stack["layers"], x, segments, positions, dropout_key=key, first_layer=first
        )
    return model.final(upper, x)
