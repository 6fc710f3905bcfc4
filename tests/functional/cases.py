"""One call of each public function on random arrays, for the tests that all functions share."""

from typing import NamedTuple

import numpy as np

B, T, V, K = 4, 6, 7, 5
D = 5

# Arrays that all rows share.
SHARED = {"unembedding"}


class Case(NamedTuple):
    """A call: function(**arrays, **options, **coefficients).

    Attributes:
      arrays: arguments by name; all have the batch as their first axis, but for scalars and for
        what SHARED names.
      options: static keyword arguments.
      coefficients: keyword arguments that may be traced.
      differentiable: names of the arrays that gradients are asked for.
      masks: by the name of an array the name of the mask whose False entries make it padding.
      count: of a loss, what its `denominator` is for this batch; None if a part of a batch needs
        more than its rows, so that a test of its own takes it apart.
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


def make_cases(seed):
    """The cases by the name of their function, or by name/kind."""
    rng = np.random.default_rng(seed)

    def floats(*shape):
        return rng.normal(size=shape).astype(np.float32)

    # The first row is full, the others end anywhere after their first token.
    lengths = np.concatenate([[T], rng.integers(1, T, size=B - 1)])
    mask = np.arange(T) < lengths[:, None]
    tokens = rng.integers(0, V, size=(B, T)).astype(np.int32)
    logits = floats(B, T, V)
    logits[..., -1] = -np.inf
    targets = rng.integers(0, V - 1, size=(B, T)).astype(np.int32)
    logprobs, old, ref = -np.exp(floats(3, B, T))
    # One row in the middle only fills up the batch.
    rows = np.arange(B) != 2
    tokens_real, rows_real = float(mask.sum()), float(rows.sum())
    cases = {
        "masked_mean": Case({"x": floats(B, T), "mask": mask}, {}, {}, ("x",), under("mask", "x")),
        "masked_var": Case(
            {"x": floats(B, T), "mask": mask}, {"axis": 1}, {}, ("x",), under("mask", "x")
        ),
        "masked_whiten": Case(
            {"x": floats(B, T), "mask": mask},
            {"shift_mean": False},
            {"eps": 1e-8},
            ("x",),
            under("mask", "x"),
        ),
        "response_mask": Case({"tokens": tokens}, {"stop_token_ids": (2, 5)}),
        "token_logprobs": Case({"logits": logits, "tokens": targets}, {}, {}, ("logits",)),
        "token_entropy": Case({"logits": logits}, {}, {}, ("logits",)),
        "token_rewards": Case(
            {"scores": floats(B), "logprobs": logprobs, "ref_logprobs": ref, "mask": mask},
            {"kl_kind": "k2"},
            {"kl_coef": 0.3},
            ("scores", "logprobs", "ref_logprobs"),
            under("mask", "logprobs", "ref_logprobs"),
        ),
        "gae": Case(
            {"rewards": floats(B, T), "values": floats(B, T), "mask": mask},
            {},
            {"gamma": 0.9, "lam": 0.8},
            ("rewards", "values"),
            under("mask", "rewards", "values"),
        ),
        "rewards_to_go": Case(
            {"rewards": floats(B, T), "mask": mask},
            {},
            {"gamma": 0.9},
            ("rewards",),
            under("mask", "rewards"),
        ),
        "cross_entropy_loss": Case(
            {"logits": logits, "targets": targets, "mask": mask},
            {},
            {"label_smoothing": 0.1, "z_loss": 0.01},
            ("logits",),
            under("mask", "logits", "targets"),
            tokens_real,
        ),
        "pairwise_loss": Case(
            {"chosen": floats(B), "rejected": floats(B), "mask": rows},
            {},
            {"margin": 0.5, "center_coef": 0.1},
            ("chosen", "rejected"),
            under("mask", "chosen", "rejected"),
            rows_real,
        ),
        "ppo_policy_loss": Case(
            {"logprobs": logprobs, "old_logprobs": old, "advantages": floats(B, T), "mask": mask},
            {},
            {"clip_range": 0.3},
            ("logprobs", "old_logprobs", "advantages"),
            under("mask", "logprobs", "old_logprobs", "advantages"),
            tokens_real,
        ),
        "ppo_value_loss": Case(
            {
                "values": floats(B, T),
                "old_values": floats(B, T),
                "returns": floats(B, T),
                "mask": mask,
            },
            {},
            {"clip_range": 0.4},
            ("values", "old_values", "returns"),
            under("mask", "values", "old_values", "returns"),
            tokens_real,
        ),
        "reinforce_loss": Case(
            {"logprobs": logprobs, "advantages": floats(B, T), "mask": mask},
            {},
            {},
            ("logprobs", "advantages"),
            under("mask", "logprobs", "advantages"),
            tokens_real,
        ),
    }
    for name, options in {
        "one_piece": {},
        "chunks": {"chunk_size": 4, "vocab_size": V - 1},
    }.items():
        cases[f"linear_token_logprobs/{name}"] = Case(
            {"hidden": floats(B, T, D), "unembedding": floats(V, D), "tokens": targets},
            options,
            {"temperature": 0.7},
            ("hidden", "unembedding"),
        )
    cases["leave_one_out_advantages"] = Case({"scores": floats(B, K)}, {}, {}, ("scores",))
    for scale in (True, False):
        cases[f"group_advantages/scale={scale}"] = Case(
            {"scores": floats(B, K)}, {"scale": scale}, {"eps": 0.1}, ("scores",)
        )
    # One prompt in the middle has a single response and thus no pair.
    responses = np.arange(K) < np.array([K, 2, 1, 3])[:, None]
    cases["ranking_loss"] = Case(
        {"scores": floats(B, K), "mask": responses},
        {},
        {},
        ("scores",),
        under("mask", "scores"),
        float((responses.sum(1) > 1).sum()),
    )
    cases["kl_penalty_policy_loss"] = Case(
        {"logprobs": logprobs, "old_logprobs": old, "advantages": floats(B, T), "mask": mask},
        {},
        {"kl_coef": 0.3},
        ("logprobs", "old_logprobs", "advantages"),
        under("mask", "logprobs", "old_logprobs", "advantages"),
        tokens_real,
    )
    # One row in the middle has no real token.
    short = mask & rows[:, None]
    counts = {"sequence": rows_real, "token": float(short.sum()), "constant": float(B * T)}
    for reduction, count in counts.items():
        of_tokens = {"logprobs": logprobs, "old_logprobs": old, "ref_logprobs": ref}
        cases[f"grpo_loss/{reduction}"] = Case(
            {**of_tokens, "advantages": floats(B), "mask": short},
            {"reduction": reduction},
            {"kl_coef": 0.3, "clip_range": 0.2, "clip_range_high": 0.3},
            (*of_tokens, "advantages"),
            under("mask", *of_tokens),
            count,
        )
    # Responses that part at the second token, but for the last pair: it has no difference.
    others = np.where(np.arange(T) < 1, tokens, (tokens + 1) % V).astype(np.int32)
    others_mask = np.arange(T) < rng.integers(2, T, size=B)[:, None]
    others[-1], others_mask[-1] = tokens[-1], mask[-1]
    judged = {"chosen_scores": floats(B, T), "rejected_scores": floats(B, T)}
    judged |= {"chosen_tokens": tokens, "rejected_tokens": others}
    judged |= {"chosen_mask": mask, "rejected_mask": others_mask, "mask": rows}
    for past_end in ("last", "published"):
        # What is published reads the scores on padding too.
        names = ("tokens", "scores") if past_end == "last" else ("tokens",)
        cases[f"tokenwise_pairwise_loss/{past_end}"] = Case(
            judged,
            {"past_end": past_end},
            {},
            ("chosen_scores", "rejected_scores"),
            {f"{side}_{name}": f"{side}_mask" for side in ("chosen", "rejected") for name in names},
            rows_real,
        )
    cases |= preference_cases(rng, rows)
    for kind in ("k1", "k2", "k3"):
        cases[f"kl_estimate/{kind}"] = Case(
            {"logprobs": logprobs, "ref_logprobs": ref},
            {"kind": kind},
            {},
            ("logprobs", "ref_logprobs"),
        )
    return cases


def preference_cases(rng, rows):
    """Losses of log-probabilities of whole responses; `rows` is the mask of pairs."""

    def logprobs(size):
        return -np.exp(rng.normal(size=size)).astype(np.float32)

    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    pairs = {name: logprobs(B) for name in names}
    rows_real = float(rows.sum())
    cases = {}
    for kind in ("sigmoid", "hinge", "ipo", "robust"):
        smoothing = {"label_smoothing": 0.2} if kind in ("sigmoid", "robust") else {}
        cases[f"dpo_loss/{kind}"] = Case(
            {**pairs, "mask": rows},
            {"kind": kind},
            {"beta": 0.3, **smoothing},
            tuple(pairs),
            under("mask", *pairs),
            rows_real,
        )
    policy = {name: pairs[name] for name in ("policy_chosen", "policy_rejected")}
    cases["simpo_loss"] = Case(
        {**policy, "mask": rows},
        {},
        {"beta": 1.5, "gamma": 0.7},
        tuple(policy),
        under("mask", *policy),
        rows_real,
    )
    # nll is 0, so that an empty mask leaves nothing, and parts of a batch do not count it twice.
    cases["orpo_loss"] = Case(
        {**policy, "nll": np.zeros((), np.float32), "mask": rows},
        {},
        {"beta": 0.8},
        tuple(policy),
        under("mask", *policy),
        rows_real,
    )
    # Three real responses of each sort, the undesirable ones among more rows.
    undesirable = {name: logprobs(2 * B) for name in ("policy_rejected", "ref_rejected")}
    cases["kto_loss"] = Case(
        {
            **pairs,
            **undesirable,
            "kl": np.float32(0.4 + rng.random()),
            "chosen_mask": rows,
            "rejected_mask": np.arange(2 * B) % 3 == 0,
        },
        {},
        {"beta": 0.6, "desirable_weight": 1.2, "undesirable_weight": 0.8},
        tuple(pairs),
        under("chosen_mask", "policy_chosen", "ref_chosen")
        | under("rejected_mask", "policy_rejected", "ref_rejected"),
        2 * rows_real,
    )
    return cases
