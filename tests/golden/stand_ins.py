"""Stand-ins for TRL's trainers, and the random log-probabilities that they are given."""

import collections
import types

import numpy as np
import torch

B, T = 5, 7


def stand_in(**more):
    """The attributes that trainers read: one process, in training mode, with metrics to fill."""
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        use_distributed=False,
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


def ragged(rng, batch_size):
    """int64[B, T], 1 on real tokens: the first example is full, each has one at least."""
    lengths = np.concatenate([[T], rng.integers(1, T, batch_size - 1)])
    return (np.arange(T) < lengths[:, None]).astype(np.int64)


def leaf(x, dtype=torch.float64):
    return torch.tensor(x, dtype=dtype, requires_grad=True)


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


def model_of(logprobs):
    """A model of two tokens with these log-probabilities for the first, after one prompt token."""

    def forward(**_):
        logits = logits_of(logprobs)
        return types.SimpleNamespace(logits=torch.cat([logits, logits[:, :1]], dim=1))

    return forward
