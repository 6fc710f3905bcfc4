"""The commands as Python calls.

`train_NAME(config)` for each trainer in `rlhf_jax.training.TRAINERS` (`train_sft`, `train_reward`,
`train_ppo`, ...), `run_rlhf`, `run_generate`, `run_evaluate`, `run_pairs` and `run_filter`. Nothing
is imported before it is used.
"""

from typing import TYPE_CHECKING, Any

from rlhf_jax import training
from rlhf_jax.lazy import lazy_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlhf_jax.runtime.commands.evaluate import run_evaluate as run_evaluate
    from rlhf_jax.runtime.commands.generate import run_generate as run_generate
    from rlhf_jax.runtime.commands.main import train as train
    from rlhf_jax.runtime.commands.pipeline import run_rlhf as run_rlhf
    from rlhf_jax.runtime.run.stage import StageResult
    from rlhf_jax.runtime.sampling.pairs import run_pairs as run_pairs
    from rlhf_jax.runtime.sampling.prompts import run_filter as run_filter

    train_sft: Callable[..., StageResult]
    train_reward: Callable[..., StageResult]
    train_ppo: Callable[..., StageResult]

_get, _, __all__ = lazy_names(__name__)

__all__ = [*__all__, *(f"train_{trainer.name}" for trainer in training.TRAINERS)]


def __getattr__(name: str) -> Any:
    if name.startswith("train_"):
        from rlhf_jax.runtime.commands.main import train_function

        for trainer in training.TRAINERS:
            if name == f"train_{trainer.name}":
                return train_function(trainer)
    return _get(name)


def __dir__() -> list[str]:
    return sorted(__all__)
