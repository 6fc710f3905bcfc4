"""One call of each public function on random arrays, for the tests that all functions share."""

from typing import NamedTuple

import numpy as np

B, T, V = 4, 6, 7


class Case(NamedTuple):
    """A call: function(*arrays, **options, **coefficients).

    Attributes:
      arrays: the positional arguments by name.
      options: static keyword arguments.
      coefficients: keyword arguments that may be traced.
      differentiable: names of the arrays that gradients are asked for.
    """

    arrays: dict
    options: dict = {}
    coefficients: dict = {}
    differentiable: tuple = ()


def make_cases(seed):
    """The cases by the name of their function."""
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
    pair = {"chosen": floats(B), "rejected": floats(B)}
    return {
        "masked_mean": Case({"x": floats(B, T), "mask": mask}, {}, {}, ("x",)),
        "masked_var": Case({"x": floats(B, T), "mask": mask}, {"axis": 1}, {}, ("x",)),
        "masked_whiten": Case(
            {"x": floats(B, T), "mask": mask}, {"shift_mean": False}, {"eps": 1e-8}, ("x",)
        ),
        "response_mask": Case({"tokens": tokens}, {"stop_token_ids": (2, 5)}),
        "token_logprobs": Case({"logits": logits, "tokens": targets}, {}, {}, ("logits",)),
        "token_entropy": Case({"logits": logits}, {}, {}, ("logits",)),
        "kl_estimate": Case(
            {"logprobs": logprobs, "ref_logprobs": ref},
            {"kind": "k3"},
            {},
            ("logprobs", "ref_logprobs"),
        ),
        "token_rewards": Case(
            {"scores": floats(B), "logprobs": logprobs, "ref_logprobs": ref, "mask": mask},
            {"kl_kind": "k2"},
            {"kl_coef": 0.3},
            ("scores", "logprobs", "ref_logprobs"),
        ),
        "gae": Case(
            {"rewards": floats(B, T), "values": floats(B, T), "mask": mask},
            {},
            {"gamma": 0.9, "lam": 0.8},
            ("rewards", "values"),
        ),
        "rewards_to_go": Case(
            {"rewards": floats(B, T), "mask": mask}, {}, {"gamma": 0.9}, ("rewards",)
        ),
        "cross_entropy_loss": Case(
            {"logits": logits, "targets": targets, "mask": mask},
            {},
            {"label_smoothing": 0.1, "z_loss": 0.01},
            ("logits",),
        ),
        "pairwise_loss": Case(
            pair, {}, {"margin": 0.5, "center_coef": 0.1}, ("chosen", "rejected")
        ),
        "ppo_policy_loss": Case(
            {
                "logprobs": logprobs,
                "old_logprobs": old,
                "advantages": floats(B, T),
                "mask": mask,
            },
            {},
            {"clip_range": 0.3},
            ("logprobs", "old_logprobs", "advantages"),
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
        ),
        "reinforce_loss": Case(
            {"logprobs": logprobs, "advantages": floats(B, T), "mask": mask},
            {},
            {},
            ("logprobs", "advantages"),
        ),
    }
