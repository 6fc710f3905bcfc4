"""How many FLOPs an iteration of PPO takes for each token, of products with parameters alone."""

from collections.abc import Sequence
from typing import NamedTuple

from rlhf_jax.models.interface import Model
from rlhf_jax.training.ppo import PPOState, Settings


class _Forward(NamedTuple):
    """FLOPs of a forward pass for one token."""

    trunk: float  # frozen layers
    table: float  # the unembedding, if it is frozen
    policy: float  # the trained layers of the policy, and the unembedding if it is trained
    value: float  # a value model of its own


def flops_per_token(
    model: Model,
    state: PPOState,
    settings: Settings,
    *,
    reward_models: Sequence[Model] = (),
    value_model: Model | None = None,
) -> float:
    """Sampling and the scoring passes forwards, and the epochs forwards and backwards.

    Scoring is done by the policy, the reference, the reward model and a value model of its own; the
    penalty on the KL to the old policy has the new one score once more. Frozen layers are run
    twice: to sample, and for all that follows.

    Prompt tokens count like those of responses, though their logits are never computed.

    Args:
      state: of one run; shapes are enough.
      reward_models: in the order of their parameters in the state.
      value_model: None where the values have the architecture of the policy.
    """
    forward = _forward(model, state, value_model)
    rewards = state.frozen.get("reward")
    trees = rewards if isinstance(rewards, tuple) else (rewards,)
    reward = sum(
        scorer.flops_per_token(tree, unembeds=False)
        for scorer, tree in zip(reward_models, trees, strict=False)
    )
    passes = 3 + (settings.surrogate == "kl_penalty")
    scoring = passes * (forward.policy + forward.table) + 2 * forward.trunk + forward.value
    # The frozen unembedding propagates its gradient and has none of its own.
    update = 3.0 * (forward.policy + forward.value) + 2.0 * forward.table
    return scoring + reward + settings.num_ppo_epochs * update


def flops_per_text_token(model: Model, state: PPOState, settings: Settings) -> float:
    """Of the texts of PPO-ptx, in all epochs: frozen layers forwards, all others backwards too."""
    forward = _forward(model, state, None)
    epoch = forward.trunk + 2.0 * forward.table + 3.0 * forward.policy
    return settings.num_ppo_epochs * epoch


def _forward(model: Model, state: PPOState, value_model: Model | None) -> _Forward:
    trunk, own = state.frozen.get("base"), state.params.get("value_model")
    layers = model.flops_per_token(trunk, unembeds=False)
    return _Forward(
        layers,
        model.flops_per_token(trunk, unembeds=True) - layers,
        model.flops_per_token(state.params["model"], unembeds=True),
        (value_model or model).flops_per_token(own, unembeds=False),
    )
