"""How many FLOPs an iteration of PPO takes for each token, of products with parameters alone."""

from typing import NamedTuple

from rlhf_jax.runtime.run.utilization import multiplied_parameters
from rlhf_jax.training.ppo import PPOState, Settings


class _Sizes(NamedTuple):
    """Parameters that a token is multiplied with: all, or those above a frozen trunk."""

    trunk: int  # frozen layers
    table: int  # the unembedding, where it is frozen
    policy: int  # what is trained of the policy, the unembedding with it where that is trained
    value: int  # of a value model of its own


def flops_per_token(state: PPOState, settings: Settings) -> float:
    """Sampling and the scoring passes forwards, and the epochs forwards and backwards.

    Scoring is done by the policy, the reference, the reward model and a value model of its own; the
    penalty on the KL to the old policy has the new one score once more. Frozen layers are run
    twice: to sample, and for all that follows.

    Prompt tokens count like those of responses, though their logits are never computed.

    Args:
      state: of one run; shapes are enough.
    """
    sizes = _sizes(state)
    reward = multiplied_parameters(state.frozen.get("reward"), unembeds=False)
    passes = 3 + (settings.surrogate == "kl_penalty")
    forwards = passes * (sizes.policy + sizes.table) + 2 * sizes.trunk + sizes.value + reward
    # Frozen, the unembedding hands its gradient on and has none of its own.
    update = 6.0 * (sizes.policy + sizes.value) + 4.0 * sizes.table
    return 2.0 * forwards + settings.num_ppo_epochs * update


def flops_per_text_token(state: PPOState, settings: Settings) -> float:
    """Of the texts of PPO-ptx, in all epochs: frozen layers forwards, all others backwards too."""
    sizes = _sizes(state)
    epoch = 2.0 * sizes.trunk + 4.0 * sizes.table + 6.0 * sizes.policy
    return settings.num_ppo_epochs * epoch


def _sizes(state: PPOState) -> _Sizes:
    trunk, own = state.frozen.get("base"), state.params.get("value_model")
    layers = multiplied_parameters(trunk, unembeds=False)
    return _Sizes(
        layers,
        multiplied_parameters(trunk, unembeds=True) - layers,
        multiplied_parameters(state.params["model"], unembeds=True),
        multiplied_parameters(own, unembeds=False),
    )
