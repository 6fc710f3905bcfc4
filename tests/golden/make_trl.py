"""Makes tests/golden/trl.npz: what the trainers of TRL 0.29.1 compute from given log-probabilities.

    pip install torch==2.13.0 'trl==0.29.1' 'transformers<5' numpy     # Python 3.11
    python tests/golden/make_trl.py

The trainers' own methods run unchanged, each on a small stand-in for the trainer that has the
settings it reads and no model: where a method would ask its model for log-probabilities, it is
given random ones. Log-probabilities are multiples of 1/512, so that sums over tokens are exact in
float32 too; everything is computed in float64, but for ORPO, which TRL casts to float32.
"""

import collections
import importlib.metadata
import pathlib
import types

import numpy as np
import torch
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.kto import KTOTrainer
from trl.experimental.orpo import ORPOTrainer

FILE = pathlib.Path(__file__).parent / "trl.npz"
B, T = 5, 7


def stand_in(**more):
    """What every trainer reads of itself: one process, in training mode, with metrics to fill."""
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        num_processes=1,
        process_index=0,
    )
    settings = {
        "accelerator": accelerator,
        "model": types.SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "aux_loss_enabled": False,
        "_metrics": {"train": collections.defaultdict(list)},
        "_total_train_tokens": 0,
    }
    return types.SimpleNamespace(**settings | more)


def bind(trainer, trainer_class, *names):
    for name in names:
        setattr(trainer, name, types.MethodType(getattr(trainer_class, name), trainer))


def draw_logprobs(rng, *shape):
    """float32 multiples of 1/512 below 0."""
    return -np.maximum(np.round(512 * np.exp(rng.normal(size=shape))), 1).astype(np.float32) / 512


def ragged(rng, rows):
    """int64[rows, T], 1 on real tokens: the first row is full, each has one at least."""
    lengths = np.concatenate([[T], rng.integers(1, T, rows - 1)])
    return (np.arange(T) < lengths[:, None]).astype(np.int64)


def leaf(x):
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


def fixed(x):
    return torch.tensor(x, dtype=torch.float64)


def stack(runs):
    """One array per output, the runs along its first axis."""
    return {name: np.stack([run[name] for run in runs]) for name in runs[0]}


def number(x):
    return np.asarray(x.item() if hasattr(x, "item") else x)


def logits_of(logprobs):
    """Logits of two tokens, of which the first has these log-probabilities."""
    return torch.stack([logprobs, torch.log(-torch.expm1(logprobs))], dim=-1)


def make_dpo(rng):
    """DPOTrainer._compute_loss; a model of two tokens gives it the log-probabilities."""
    mask = ragged(rng, 2 * B)
    tokens = draw_logprobs(rng, 2 * B, T)
    ref = (draw_logprobs(rng, 2 * B, T) * mask).sum(1)
    inputs = {
        # One prompt token; all tokens are token 0 of the vocabulary.
        "input_ids": torch.zeros((2 * B, 1 + T), dtype=torch.long),
        "attention_mask": torch.ones((2 * B, 1 + T), dtype=torch.long),
        "completion_mask": torch.tensor(np.pad(mask, ((0, 0), (1, 0)))),
        "ref_chosen_logps": fixed(ref[:B]),
        "ref_rejected_logps": fixed(ref[B:]),
    }
    settings = [
        ("sigmoid", 0.1, 0.0),
        ("sigmoid", 0.7, 0.3),
        ("hinge", 0.1, 0.0),
        ("hinge", 0.7, 0.0),
        ("ipo", 0.1, 0.0),
        ("ipo", 0.7, 0.0),
        ("robust", 0.1, 0.0),
        ("robust", 0.1, 0.2),
        ("robust", 0.7, 0.45),
    ]
    runs = []
    for kind, beta, label_smoothing in settings:
        trainer = stand_in(
            args=types.SimpleNamespace(max_length=None),
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[kind],
            loss_weights=[1.0],
            beta=beta,
            label_smoothing=label_smoothing,
            use_weighting=False,
        )
        bind(trainer, DPOTrainer, "_truncate_inputs")
        logprobs = leaf(tokens)

        def model(logprobs=logprobs, **_):
            logits = logits_of(logprobs)
            return types.SimpleNamespace(logits=torch.cat([logits, logits[:, :1]], dim=1))

        loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
        loss.backward()
        # Every response has a first token, and the loss reads only sums: its gradient is the sum's.
        gradient = logprobs.grad[:, 0].numpy()
        metrics = trainer._metrics["train"]
        runs.append(
            {
                "hp/kind": kind,
                "hp/beta": beta,
                "hp/label_smoothing": label_smoothing,
                "out/loss": number(loss),
                "out/grad_chosen": gradient[:B],
                "out/grad_rejected": gradient[B:],
                "out/accuracy": metrics["rewards/accuracies"][0],
                "out/margin": metrics["rewards/margins"][0],
                "out/chosen_reward": metrics["rewards/chosen"][0],
                "out/rejected_reward": metrics["rewards/rejected"][0],
            }
        )
    policy, ref = (tokens * mask).sum(1).astype(np.float32), ref.astype(np.float32)
    lengths = mask.sum(1).astype(np.int32)
    return stack(runs) | {
        "policy_chosen": policy[:B],
        "policy_rejected": policy[B:],
        "ref_chosen": ref[:B],
        "ref_rejected": ref[B:],
        "chosen_lengths": lengths[:B],
        "rejected_lengths": lengths[B:],
    }


