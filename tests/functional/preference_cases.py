"""Cases of reward and preference losses, and of numbers of responses."""

import numpy as np

from tests.functional.case import B, Case, K, T, V, floats, under


def reward_cases(rng, batch):
    """Losses of one score per response."""
    # One prompt in the middle has a single response and thus no pair.
    responses = np.arange(K) < np.array([K, 2, 1, 3])[:, None]
    return {
        "pairwise_loss": Case(
            {"chosen": floats(rng, B), "rejected": floats(rng, B), "mask": batch.valid},
            {},
            {"margin": 0.5, "center_coef": 0.1},
            ("chosen", "rejected"),
            under("mask", "chosen", "rejected"),
            float(batch.valid.sum()),
        ),
        "ranking_loss": Case(
            {"scores": floats(rng, B, K), "mask": responses},
            {},
            {},
            ("scores",),
            under("mask", "scores"),
            float((responses.sum(axis=1) > 1).sum()),
        ),
    }


def tokenwise_cases(rng, batch):
    # Responses that part at the second token, but for the last pair: it has no difference.
    rejected = np.where(np.arange(T) < 1, batch.tokens, (batch.tokens + 1) % V).astype(np.int32)
    rejected_mask = np.arange(T) < rng.integers(2, T, size=B)[:, None]
    rejected[-1], rejected_mask[-1] = batch.tokens[-1], batch.mask[-1]
    arrays = {
        "chosen_scores": floats(rng, B, T),
        "rejected_scores": floats(rng, B, T),
        "chosen_tokens": batch.tokens,
        "rejected_tokens": rejected,
        "chosen_mask": batch.mask,
        "rejected_mask": rejected_mask,
        "mask": batch.valid,
    }
    cases = {}
    # What is published reads the scores on padding too.
    for past_end, parts in (("last", ("tokens", "scores")), ("published", ("tokens",))):
        masks = under("chosen_mask", *(f"chosen_{part}" for part in parts))
        masks |= under("rejected_mask", *(f"rejected_{part}" for part in parts))
        cases[f"tokenwise_pairwise_loss/{past_end}"] = Case(
            arrays,
            {"past_end": past_end},
            {},
            ("chosen_scores", "rejected_scores"),
            masks,
            float(batch.valid.sum()),
        )
    return cases


def preference_cases(rng, valid):
    """Losses of log-probabilities of full responses; `valid` is the mask of pairs."""

    def logprobs(size):
        return -np.exp(rng.normal(size=size)).astype(np.float32)

    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    pairs = {name: logprobs(B) for name in names}
    weights = {"weights": np.exp(floats(rng, B))}
    # nll is 0, so that an empty mask leaves nothing, and parts of a batch do not count it twice.
    nll = {"nll": np.zeros((), np.float32)}
    return (
        dpo_cases(pairs, weights, nll, valid)
        | reference_free_cases(pairs, nll, valid)
        | unpaired_cases(logprobs, pairs, valid)
    )


def dpo_cases(pairs, weights, nll, valid):
    num_valid = float(valid.sum())
    cases = {}
    kinds = {
        "sigmoid": (weights, {}, {"label_smoothing": 0.2}),
        "hinge": ({}, {}, {}),
        "ipo": ({}, {}, {}),
        "robust": ({}, {}, {"label_smoothing": 0.2}),
        "exo_pair": (
            {},
            {"divergence": "alpha_divergence"},
            {"label_smoothing": 0.2, "divergence_alpha": 0.4},
        ),
        "nca_pair": ({}, {}, {}),
        "discopop": ({}, {}, {"discopop_tau": 0.5}),
        # These sort the batch, and parts do not add up.
        "aot": ({}, {}, {"label_smoothing": 0.2}),
        "aot_unpaired": ({}, {}, {}),
    }
    for kind, (arrays, options, coefficients) in kinds.items():
        cases[f"dpo_loss/{kind}"] = Case(
            {**pairs, **arrays, "mask": valid},
            {"kind": kind, **options},
            {"beta": 0.3, **coefficients},
            tuple(pairs),
            under("mask", *pairs, *arrays),
            None if kind.startswith("aot") else num_valid,
        )
    cases["mixed_dpo_loss"] = Case(
        {**pairs, **weights, **nll, "mask": valid},
        {"kinds": ("sppo_hard", "robust", "sft")},
        {"beta": 0.3, "label_smoothing": 0.2},
        tuple(pairs),
        under("mask", *pairs, *weights),
        num_valid,
    )
    return cases


def reference_free_cases(pairs, nll, valid):
    policy = {name: pairs[name] for name in ("policy_chosen", "policy_rejected")}
    names, masks, num_valid = tuple(policy), under("mask", *policy), float(valid.sum())
    smoothed = {"beta": 0.8, "label_smoothing": 0.2, "nll_weight": 0.7}
    arrays = {**policy, "mask": valid}
    return {
        "simpo_loss": Case(arrays, {}, {"beta": 1.5, "gamma": 0.7}, names, masks, num_valid),
        "cpo_loss": Case({**arrays, **nll}, {}, smoothed, names, masks, num_valid),
        "orpo_loss": Case({**arrays, **nll}, {}, {"beta": 0.8}, names, masks, num_valid),
    }


def unpaired_cases(logprobs, pairs, valid):
    """Losses of desirable and undesirable responses."""
    # Three real responses of each group, the undesirable ones with more padding.
    undesirable = {name: logprobs(2 * B) for name in ("policy_rejected", "ref_rejected")}
    masks = {"chosen_mask": valid, "rejected_mask": np.arange(2 * B) % 3 == 0}
    arrays = {**pairs, **undesirable, **masks}
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
    cases = {}
    for name, more, options, coefficients in (
        ("kto_loss", {"kl": np.float32(0.9)}, {}, weights),
        ("kto_loss/apo_zero_unpaired", {}, {"kind": "apo_zero_unpaired"}, weights),
        ("bco_loss", {"delta": np.float32(0.2)}, {}, {}),
    ):
        cases[name] = Case(
            {**arrays, **more},
            options,
            {"beta": 0.6, **coefficients},
            tuple(pairs),
            under("chosen_mask", "policy_chosen", "ref_chosen")
            | under("rejected_mask", "policy_rejected", "ref_rejected"),
            2.0 * valid.sum(),
        )
    return cases


def response_cases(rng, batch):
    """Numbers of responses from those of their tokens."""
    return {
        "length_desensitized_logprobs": Case(
            {
                **batch.of("logprobs", "mask"),
                "other_lengths": rng.integers(1, T, size=B).astype(np.int32),
            },
            {},
            {"alpha": 0.4},
            ("logprobs",),
            under("mask", "logprobs"),
        ),
        "token_collision_entropy": Case(batch.of("logits")),
        # Without masks here: the weight of a response without a token is 1.
        "wpo_weights": Case(
            {**batch.of("logprobs", "mask"), "collision_entropy": np.exp(floats(rng, B, T))}
        ),
    }
