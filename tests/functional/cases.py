"""One call of each public function on random arrays, for the tests that all functions share."""

from typing import NamedTuple

import numpy as np

B, T, V, D, K = 4, 6, 7, 5, 5

# Arrays without a batch axis.
SHARED = {"unembedding", "reward_weights"}


class Case(NamedTuple):
    """A call: function(**arrays, **options, **coefficients).

    Attributes:
      arrays: arguments by name; all have the batch as their first axis, but for scalars and for
        what SHARED names.
      options: static keyword arguments.
      coefficients: keyword arguments that may be traced.
      differentiable: names of the arrays to differentiate by.
      masks: by the name of an array the name of the mask whose False entries make it padding.
      count: of a loss, what its `denominator` is for this batch; None if a part of a batch needs
        more than its examples; such a loss has a test of its own.
    """

    arrays: dict
    options: dict = {}
    coefficients: dict = {}
    differentiable: tuple = ()
    masks: dict = {}
    count: float | None = None


def under(mask, *names):
    """`Case.masks` for arrays that share one mask."""
    return dict.fromkeys(names, mask)


def function_name(case_name):
    """'kl_estimate' for the case 'kl_estimate/k3': a function may have one case per kind."""
    return case_name.partition("/")[0]


def total_of(output):
    """A number to differentiate: the first output, its entries weighted from 1 to 2.

    Advantages have a sum of 0, and a gradient of it that is rounding alone.
    """
    first = output[0] if isinstance(output, tuple) else output
    return (first * np.linspace(1, 2, first.size, dtype=np.float32).reshape(first.shape)).sum()


class Batch(NamedTuple):
    """Random arrays that several cases share, under the names of the arguments."""

    mask: np.ndarray
    valid: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    logprobs: np.ndarray
    old_logprobs: np.ndarray
    ref_logprobs: np.ndarray

    def of(self, *names):
        return {name: getattr(self, name) for name in names}


def floats(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def make_batch(rng):
    # The first row is full, the others end anywhere after their first token.
    lengths = np.concatenate([[T], rng.integers(1, T, size=B - 1)])
    mask = np.arange(T) < lengths[:, None]
    # One row in the middle only fills up the batch.
    valid = np.arange(B) != 2
    tokens = rng.integers(0, V, size=(B, T)).astype(np.int32)
    targets = rng.integers(0, V - 1, size=(B, T)).astype(np.int32)
    logits = floats(rng, B, T, V)
    logits[..., -1] = -np.inf
    return Batch(mask, valid, tokens, targets, logits, *-np.exp(floats(rng, 3, B, T)))


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
    # One row in the middle has no real token.
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
    num_valid = float(valid.sum())
    cases = {}
    weights = {"weights": np.exp(floats(rng, B))}
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
    # nll is 0, so that an empty mask leaves nothing, and parts of a batch do not count it twice.
    nll = {"nll": np.zeros((), np.float32)}
    cases["mixed_dpo_loss"] = Case(
        {**pairs, **weights, **nll, "mask": valid},
        {"kinds": ("sppo_hard", "robust", "sft")},
        {"beta": 0.3, "label_smoothing": 0.2},
        tuple(pairs),
        under("mask", *pairs, *weights),
        num_valid,
    )
    policy = {name: pairs[name] for name in ("policy_chosen", "policy_rejected")}
    cases["simpo_loss"] = Case(
        {**policy, "mask": valid},
        {},
        {"beta": 1.5, "gamma": 0.7},
        tuple(policy),
        under("mask", *policy),
        num_valid,
    )
    cases["cpo_loss"] = Case(
        {**policy, **nll, "mask": valid},
        {},
        {"beta": 0.8, "label_smoothing": 0.2, "nll_weight": 0.7},
        tuple(policy),
        under("mask", *policy),
        num_valid,
    )
    cases["orpo_loss"] = Case(
        {**policy, **nll, "mask": valid},
        {},
        {"beta": 0.8},
        tuple(policy),
        under("mask", *policy),
        num_valid,
    )
    return cases | unpaired_cases(logprobs, pairs, valid)


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