def run_without_reference(trainer, trainer_class, chosen, rejected, nll, hyperparameters):
    """get_batch_loss_metrics of the trainers that need no reference."""
    chosen, rejected, nll = leaf(chosen), leaf(rejected), leaf(nll)
    trainer.concatenated_forward = lambda *_: (chosen, rejected, chosen, rejected, nll)
    loss, metrics = trainer_class.get_batch_loss_metrics(trainer, None, {})
    loss.backward()
    return {f"hp/{name}": value for name, value in hyperparameters.items()} | {
        "out/loss": number(loss),
        "out/grad_chosen": chosen.grad.numpy(),
        "out/grad_rejected": rejected.grad.numpy(),
        "out/accuracy": metrics["rewards/accuracies"],
        "out/margin": metrics["rewards/margins"],
        "out/chosen_reward": metrics["rewards/chosen"],
        "out/rejected_reward": metrics["rewards/rejected"],
    }


def make_cpo(rng, settings):
    """CPOTrainer without its likelihood term."""
    chosen, rejected = draw_logprobs(rng, 2, B)
    runs = []
    for hyperparameters in settings:
        beta, kind = hyperparameters["beta"], hyperparameters["kind"]
        trainer = stand_in(
            alpha=0.0,
            cpo_alpha=0.0,
            loss_type=kind,
            beta=beta,
            label_smoothing=hyperparameters.get("label_smoothing", 0.0),
            simpo_gamma=hyperparameters.get("gamma", 0.0),
        )
        bind(trainer, CPOTrainer, "cpo_loss")
        runs.append(
            run_without_reference(trainer, CPOTrainer, chosen, rejected, 0.0, hyperparameters)
        )
    return stack(runs) | {"policy_chosen": chosen, "policy_rejected": rejected}


def make_orpo(rng):
    # The first chosen response is nearly certain, the last nearly impossible.
    chosen, rejected = draw_logprobs(rng, 2, B)
    chosen[0], chosen[-1] = -(2.0**-9), -80.0
    nll = np.float32(1.25)
    runs = []
    for beta in (0.1, 1.0):
        trainer = stand_in(beta=beta)
        bind(trainer, ORPOTrainer, "odds_ratio_loss")
        runs.append(
            run_without_reference(trainer, ORPOTrainer, chosen, rejected, nll, {"beta": beta})
        )
    return stack(runs) | {"policy_chosen": chosen, "policy_rejected": rejected, "nll": nll}


