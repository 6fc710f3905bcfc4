"""The commands as Python calls: feeding the pure steps, saving what they make, and showing it."""

from rlhf_jax.runtime.commands.evaluate import run_evaluate
from rlhf_jax.runtime.commands.generate import run_generate
from rlhf_jax.runtime.commands.pipeline import run_rlhf
from rlhf_jax.runtime.stages.ppo import train_ppo
from rlhf_jax.runtime.stages.reward import train_reward
from rlhf_jax.runtime.stages.sft import train_sft

__all__ = ["run_evaluate", "run_generate", "run_rlhf", "train_ppo", "train_reward", "train_sft"]
