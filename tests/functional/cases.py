"""One call of each public function on random arrays, for the tests that all functions share."""

import numpy as np

from tests.functional.case import B, Case, D, K, T, V, floats, make_batch, under
from tests.functional.preference_cases import (
    preference_cases,
    response_cases,
    reward_cases,
    tokenwise_cases,
)


def make_cases(seed):
    """The cases by the name of their function, or by name/kind."""
    rng = np.random.default_rng(seed)
    batch = make_batch(rng)
    return (
        masking_cases(rng, batch)
        | logprob_cases(rng, batch)
        | advantage_cases(rng, batch)
        | group_cases(rng, batch)
        | policy_cases(rng, batch)
        | token_weight_cases(rng, batch)
        | reward_cases(rng, batch)
        | tokenwise_cases(rng, batch)
        | preference_cases(rng, batch.valid)
        | response_cases(rng, batch)
    )


def masking_cases(rng, batch):
    arrays, masks = {"x": floats(rng, B, T), **batch.of("mask")}, under("mask", "x")
    return {
        "masked_mean": Case(arrays, {}, {}, ("x",), masks),
        "masked_var": Case(arrays, {"axis": 1}, {}, ("x",), masks),
        "masked_whiten": Case(arrays, {"shift_mean": False}, {"eps": 1e-8}, ("x",), masks),
        "response_mask": Case(batch.of("tokens"), {"stop_token_ids": (2, 5)}),
    }


def logprob_cases(rng, batch):
    """Log-probabilities, entropies, KL estimates, and the loss of supervised fine-tuning."""
    of_logits = {"logits": batch.logits, "tokens": batch.targets}
    of_two = {"logits": batch.logits, "ref_logits": batch.logits[::-1].copy()}
    cases = {
        "token_logprobs": Case(of_logits, {}, {}, ("logits",)),
        "token_entropy": Case(batch.of("logits"), {}, {}, ("logits",)),
        "token_kl": Case(of_two, {}, {}, ("logits", "ref_logits")),
        "cross_entropy_loss": Case(
            batch.of("logits", "targets", "mask"),
            {},
            {"label_smoothing": 0.1, "z_loss": 0.01},
            ("logits",),
            under("mask", "logits", "targets"),
            float(batch.mask.sum()),
        ),
    }
    hidden, unembedding = floats(rng, B, T, D), floats(rng, V, D)
    pieces = {"complete": {}, "chunks": {"chunk_size": 4, "vocab_size": V - 1}}
    arrays, both = {"hidden": hidden, "unembedding": unembedding}, ("hidden", "unembedding")
    limits = {"softcap": 2.0, "logit_scale": 0.8}
    for kind, options in pieces.items():
        coefficients = {"temperature": 0.7, **(limits if kind == "chunks" else {})}
        cases[f"linear_token_logprobs/{kind}"] = Case(
            {**arrays, "tokens": batch.targets}, options, coefficients, both
        )
        cases[f"linear_cross_entropy_loss/{kind}"] = Case(
            {**arrays, **batch.of("targets", "mask")},
            options,
            {"label_smoothing": 0.1, "z_loss": 0.01, **limits} if kind == "chunks" else {},
            both,
            under("mask", "hidden", "targets"),
            float(batch.mask.sum()),
        )
    for kind in ("k1", "k2", "k3"):
        names = ("logprobs", "ref_logprobs")
        cases[f"kl_estimate/{kind}"] = Case(batch.of(*names), {"kind": kind}, {}, names)
    return cases


def advantage_cases(rng, batch):
    rewards, values = floats(rng, B, T), floats(rng, B, T)
    return {
        "token_rewards": Case(
            {"scores": floats(rng, B), **batch.of("logprobs", "ref_logprobs", "mask")},
            {"kl_kind": "k2"},
            {"kl_coef": 0.3},
            ("scores", "logprobs", "ref_logprobs"),
            under("mask", "logprobs", "ref_logprobs"),
        ),
        "gae": Case(
            {"rewards": rewards, "values": values, **batch.of("mask")},
            {},
            {"gamma": 0.9, "lam": 0.8},
            ("rewards", "values"),
            under("mask", "rewards", "values"),
        ),
        "rewards_to_go": Case(
            {"rewards": rewards, **batch.of("mask")},
            {},
            {"gamma": 0.9},
            ("rewards",),
            under("mask", "rewards"),
        ),
    }