def make_kto(rng):
    """KTOTrainer.get_batch_loss_metrics with five desirable responses and three others."""
    sizes = {"chosen": 5, "rejected": 3, "KL": 8}
    policy, ref = ({k: draw_logprobs(rng, n, T).sum(1) for k, n in sizes.items()} for _ in "pr")
    runs = []
    for shift, beta, desirable_weight, undesirable_weight in [
        (0.0, 0.1, 1.0, 1.0),
        (4.0, 0.1, 1.0, 1.0),
        (6.0, 0.5, 1.0, 1.5),
        (-9.0, 0.5, 0.75, 1.0),
    ]:
        trainer = stand_in(
            args=types.SimpleNamespace(use_liger_kernel=False),
            calculate_KL=True,
            loss_type="kto",
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
        )
        bind(trainer, KTOTrainer, "kto_loss")
        chosen, rejected, both = (leaf(policy[k]) for k in ("chosen", "rejected", "KL"))
        policy_kl = both + shift
        trainer.forward = lambda *_, out=(chosen, rejected, chosen, rejected, policy_kl): out
        batch = {
            "label": [True] * sizes["chosen"] + [False] * sizes["rejected"],
            "reference_logps": fixed(np.concatenate([ref["chosen"], ref["rejected"]])),
            "reference_KL_logps": fixed(ref["KL"]),
        }
        loss, metrics = KTOTrainer.get_batch_loss_metrics(trainer, None, batch)
        loss.backward()
        assert both.grad is None
        runs.append(
            {
                "kl": np.float32((policy_kl.detach() - fixed(ref["KL"])).mean().item()),
                "hp/beta": beta,
                "hp/desirable_weight": desirable_weight,
                "hp/undesirable_weight": undesirable_weight,
                "out/loss": number(loss),
                "out/kl_clamped": metrics["kl"],
                "out/grad_chosen": chosen.grad.numpy(),
                "out/grad_rejected": rejected.grad.numpy(),
                "out/chosen_reward": metrics["rewards/chosen_sum"] / sizes["chosen"],
                "out/rejected_reward": metrics["rewards/rejected_sum"] / sizes["rejected"],
            }
        )
    return stack(runs) | {
        f"{name}_{key}": x[key]
        for name, x in (("policy", policy), ("ref", ref))
        for key in ("chosen", "rejected")
    }


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
    runs = []
    for loss_type in loss_types:
        for kl_coef, low, high in settings:
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
            trainer._get_per_token_logps_and_entropies = lambda *_, out=(tokens, entropies), **__: (
                out
            )
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
            loss = GRPOTrainer._compute_loss(trainer, None, inputs)
            loss.backward()
            metrics = trainer._metrics["train"]
            runs.append(
                {
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
            )
    return stack(runs) | {
        "logprobs": logprobs,
        "old_logprobs": old,
        "ref_logprobs": ref,
        "advantages": advantages,
        "mask": mask.astype(bool),
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


def main():
    assert importlib.metadata.version("trl") == "0.29.1"
    torch.set_num_threads(1)
    conservative = {"kind": "sigmoid", "beta": 0.5, "label_smoothing": 0.3}
    loss_types = ("grpo", "bnpo", "dapo", "dr_grpo")
    grpo_settings = [(0.0, 0.2, 0.2), (0.1, 0.2, 0.2), (0.04, 0.1, 0.35)]
    groups = {
        "dpo": make_dpo(np.random.default_rng(0)),
        "cpo": make_cpo(
            np.random.default_rng(1),
            [
                conservative,
                conservative | {"label_smoothing": 0.0},
                conservative | {"kind": "hinge", "label_smoothing": 0.0},
                conservative | {"kind": "ipo", "label_smoothing": 0.0},
            ],
        ),
        "simpo": make_cpo(
            np.random.default_rng(2),
            [
                {"kind": "simpo", "beta": beta, "gamma": gamma}
                for beta, gamma in [(2.0, 1.0), (2.5, 0.0), (0.5, 1.5)]
            ],
        ),
        "orpo": make_orpo(np.random.default_rng(3)),
        "kto": make_kto(np.random.default_rng(4)),
        "grpo": make_grpo(
            np.random.default_rng(5), loss_types, grpo_settings, with_empty_row=False
        ),
        "grpo_empty_row": make_grpo(
            np.random.default_rng(7), loss_types, grpo_settings[-1:], with_empty_row=True
        ),
        "advantages": make_advantages(np.random.default_rng(6)),
    }
    arrays = {
        f"{group}/{name}": np.asarray(x)
        for group, case in groups.items()
        for name, x in case.items()
    }
    for name, x in arrays.items():
        print(name, x.dtype, x.shape, np.array2string(x.ravel()[:6], precision=5))
    np.savez_compressed(FILE, **arrays)
    print(FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
