"""FLOPs of a step for each of its tokens, of products with parameters alone.

A forward pass takes 2 FLOPs per parameter of a matrix, a backward pass 4 more where the parameter
is trained, and 2 where only a gradient passes through it. Attention and recomputation are left out
(Chowdhery et al. 2022, PaLM, appendix B; arXiv:2204.02311). Shapes of parameters suffice.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_jax.models.interface import Model
from rlhf_jax.training.settings import OnlineSettings
from rlhf_jax.training.state import TrainState


def offline_flops(model: Model, state: TrainState, *, unembeds: bool) -> float:
    """A step of an offline trainer, for one token: a forward and a backward pass.

    Args:
      unembeds: whether the loss reads logits.
    """
    trained = model.flops_per_token(state.params, unembeds=unembeds)
    return model.flops_per_token(state.frozen, unembeds=False) + 3.0 * trained


def online_flops(
    model: Model,
    state: Any,
    settings: OnlineSettings,
    *,
    reward_models: Sequence[Model] = (),
    value_model: Model | None = None,
) -> float:
    """An iteration of an online trainer, for one token of prompts and responses.

    Sampling and scoring are forward passes, the epochs forward and backward passes. Frozen layers
    run twice: to sample, and for everything that follows. Prompt tokens count like those of
    responses, though their logits are never computed.

    Args:
      state: see `training/online.py`.
      reward_models: in the order of their parameters in the state.
      value_model: of `state.params["value_model"]`, by default as the policy.
    """
    forward = _forward(model, state, value_model)
    rewards = state.frozen.get("reward")
    trees = rewards if isinstance(rewards, tuple) else (rewards,)
    reward = sum(
        scorer.flops_per_token(tree, unembeds=False)
        for scorer, tree in zip(reward_models, trees, strict=False)
    )
    passes = settings.num_forward_passes
    scoring = passes * (forward.policy + forward.table) + 2.0 * forward.base + forward.value
    update = 3.0 * (forward.policy + forward.value) + 2.0 * forward.table
    return scoring + reward + settings.num_epochs * update


def mixed_text_flops(model: Model, state: Any, settings: OnlineSettings) -> float:
    """The epochs, for one token of texts that are mixed into the updates."""
    forward = _forward(model, state, None)
    return settings.num_epochs * (forward.base + 2.0 * forward.table + 3.0 * forward.policy)


class _Forward(NamedTuple):
    """FLOPs of a forward pass for one token."""

    base: float  # frozen layers
    table: float  # the unembedding, if it is frozen
    policy: float  # the trained layers of the policy, and the unembedding if it is trained
    value: float  # a value model of its own


def _forward(model: Model, state: Any, value_model: Model | None) -> _Forward:
    base, own = state.frozen.get("base"), state.params.get("value_model")
    layers = model.flops_per_token(base, unembeds=False)
    return _Forward(
        layers,
        model.flops_per_token(base, unembeds=True) - layers,
        model.flops_per_token(state.params["model"], unembeds=True),
        (value_model or model).flops_per_token(own, unembeds=False),
    )
