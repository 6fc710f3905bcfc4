"""FLOPs of a step for each of its tokens, of products with parameters alone.

A forward pass takes 2 FLOPs per parameter of a matrix, a backward pass 4 more where the parameter
is trained, and 2 where only a gradient passes through it. Attention and recomputation are left out
(Chowdhery et al. 2022, PaLM, appendix B; arXiv:2204.02311). Shapes of parameters suffice.
"""

from collections.abc import Sequence
from typing import Any

from rlhf_jax.batches import TextBatch
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.training.settings import SampledSettings
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.trainable import Base


def offline_flops(model: Model, state: TrainState, *, target_share: float) -> float:
    """A step of an offline trainer, for one token: a forward and a backward pass.

    Forward passes without a gradient, of a reference or for an estimate of the KL, are left out.

    Args:
      target_share: the share of tokens whose logits the loss reads, `target_share(batch)`; 0 where
        it reads none.
    """
    layers, table = _layers_and_table(model, state.params)
    base, base_table = _layers_and_table(model, state.frozen)
    passed, _ = _layers_and_table(model, _beside_adapters(state.frozen))
    frozen = base + passed + 2.0 * target_share * base_table
    return frozen + 3.0 * (layers + target_share * table)


def target_share(batch: Any) -> float:
    """Targets over real tokens: of texts those of the loss, elsewhere all tokens of responses.

    Args:
      batch: a batch of `rlhf_jax.batches` with NumPy arrays, or all examples in one.
    """
    if isinstance(batch, TextBatch):
        targets, tokens = batch.loss_mask.sum(), (batch.segments > 0).sum()
    else:
        masks = {
            name: x.sum()
            for name, x in batch._asdict().items()
            if name.endswith("mask") and name != "other_mask"  # of a pass without a gradient
        }
        tokens = sum(masks.values())
        targets = tokens - masks["prompt_mask"]
    return float(targets) / max(float(tokens), 1.0)


def online_flops(
    model: Model,
    state: Any,
    settings: SampledSettings,
    *,
    prompt_length: float,
    reward_models: Sequence[Model] = (),
    value_model: Model | None = None,
) -> float:
    """An iteration of an online trainer, for one token of prompts and responses.

    Sampling and scoring are forward passes, the epochs forward and backward passes. Frozen layers
    run twice: to sample, and for everything that follows. Logits are those of responses, which are
    taken to be `settings.response_length` long.

    Args:
      state: see `training/online.py`.
      prompt_length: real tokens of a prompt on average.
      reward_models: in the order of their parameters in the state.
      value_model: of `state.params["value_model"]`, by default as the policy.
    """
    sampled = settings.response_length * (settings.num_responses or 1)
    share = sampled / (prompt_length + sampled)
    base, table, policy = _policy_flops(model, state, share)
    own = state.params.get("value_model")
    value = (value_model or model).flops_per_token(own, unembeds=False)
    # Beside adapters the frozen kernels run in every pass, of a value model that shares them too.
    passed, _ = _layers_and_table(model, _beside_adapters(state.frozen.get("base")))
    shared = passed if own is not None and value_model is None else 0.0
    rewards = state.frozen.get("reward")
    trees = rewards if isinstance(rewards, tuple) else (rewards,)
    reward = sum(
        scorer.flops_per_token(tree, unembeds=False)
        for scorer, tree in zip(reward_models, trees, strict=False)
    )
    scoring = settings.num_forward_passes * (policy + table) + 2.0 * base + value
    scoring += (settings.num_forward_passes - 2) * passed + shared
    update = 3.0 * (policy + value) + 2.0 * (table + passed + shared)
    trained = settings.response_length * settings.num_trained_responses
    passes = settings.num_epochs * (prompt_length + trained) / (prompt_length + sampled)
    return scoring + reward + passes * update


def mixed_text_flops(
    model: Model, state: Any, settings: SampledSettings, *, target_share: float
) -> float:
    """The epochs, for one token of texts that are mixed into the updates.

    Args:
      target_share: as in `offline_flops`.
    """
    base, table, policy = _policy_flops(model, state, target_share)
    passed, _ = _layers_and_table(model, _beside_adapters(state.frozen.get("base")))
    return settings.num_epochs * (base + passed + 2.0 * table + 3.0 * policy)


def _policy_flops(model: Model, state: Any, share: float) -> tuple[float, float, float]:
    """A forward pass for one token: (frozen layers, frozen unembedding, trained part).

    Logits are those of a share of the tokens.
    """
    base, base_table = _layers_and_table(model, state.frozen.get("base"))
    layers, table = _layers_and_table(model, state.params["model"])
    return base, share * base_table, layers + share * table


def _beside_adapters(frozen: Any) -> Params:
    """Frozen parameters that gradients pass through on their way to adapters."""
    return frozen.upper if isinstance(frozen, Base) else {}


def _layers_and_table(model: Model, params: Any) -> tuple[float, float]:
    layers = model.flops_per_token(params, unembeds=False)
    return layers, model.flops_per_token(params, unembeds=True) - layers
