"""FLOPs of a step for each of its tokens, of products with parameters alone.

A forward pass takes 2 FLOPs per parameter of a matrix, a backward pass 4 more where the parameter
is trained, and 2 where only a gradient passes through it. Attention and recomputation are left out
(Chowdhery et al. 2022, PaLM, appendix B; arXiv:2204.02311). Shapes of parameters suffice.
"""

from collections.abc import Sequence
from typing import Any

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
    base, table, policy = _policy_flops(model, state)
    own = state.params.get("value_model")
    value = (value_model or model).flops_per_token(own, unembeds=False)
    rewards = state.frozen.get("reward")
    trees = rewards if isinstance(rewards, tuple) else (rewards,)
    reward = sum(
        scorer.flops_per_token(tree, unembeds=False)
        for scorer, tree in zip(reward_models, trees, strict=False)
    )
    scoring = settings.num_forward_passes * (policy + table) + 2.0 * base + value
    update = 3.0 * (policy + value) + 2.0 * table
    return scoring + reward + settings.num_epochs * update


def mixed_text_flops(model: Model, state: Any, settings: OnlineSettings) -> float:
    """The epochs, for one token of texts that are mixed into the updates."""
    base, table, policy = _policy_flops(model, state)
    return settings.num_epochs * (base + 2.0 * table + 3.0 * policy)


def _policy_flops(model: Model, state: Any) -> tuple[float, float, float]:
    """A forward pass for one token: (frozen layers, frozen unembedding, trained part)."""
    base = state.frozen.get("base")
    layers = model.flops_per_token(base, unembeds=False)
    table = model.flops_per_token(base, unembeds=True) - layers
    return layers, table, model.flops_per_token(state.params["model"], unembeds=True)
