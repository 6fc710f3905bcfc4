"""GRPO's loss, and the advantages of groups, by the methods of TRL's trainers."""

import collections
import types

import numpy as np
import torch
from stand_ins import B, T, draw_logprobs, fixed, leaf, number, ragged, stack, stand_in
from trl import GRPOTrainer, RLOOTrainer


def make_grpo(rng, loss_types, settings, *, with_empty_row):
    """GRPOTrainer._compute_loss on given log-probabilities per token.

    A row without a token is what `mask_truncated_completions` makes of a response without an end.
    """
    mask = ragged(rng, B)
    if with_empty_row:
        mask[-1] = 0
    logprobs = draw_logprobs(rng, B, T)
    steps = np.round(512 * 0.4 * rng.normal(size=(2, B, T))).astype(np.float32) / 512
    old, ref = np.minimum(logprobs + steps, np.float32(-1 / 512))
    advantages = rng.normal(size=B).astype(np.float32)
    ids = torch.zeros((B, T), dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": torch.tensor(mask),
        "advantages": fixed(advantages),
        "old_per_token_logps": fixed(old),
        "ref_per_token_logps": fixed(ref),
        "num_items_in_batch": torch.tensor(mask.sum()),
    }
    runs = [run_grpo(logprobs, inputs, kind, *each) for kind in loss_types for each in settings]
    return stack(runs) | {
        "logprobs": logprobs,
        "old_logprobs": old,
        "ref_logprobs": ref,
        "advantages": advantages,
        "mask": mask.astype(bool),
    }


def run_grpo(logprobs, inputs, loss_type, kl_coef, low, high):
    trainer = stand_in(
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=kl_coef,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=T,
    )
    tokens = leaf(logprobs)
    entropies = torch.zeros((B, T), dtype=torch.float64)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (tokens, entropies)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    metrics = trainer._metrics["train"]
    return {
        "hp/loss_type": loss_type,
        "hp/kl_coef": kl_coef,
        "hp/clip_range": low,
        "hp/clip_range_high": high,
        "out/loss": number(loss),
        "out/grad": tokens.grad.numpy(),
        "out/kl": metrics["kl"][0] if kl_coef else np.nan,
        "out/clip_low": metrics["clip_ratio/low_mean"][0],
        "out/clip_high": metrics["clip_ratio/high_mean"][0],
        "out/clip_region": metrics["clip_ratio/region_mean"][0],
    }


def advantages_of(trainer_class, scores, **settings):
    """The advantages that _generate_and_score_completions gives to these scores [B, K]."""
    rows, size = scores.size, scores.shape[1]
    per_function = fixed(scores.reshape(rows, 1))
    ids, tokens = [[0]] * rows, torch.zeros((rows, 1), dtype=torch.float64)
    generated = (ids, ids, [""] * rows)
    if trainer_class is GRPOTrainer:
        generated = (ids, ids, None, [""] * rows, rows, None, {})
    trainer = stand_in(
        args=types.SimpleNamespace(
            per_device_train_batch_size=rows,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        _generate=lambda prompts: generated,
        _get_per_token_logps_and_entropies=lambda *_, **__: (tokens, None),
        _calculate_rewards=lambda *_: per_function,
        processing_class=types.SimpleNamespace(batch_decode=lambda x, **_: [""] * rows),
        _logs={
            "prompt": [],
            "completion": [],
            "advantages": [],
            "rewards": collections.defaultdict(list),
        },
        environments=None,
        tools=None,
        pad_token_id=0,
        mask_truncated_completions=False,
        num_iterations=1,
        use_vllm=False,
        beta=0.0,
        reward_weights=torch.ones(1, dtype=torch.float64),
        reward_func_names=["score"],
        reward_funcs=[None],
        num_generations=size,
        multi_objective_aggregation="sum_then_normalize",
        reward_clip_range=None,
        **settings,
    )
    inputs = [{"prompt": ""} for _ in range(rows)]
    output = trainer_class._generate_and_score_completions(trainer, inputs)
    return output["advantages"].numpy().reshape(scores.shape)


def make_advantages(rng):
    scores = rng.normal(size=(4, 6)).astype(np.float32)
    scores[1] = np.round(scores[1])  # ties
    scores[2] = 0.7  # all equal
    scores[3] *= 1e-3  # a spread for which the epsilon matters
    return {
        "scores": scores,
        "out/grpo_group": advantages_of(GRPOTrainer, scores, scale_rewards="group"),
        "out/grpo_none": advantages_of(GRPOTrainer, scores, scale_rewards="none"),
        "out/rloo": advantages_of(RLOOTrainer, scores, normalize_advantages=False),
    }
