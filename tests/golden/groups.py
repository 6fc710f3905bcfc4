"""GRPO's loss, and the advantages of groups, by the methods of TRL's trainers."""

import collections
import types

import numpy as np
import torch
from stand_ins import B, T, bind, draw_logprobs, fixed, leaf, number, ragged, stack, stand_in
from trl import GRPOTrainer, RLOOTrainer


def make_grpo(rng, loss_types, settings, *, with_empty_response):
    """GRPOTrainer._compute_loss on given log-probabilities per token.

    `mask_truncated_completions` makes a response without an end one without a token.
    """
    mask = ragged(rng, B)
    if with_empty_response:
        mask[-1] = 0
    arrays, inputs = draw_grpo(rng, mask)
    logprobs = arrays["logprobs"]
    runs = [run_grpo(logprobs, inputs, kind, *each) for kind in loss_types for each in settings]
    return stack(runs) | arrays


def draw_grpo(rng, mask):
    """(random arrays under our names, the inputs of _compute_loss)."""
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
    arrays = {
        "logprobs": logprobs,
        "old_logprobs": old,
        "ref_logprobs": ref,
        "advantages": advantages,
        "mask": mask.astype(bool),
    }
    return arrays, inputs


def run_grpo(logprobs, inputs, loss_type, kl_coef, low, high):
    metrics, loss, gradient = compute_grpo(
        logprobs, inputs, loss_type=loss_type, beta=kl_coef, epsilon_low=low, epsilon_high=high
    )
    return {
        "hp/loss_type": loss_type,
        "hp/kl_coef": kl_coef,
        "hp/clip_range": low,
        "hp/clip_range_high": high,
        "out/loss": loss,
        "out/grad": gradient,
        "out/kl": metrics["kl"][0] if kl_coef else np.nan,
        "out/clip_low": metrics["clip_ratio/low_mean"][0],
        "out/clip_high": metrics["clip_ratio/high_mean"][0],
        "out/clip_region": metrics["clip_ratio/region_mean"][0],
    }


def compute_grpo(logprobs, inputs, entropies=None, arguments=None, **settings):
    """(metrics, loss, its gradient by the log-probabilities) of GRPOTrainer._compute_loss."""
    arguments = {"use_bias_correction_kl": False, "delta": None} | (arguments or {})
    defaults = {
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": T,
    }
    trainer = stand_in(args=types.SimpleNamespace(**arguments), **defaults | settings)
    trainer.accelerator.pad_across_processes = lambda x, **_: x
    bind(trainer, GRPOTrainer, "get_high_entropy_mask")
    tokens = leaf(logprobs)
    entropies = torch.zeros((B, T), dtype=torch.float64) if entropies is None else fixed(entropies)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (tokens, entropies)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return trainer._metrics["train"], number(loss), tokens.grad.numpy()


def advantages_of(trainer_class, scores, **settings):
    """The advantages that _generate_and_score_completions gives to these scores [B, K]."""
    _, output = score(trainer_class, scores.reshape(-1, 1), scores.shape[1], **settings)
    return output["advantages"].numpy().reshape(scores.shape)


def score(trainer_class, scores, size, ids=None, logprobs=None, sampler_logprobs=None, **settings):
    """(metrics, output) of _generate_and_score_completions for scores [responses, R]."""
    responses, functions = scores.shape
    per_function = fixed(scores)
    prompts = [[0]] * responses
    ids = prompts if ids is None else ids
    tokens = (
        torch.zeros((responses, 1), dtype=torch.float64) if logprobs is None else fixed(logprobs)
    )
    generated = (prompts, ids, [""] * responses)
    if trainer_class is GRPOTrainer:
        generated = (prompts, ids, None, [""] * responses, responses, sampler_logprobs, {})
    trainer = stand_in(
        args=types.SimpleNamespace(
            per_device_train_batch_size=responses,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        _generate=lambda prompts: generated,
        _get_per_token_logps_and_entropies=lambda *_, **__: (tokens, None),
        _calculate_rewards=lambda *_: per_function,
        processing_class=types.SimpleNamespace(batch_decode=lambda x, **_: [""] * responses),
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
        beta=0.0,
        reward_func_names=[f"score{i}" for i in range(functions)],
        reward_funcs=[None] * functions,
        num_generations=size,
        reward_clip_range=None,
        **{
            "use_vllm": False,
            "reward_weights": torch.ones(functions, dtype=torch.float64),
            "multi_objective_aggregation": "sum_then_normalize",
        }
        | settings,
    )
    inputs = [{"prompt": ""} for _ in range(responses)]
    output = trainer_class._generate_and_score_completions(trainer, inputs)
    return trainer._metrics["train"], output


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
