"""Kinds of `functional.dpo_loss`, for the loss and for settings; nothing here imports jax."""

from typing import Literal, get_args

DPOKind = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
DPO_KINDS: tuple[str, ...] = get_args(DPOKind)

# Kinds that sort the batch: parts of a batch do not add up to it.
BATCH_KINDS = frozenset({"aot", "aot_unpaired"})

# Kinds that a label_smoothing changes.
SMOOTHED_KINDS = frozenset({"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"})

# Kinds of the difference of both responses, in which the unknown constant of a divergence's
# implicit reward cancels; "sft" does not read the reference.
DIVERGENCE_KINDS = ("sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop", "sft")

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
DIVERGENCES: tuple[str, ...] = get_args(Divergence)
