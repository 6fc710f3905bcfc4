"""Makes tests/golden/trl.npz: what the trainers of TRL 0.29.1 compute from given log-probabilities.

    pip install torch==2.13.0 'trl==0.29.1' 'transformers<5' numpy     # Python 3.11
    python tests/golden/make_trl.py

The trainers' own methods run unchanged, each on a small stand-in for the trainer that has the
settings it reads and no model: where a method would ask its model for log-probabilities, it is
given random ones. Log-probabilities are multiples of 1/512, so that sums over tokens are exact in
float32 too; everything is computed in float64, but for ORPO, which TRL casts to float32.
"""

import importlib.metadata
import pathlib
import types

import numpy as np
import torch
from groups import make_advantages, make_grpo
from stand_ins import (
    B,
    T,
    bind,
    draw_logprobs,
    fixed,
    leaf,
    model_of,
    number,
    ragged,
    stack,
    stand_in,
)
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.kto import KTOTrainer
from trl.experimental.orpo import ORPOTrainer

FILE = pathlib.Path(__file__).parent / "trl.npz"


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
    policy, ref = (tokens * mask).sum(1).astype(np.float32), ref.astype(np.float32)
    lengths = mask.sum(1).astype(np.int32)
    return stack([run_dpo(tokens, inputs, *each) for each in settings]) | {
        "policy_chosen": policy[:B],
        "policy_rejected": policy[B:],
        "ref_chosen": ref[:B],
        "ref_rejected": ref[B:],
        "chosen_lengths": lengths[:B],
        "rejected_lengths": lengths[B:],
    }


def run_dpo(tokens, inputs, kind, beta, label_smoothing):
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
    loss = DPOTrainer._compute_loss(trainer, model_of(logprobs), inputs, False)
    loss.backward()
    # Every response has a first token, and the loss reads only sums: its gradient is the sum's.
    gradient = logprobs.grad[:, 0].numpy()
    metrics = trainer._metrics["train"]
    return {
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
            np.random.default_rng(5), loss_types, grpo_settings, with_empty_response=False
        ),
        "grpo_empty_row": make_grpo(
            np.random.default_rng(7), loss_types, grpo_settings[-1:], with_empty_response=True
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
