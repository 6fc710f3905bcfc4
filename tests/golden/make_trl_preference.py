"""Makes tests/golden/trl_preference.npz: the preference losses of TRL 0.29.1 that trl.npz lacks.

    pip install torch==2.13.0 'trl==0.29.1' 'transformers<5' numpy     # Python 3.11
    python tests/golden/make_trl_preference.py

The trainers' own methods run unchanged, each on a stand-in for the trainer that has the settings it
reads and, in place of a model, log-probabilities: multiples of 1/512, so that sums over
tokens are exact in float32 too. Everything is computed in float64, but for the alpha divergence,
which TRL knows in float32 only.
"""

import importlib.metadata
import pathlib
import types

import numpy as np
import torch
from stand_ins import B, bind, draw_logprobs, fixed, leaf, model_of, stack, stand_in
from trl import DPOTrainer
from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments
from trl.experimental.cpo import CPOTrainer
from trl.experimental.kto import KTOTrainer

FILE = pathlib.Path(__file__).parent / "trl_preference.npz"
T = 6

KINDS = {
    "sigmoid": 0.0,
    "robust": 0.2,
    "hinge": 0.0,
    "ipo": 0.0,
    "exo_pair": 0.05,
    "nca_pair": 0.0,
    "bco_pair": 0.0,
    "sppo_hard": 0.0,
    "aot": 0.1,
    "aot_unpaired": 0.1,
    "apo_zero": 0.0,
    "apo_down": 0.0,
    "discopop": 0.0,
    "sft": 0.0,
}


def dpo_settings():
    """(name, settings of the trainer) of each run."""
    for beta in (0.1, 0.7):
        for kind, label_smoothing in KINDS.items():
            yield {"loss_types": [kind], "beta": beta, "label_smoothing": label_smoothing}
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
        for kind in ("sigmoid", "hinge", "exo_pair", "discopop"):
            yield {
                "loss_types": [kind],
                "beta": 0.3,
                "label_smoothing": KINDS[kind],
                "f_divergence_type": divergence,
                "f_alpha_divergence_coef": 0.3,
            }
    for kind in ("sigmoid", "ipo"):
        yield {"loss_types": [kind], "beta": 0.3, "ld_alpha": 0.4}
    for kind in ("sigmoid", "sppo_hard"):
        yield {"loss_types": [kind], "beta": 0.3, "use_weighting": True}
    yield {
        "loss_types": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1.0],
        "beta": 0.3,
    }
    yield {"loss_types": ["ipo", "aot", "sft"], "loss_weights": [0.5, 2.0, 0.25], "beta": 0.3}


def dpo_run(changed, tokens, ref, inputs):
    """Settings and results of DPOTrainer._compute_loss; two models give the log-probabilities."""
    settings = {
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
        "loss_weights": [1.0] * len(changed["loss_types"]),
        "use_weighting": False,
    } | changed
    is_alpha = settings["f_divergence_type"] == "alpha_divergence"
    logprobs = leaf(tokens, torch.float32 if is_alpha else torch.float64)
    trainer = stand_in(
        args=types.SimpleNamespace(
            max_length=None, discopop_tau=0.05, gradient_checkpointing_kwargs=None
        ),
        precompute_ref_logps=False,
        ref_model=model_of(fixed(ref).to(logprobs.dtype)),
        **settings,
    )
    bind(trainer, DPOTrainer, "_truncate_inputs")
    loss = DPOTrainer._compute_loss(trainer, model_of(logprobs), inputs, False)
    loss.backward()
    metrics = trainer._metrics["train"]
    weights = settings["loss_weights"] + [0.0] * (3 - len(settings["loss_weights"]))
    kinds = settings["loss_types"] + [""] * (3 - len(settings["loss_types"]))
    return {
        "hp/kinds": np.array(kinds, dtype="U12"),
        "hp/kind_weights": np.array(weights),
        "hp/beta": settings["beta"],
        "hp/label_smoothing": settings["label_smoothing"],
        "hp/divergence": np.array(settings["f_divergence_type"], dtype="U16"),
        "hp/divergence_alpha": settings["f_alpha_divergence_coef"],
        "hp/ld_alpha": np.nan if settings["ld_alpha"] is None else settings["ld_alpha"],
        "hp/use_weighting": settings["use_weighting"],
        "out/loss": loss.item(),
        "out/grad": logprobs.grad.numpy().astype(np.float64),
        "out/accuracy": metrics["rewards/accuracies"][0],
        "out/margin": metrics["rewards/margins"][0],
        "out/chosen_reward": metrics["rewards/chosen"][0],
        "out/rejected_reward": metrics["rewards/rejected"][0],
    }


def make_dpo(rng):
    """DPOTrainer on one batch of pairs, under all settings."""
    lengths = np.concatenate([[T], rng.integers(1, T, 2 * B - 1)])
    mask = (np.arange(T) < lengths[:, None]).astype(np.int64)
    tokens, ref = draw_logprobs(rng, 2, 2 * B, T)
    inputs = {
        # One prompt token; all tokens are token 0 of the vocabulary.
        "input_ids": torch.zeros((2 * B, 1 + T), dtype=torch.long),
        "attention_mask": torch.ones((2 * B, 1 + T), dtype=torch.long),
        "completion_mask": torch.tensor(np.pad(mask, ((0, 0), (1, 0)))),
    }
    runs = [dpo_run(changed, tokens, ref, inputs) for changed in dpo_settings()]
    return stack(runs) | {"logprobs": tokens, "ref_logprobs": ref, "mask": mask.astype(bool)}