def group_cases(rng, batch):
    """Scores of responses to the same prompt; some have none, and one prompt has a single one."""
    responses = np.arange(K) < np.array([K, 3, 1, 2])[:, None]
    scores, of_scores = {"scores": floats(rng, B, K), "mask": responses}, under("mask", "scores")
    cases = {"leave_one_out_advantages": Case(scores, {}, {}, ("scores",), of_scores)}
    for scale in ("group", "batch", "none"):
        cases[f"group_advantages/{scale}"] = Case(
            scores, {"scale": scale}, {"eps": 0.1}, ("scores",), of_scores
        )
    cases["decoupled_advantages"] = Case(
        {
            "scores": floats(rng, B, K, 3),
            "reward_weights": np.exp(floats(rng, 3)),
            "mask": responses[..., None] & (rng.random((B, K, 3)) < 0.9),
        },
        {},
        {"eps": 0.1},
        ("scores", "reward_weights"),
        of_scores,
    )
    cases["normalize_advantages"] = Case(
        {"advantages": floats(rng, B, T), **batch.of("mask")},
        {},
        {"eps": 0.1},
        ("advantages",),
        under("mask", "advantages"),
    )
    lengths = rng.integers(0, 9, size=B).astype(np.int32)
    cases["overlong_penalty"] = Case({"lengths": lengths}, {}, {"max_length": 8.0, "buffer": 4.0})
    cases["pass_at_k"] = Case({"successes": lengths}, {"samples": 9, "k": 3})
    return cases


def token_weight_cases(rng, batch):
    logprobs = {
        "logprobs": batch.logprobs,
        "sampler_logprobs": (batch.logprobs + 0.3 * floats(rng, B, T)).astype(np.float32),
        "mask": batch.mask,
    }
    masks = under("mask", "logprobs", "sampler_logprobs")
    cases = {
        f"importance_weights/{level}": Case(
            logprobs, {"level": level, "mode": mode}, {"cap": 1.3, "denominator": 3.0}, (), masks
        )
        for level, mode in (("token", "mask"), ("sequence", "truncate"))
    }
    return cases | {
        "logprob_difference": Case(
            {**batch.of("logprobs", "mask"), "other_logprobs": batch.old_logprobs},
            {},
            {},
            (),
            under("mask", "logprobs", "other_logprobs"),
        ),
        "top_entropy_mask": Case(
            {"entropy": np.exp(floats(rng, B, T)), **batch.of("mask")},
            {},
            {"share": 0.4},
            (),
            under("mask", "entropy"),
        ),
    }


def policy_cases(rng, batch):
    names = ("logprobs", "old_logprobs", "advantages")
    arrays = {**batch.of("logprobs", "old_logprobs", "mask"), "advantages": floats(rng, B, T)}
    of_values = {name: floats(rng, B, T) for name in ("values", "old_values", "returns")}
    masks, count = under("mask", *names), float(batch.mask.sum())
    cases = {
        "ppo_policy_loss": Case(
            arrays,
            {},
            {"clip_range": 0.3, "clip_range_high": 0.4, "dual_clip": 2.5},
            names,
            masks,
            count,
        ),
        "kl_penalty_policy_loss": Case(arrays, {}, {"kl_coef": 0.3}, names, masks, count),
        "ppo_value_loss": Case(
            {**of_values, **batch.of("mask")},
            {},
            {"clip_range": 0.4},
            tuple(of_values),
            under("mask", *of_values),
            count,
        ),
        "reinforce_loss": Case(
            {name: arrays[name] for name in ("logprobs", "advantages", "mask")},
            {},
            {},
            ("logprobs", "advantages"),
            under("mask", "logprobs", "advantages"),
            count,
        ),
    }
    return cases | grpo_cases(rng, batch)


def grpo_cases(rng, batch):
    # One example in the middle has no real token.
    mask = batch.mask & batch.valid[:, None]
    names = ("logprobs", "old_logprobs", "ref_logprobs")
    arrays = {
        **batch.of(*names),
        "advantages": floats(rng, B),
        "entropy": np.exp(floats(rng, B, T)),
        "mask": mask,
    }
    weights = {"weights": np.exp(floats(rng, B, T))}
    kinds = {
        "sequence": (
            "clip",
            "sequence",
            "k3",
            {},
            {"clip_range": 0.6, "dual_clip": 2.5},
            batch.valid.sum(),
        ),
        "token": ("cispo", "sequence_token", "k2", weights, {}, mask.sum()),
        "constant": ("sapo", "token", "k1", {}, {"max_length": 8.0}, B * 8),
    }
    return {
        f"grpo_loss/{reduction}": Case(
            {**arrays, **more},
            {
                "kind": kind,
                "level": level,
                "reduction": reduction,
                "kl_kind": kl_kind,
                "kl_bias_correction": kl_kind == "k2",
            },
            {"kl_coef": 0.3, "entropy_coef": 0.2, "clip_range_high": 0.3, **coefficients},
            # "sequence_token" holds the ratio of the response, and with it old_logprobs, constant.
            (*names[: 1 if level == "sequence_token" else 2], *names[2:], "advantages", "entropy"),
            under("mask", *names, "entropy", *more),
            float(count),
        )
        for reduction, (kind, level, kl_kind, more, coefficients, count) in kinds.items()
    }
