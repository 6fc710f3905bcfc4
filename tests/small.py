"""The smallest runs that do everything, for the tests of the commands; and how two are compared."""

import errno
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np

MODEL = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 64, "dropout": 0.1}
TOKENIZER = {"vocab_size": 300}
# Something is evaluated, sampled and saved on the way, and again at the end, after four steps.
LOGGING = {"eval_every": 2, "samples_every": 2, "num_samples": 2}
STEPS = 4


def use_cache(folder):
    """Compiled programs are kept in a folder: tests and their processes run the same few."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def sft(run_dir, **sections):
    """The configuration of a supervised run of four steps, with sections laid over it."""
    base = {
        "model": MODEL,
        "tokenizer": TOKENIZER,
        "data": {"builtin_rows": 32, "eval_rows": 8, "max_length": 48, "packing": False},
        "sft": {"batch_size": 8, "eval_batch_size": 8},
        "generation": {"max_new_tokens": 4},
        "logging": LOGGING,
    }
    return _laid_over(base, sections) | {"run_dir": str(run_dir)}


def reward(run_dir, model_path, **sections):
    """The configuration of a reward-model run of four steps."""
    data = {"builtin_rows": 32, "eval_rows": 8, "max_prompt_length": 16, "max_response_length": 24}
    base = {
        "model": {"path": f"{model_path}/hf"},
        "data": data,
        "reward": {"batch_size": 8, "eval_batch_size": 8},
        "logging": LOGGING,
    }
    return _laid_over(base, sections) | {"run_dir": str(run_dir)}


def dpo(run_dir, model_path, **sections):
    """The configuration of a DPO run of four steps."""
    base = {
        "model": {"path": f"{model_path}/hf"},
        "data": {
            "builtin_rows": 32,
            "eval_rows": 8,
            "max_prompt_length": 16,
            "max_response_length": 24,
        },
        "optimizer": {"learning_rate": 1e-3},
        "dpo": {"batch_size": 8, "eval_batch_size": 8},
        "generation": {"max_new_tokens": 4},
        "logging": LOGGING,
    }
    return _laid_over(base, sections) | {"run_dir": str(run_dir)}


def kto(run_dir, model_path, **sections):
    """The configuration of a KTO run of eight steps, on pairs that are read as two examples."""
    config = dpo(run_dir, model_path)
    config["kto"] = config.pop("dpo")
    return _laid_over(config, sections)


def rft(run_dir, model_path, **sections):
    """The configuration of rejection sampling: 12 prompts in three batches, then three steps."""
    data = {"builtin_rows": 12, "eval_rows": 4, "max_prompt_length": 16, "max_length": 48}
    base = {
        "model": {"path": f"{model_path}/hf"},
        "data": data | {"packing": False},
        "optimizer": {"learning_rate": 1e-3},
        "rewards": [{"function": "tests.small:short_response"}],
        "rft": {"num_samples": 3, "keep_truncated": True, "batch_size": 4, "dropout": False},
        "generation": {"max_new_tokens": 8, "batch_size": 4},
        "logging": LOGGING,
    }
    return _laid_over(base, sections) | {"run_dir": str(run_dir)}


def ppo(run_dir, model_path, reward_path=None, **sections):
    """The configuration of a PPO run of four iterations; its KL coefficient adapts."""
    base = {
        "model": {"path": f"{model_path}/hf", "reward_path": reward_path and f"{reward_path}/hf"},
        "data": {"builtin_rows": 32, "eval_rows": 8, "max_prompt_length": 16},
        "optimizer": {"learning_rate": 1e-3},
        "ppo": {
            "total_episodes": 32,
            "batch_size": 8,
            "num_ppo_epochs": 2,
            "num_mini_batches": 1,
            "response_length": 8,
            "adaptive_kl": True,
            "horizon": 100.0,
        },
        "evaluation": {"batch_size": 8, "num_samples": 2},
        "logging": LOGGING,
    }
    return _laid_over(base, sections) | {"run_dir": str(run_dir)}


def online_dpo(run_dir, model_path, reward_path=None, **sections):
    """The configuration of an online DPO run of four iterations, two responses to each prompt."""
    config = ppo(run_dir, model_path, reward_path)
    del config["ppo"]
    config["online_dpo"] = {"total_episodes": 64, "batch_size": 8, "response_length": 8}
    return _laid_over(config, sections)


def grpo(run_dir, model_path, reward_path=None, **sections):
    """The configuration of a GRPO run of four iterations, three responses to each prompt."""
    config = ppo(run_dir, model_path, reward_path)
    del config["ppo"]
    settings = {"total_episodes": 96, "batch_size": 8, "num_generations": 3, "response_length": 8}
    config["grpo"] = settings
    return _laid_over(config, sections)


def rlhf(run_dir, **sections):
    """The configuration of all three stages, of four steps each."""
    parts = {"sft": sft("-"), "reward": reward("-", "-"), "ppo": ppo("-", "-")}
    base = {
        "model": MODEL,
        "tokenizer": TOKENIZER,
        "data": {stage: part["data"] for stage, part in parts.items()},
        "generation": parts["sft"]["generation"],
        "evaluation": parts["ppo"]["evaluation"],
        "logging": LOGGING,
    }
    base |= {stage: part[stage] for stage, part in parts.items()}
    return _laid_over(base, sections) | {"run_dir": str(run_dir)}


def _laid_over(base, sections):
    """The base with the keys of the sections put in; what is no section stands as it is."""
    merged = dict(base)
    for name, value in sections.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **value} if both else value
    return merged


def send_signal_in(patch, stage, method, at_call=1, number=signal.SIGTERM, times=1):
    """Makes a method of a stage receive a signal in its nth call, from 1, `times` times."""
    original, calls = getattr(stage, method), []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == at_call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(self, *args)

    patch.setattr(stage, method, interrupted)


def interrupt_in(patch, stage, method, at_call):
    """Makes a method of a stage receive the signal of Ctrl-C in its nth call, from 1."""
    send_signal_in(patch, stage, method, at_call, signal.SIGINT)


def short_response(prompts, completions, **columns):
    """A reward in Python: short responses are good."""
    return [-float(len(completion)) / 10 for completion in completions]


def shorter_wins(prompts, responses_a, responses_b, **columns):
    """A judge in Python, biased to the first position: the shorter response is better."""
    lengths = ((len(a), len(b)) for a, b in zip(responses_a, responses_b, strict=True))
    return [0.9 if b < a else 0.4 if b == a else 0.0 for a, b in lengths]


def no_space(*_):
    """Fails as a write to a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def entries(file):
    """The entries of a JSONL file, without times."""
    return [
        {k: v for k, v in json.loads(line).items() if k != "time" and not k.startswith("perf/")}
        for line in Path(file).read_text().splitlines()
    ]


def metrics_by_step(run_dir):
    """The metrics of each step; an evaluation after a restart has a line of its own."""
    steps = {}
    for line in entries(Path(run_dir) / "metrics.jsonl"):
        steps.setdefault(line["step"], {}).update(line)
    return steps


def checkpoint_names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def checkpoint(run_dir, step=STEPS):
    """The arrays of a checkpoint, read without knowing what they should be."""
    import orbax.checkpoint as ocp

    folder = Path(run_dir).resolve() / "checkpoints" / str(step) / "default"
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder)


def assert_same_run(first, second, step=STEPS):
    """Bit for bit: metrics, samples, the model, and the arrays of the last checkpoint."""
    assert metrics_by_step(first) == metrics_by_step(second)
    assert entries(Path(first) / "samples.jsonl") == entries(Path(second) / "samples.jsonl")
    weights = [(Path(run) / "hf" / "model.safetensors").read_bytes() for run in (first, second)]
    assert weights[0] == weights[1]
    jax.tree.map(np.testing.assert_array_equal, checkpoint(first, step), checkpoint(second, step))
