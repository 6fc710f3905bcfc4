"""Compiler options of steps."""

import jax
import numpy as np
import pytest

from rlhf_jax.backend import compiler_options
from rlhf_jax.batches import PairBatch
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.runtime import program
from rlhf_jax.runtime.config import SFTConfig, resolve
from rlhf_jax.runtime.stages.offline import PolicyStage
from rlhf_jax.training import reward
from tests import small


def test_only_a_cpu_has_options():
    assert compiler_options("cpu")
    assert compiler_options("gpu") is None
    assert compiler_options("tpu") is None


def test_a_step_needs_less_memory():
    """A reward model's, of which a fifth and more of the temporary arrays goes."""
    model = GPT2(GPT2Config(vocab_size=512, n_positions=16, n_embd=64, n_layer=2, n_head=2))
    settings, key = reward.Settings(batch_size=2), jax.random.key(0)

    def init(key):
        return reward.init_state(model, model.init(key), settings, key)

    tokens, real = np.zeros((2, 4), np.int32), np.ones((2, 4), bool)
    batch = PairBatch(
        tokens, real, tokens, real, tokens, real, np.zeros(2, np.float32), np.ones(2, bool)
    )

    def temporaries(options):
        step = reward.make_step(model, settings)
        step = jax.jit(step, donate_argnums=0, compiler_options=options)
        compiled = step.lower(jax.eval_shape(init, key), batch, key).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(compiler_options("cpu")) < 0.9 * temporaries(None)


def test_a_stage_is_compiled_with_them(tmp_path, monkeypatch):
    platforms = []

    def unknown(platform):
        platforms.append(platform)
        return {"no_such_option": "1"}

    monkeypatch.setattr(program, "compiler_options", unknown)
    stage = PolicyStage(resolve(SFTConfig, small.sft(tmp_path)))
    shape = jax.eval_shape(stage._init, stage.params)
    lowered = stage._step.lower(shape, stage.batches.at(0), jax.random.key(0))
    with pytest.raises(Exception, match="no_such_option"):
        lowered.compile()
    assert platforms == ["cpu"]