def make_cpo(rng):
    """CPOTrainer.get_batch_loss_metrics with its likelihood term, and SimPO with smoothing."""
    chosen, rejected = draw_logprobs(rng, 2, B)
    nll = np.float32(1.25)
    runs = []
    for kind, beta, label_smoothing, gamma, nll_weight in [
        ("sigmoid", 0.1, 0.0, 0.0, 1.0),
        ("sigmoid", 0.5, 0.2, 0.0, 0.5),
        ("hinge", 0.5, 0.0, 0.0, 1.0),
        ("ipo", 0.5, 0.0, 0.0, 2.0),
        ("simpo", 2.0, 0.2, 1.0, 0.0),
    ]:
        trainer = stand_in(
            alpha=0.0,
            cpo_alpha=nll_weight,
            loss_type=kind,
            beta=beta,
            label_smoothing=label_smoothing,
            simpo_gamma=gamma,
        )
        bind(trainer, CPOTrainer, "cpo_loss")
        policy = leaf(chosen), leaf(rejected)
        logits = torch.zeros(1, dtype=torch.float64)
        outputs = (*policy, logits, logits, fixed(nll))
        trainer.concatenated_forward = lambda *_, outputs=outputs: outputs
        loss, metrics = CPOTrainer.get_batch_loss_metrics(trainer, None, {})
        loss.backward()
        runs.append(
            {
                "hp/kind": np.array(kind, dtype="U12"),
                "hp/beta": beta,
                "hp/label_smoothing": label_smoothing,
                "hp/gamma": gamma,
                "hp/nll_weight": nll_weight,
                "out/loss": loss.item(),
                "out/grad_chosen": policy[0].grad.numpy(),
                "out/grad_rejected": policy[1].grad.numpy(),
                "out/accuracy": metrics["rewards/accuracies"],
                "out/margin": metrics["rewards/margins"],
                "out/chosen_reward": metrics["rewards/chosen"],
                "out/rejected_reward": metrics["rewards/rejected"],
            }
        )
    return stack(runs) | {"policy_chosen": chosen, "policy_rejected": rejected, "nll": nll}


def make_unpaired(rng, name):
    """KTO's apo_zero_unpaired, or two steps of BCO, with five desirable responses and three others.

    BCO's reward shift is that of its running mean; of its rewards TRL logs sums.
    """
    sizes = (5, 3)
    policy = [draw_logprobs(rng, n, T).sum(1) for n in sizes]
    ref = [draw_logprobs(rng, n, T).sum(1) for n in sizes]
    trainer = stand_in(match_underlying_distribution=False, calculate_KL=False)
    trainer.running = RunningMoments(trainer.accelerator)
    runs = []
    for beta, weights in [(0.1, (1.0, 1.0)), (0.5, (1.0, 1.5) if name == "kto" else (1.0, 1.0))]:
        trainer.beta, trainer.loss_type = beta, "apo_zero_unpaired"
        trainer.desirable_weight, trainer.undesirable_weight = weights
        chosen, rejected = map(leaf, policy)
        if name == "kto":
            losses, chosen_rewards, rejected_rewards, delta = KTOTrainer.kto_loss(
                trainer, chosen, rejected, None, *map(fixed, ref), None
            )
        else:
            losses, chosen_rewards, rejected_rewards, delta = BCOTrainer.bco_loss(
                trainer, chosen, rejected, *map(fixed, ref), None, None
            )
        losses.nanmean().backward()
        runs.append(
            {
                "hp/beta": beta,
                "hp/desirable_weight": weights[0],
                "hp/undesirable_weight": weights[1],
                "out/delta": delta.item(),
                "out/loss": losses.nanmean().item(),
                "out/grad_chosen": chosen.grad.numpy(),
                "out/grad_rejected": rejected.grad.numpy(),
                "out/chosen_reward": chosen_rewards.mean().item(),
                "out/rejected_reward": rejected_rewards.mean().item(),
            }
        )
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    return stack(runs) | dict(zip(names, (*policy, *ref), strict=True))


def main():
    assert importlib.metadata.version("trl") == "0.29.1"
    torch.set_num_threads(1)
    groups = {
        "dpo": make_dpo(np.random.default_rng(10)),
        "cpo": make_cpo(np.random.default_rng(11)),
        "apo_zero_unpaired": make_unpaired(np.random.default_rng(12), "kto"),
        "bco": make_unpaired(np.random.default_rng(13), "bco"),
    }
    arrays = {
        f"{group}/{name}": np.asarray(x)
        for group, case in groups.items()
        for name, x in case.items()
    }
    for name, x in arrays.items():
        print(name, x.dtype, x.shape, x.ravel()[:6])
    np.savez_compressed(FILE, **arrays)
    print(FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
