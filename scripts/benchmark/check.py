"""Checks the measured steps against the plain path.

A step runs with an optimizer that sums its gradients, on a small model with the settings of the
workload; `plain.py` computes the same loss and gradients.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.models.attention import BLOCK
from rlhf_jax.rollout.generation import generate
from rlhf_jax.training import ppo
from scripts.benchmark import plain
from scripts.benchmark.programs import make_program, ppo_settings
from scripts.benchmark.settings import BenchmarkError
from scripts.benchmark.workloads import Workload, make_arrays

LIMIT = 1e-4
LEARNING_RATE = 0.1
# Lengths of prompt and response, in tokens, such that attention computes several blocks of queries,
# of pairs in the prompt and in each response. Generation has no blocks.
LENGTHS = {
    "sft": (BLOCK + 7, 5),
    "reward": (BLOCK + 7, BLOCK + 5),
    "dpo": (BLOCK + 7, BLOCK + 5),
    "ppo": (BLOCK + 7, 5),
    "grpo": (BLOCK + 7, 5),
    "generate": (7, 5),
}
# Compiles the plain path with few optimizations; the measured steps are compiled as in a run.
_quick = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
_sft_gradient = _quick(jax.value_and_grad(plain.sft_loss, argnums=1), static_argnums=0)
_reward_gradient = _quick(jax.value_and_grad(plain.reward_loss, argnums=1), static_argnums=0)
_dpo_gradient = _quick(jax.value_and_grad(plain.dpo_loss, argnums=1), static_argnums=0)
_grpo_gradient = _quick(jax.value_and_grad(plain.grpo_loss, argnums=1), static_argnums=(0, 4))
_ppo_experience = _quick(plain.ppo_experience, static_argnums=(0, 1, 6))
_ppo_gradient = _quick(jax.value_and_grad(plain.ppo_loss, has_aux=True), static_argnums=(1, 2))
_token_logprobs = _quick(plain.token_logprobs, static_argnums=0)
_greedy = _quick(plain.greedy, static_argnums=(0, 3))


class Difference(NamedTuple):
    """The result of a check.

    Attributes:
      check: its name, such as "reward, lower layers frozen".
      loss: the largest relative difference of losses, or of the log-probabilities of a generation.
      gradients: the same of all gradients; of a generation, the share of greedy tokens that differ.
    """

    check: str
    loss: float
    gradients: float


def check_all(workloads: Sequence[Workload]) -> list[Difference]:
    """Differences from the plain path, once for each distinct small workload.

    Raises:
      BenchmarkError: a difference above 1e-4.
    """
    results = []
    with jax.default_matmul_precision("highest"):
        for small in dict.fromkeys(small_workload(workload) for workload in workloads):
            results.append(difference(small))
            _assert_close(results[-1])
    return results


def small_workload(workload: Workload, lengths: tuple[int, int] | None = None) -> Workload:
    """The same settings with a model and a batch so small that a step takes a second.

    Args:
      lengths: of prompt and response; by default those of `LENGTHS`.
    """
    prompt_length, response_length = lengths or LENGTHS[workload.kind]
    frozen = workload.num_layers_unfrozen is not None
    scored = None if workload.ours.score_batch_size is None else 2
    return dataclasses.replace(
        workload,
        name=_title(workload),
        n_layer=2,
        n_embd=32,
        n_head=2 if workload.llama is None else 4,
        llama=workload.llama
        and dataclasses.replace(
            workload.llama, num_key_value_heads=2, intermediate_size=48, path=None
        ),
        batch_size=4,
        prompt_length=prompt_length,
        response_length=response_length,
        num_layers_unfrozen=1 if frozen else None,
        num_ppo_epochs=2,
        # With one minibatch the random order of the responses does not matter.
        num_mini_batches=1,
        vocab_size=211,
        n_positions=prompt_length + response_length,
        to_reach=None,
        towards=None,
        ours=dataclasses.replace(
            workload.ours,
            gradient_accumulation_steps=min(2, workload.ours.gradient_accumulation_steps),
            score_batch_size=scored,
        ),
    )


def _title(workload: Workload) -> str:
    parts: list[str] = [workload.kind]
    if workload.llama is not None:
        parts.append("Llama")
    if workload.num_layers_unfrozen is not None:
        parts.append("lower layers frozen")
    if workload.kind == "ppo":
        parts.append(f"value_model {workload.value_model}")
    return ", ".join(parts)


def difference(small: Workload) -> Difference:
    """The difference between the step of a small workload and the plain path."""
    checks = {
        "sft": _sft,
        "reward": _reward,
        "dpo": _dpo,
        "generate": _generate,
        "ppo": _ppo,
        "grpo": _grpo,
    }
    return Difference(small.name, *checks[small.kind](small))


def _assert_close(result: Difference) -> None:
    if not max(result.loss, result.gradients) <= LIMIT:  # also for NaN
        raise BenchmarkError(
            f"the check of {result.check} failed: loss and gradients differ from the plain path by "
            f"{result.loss:.1e} and {result.gradients:.1e}, the limit is {LIMIT:.0e}; nothing was "
            "measured"
        )


def summing_sgd(learning_rate: float) -> optax.GradientTransformation:
    """Gradient descent whose state is the sum of all gradients."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads, total, params=None):
        del params
        updates = jax.tree.map(lambda x: -learning_rate * x, grads)
        return updates, jax.tree.map(jnp.add, total, grads)

    return optax.GradientTransformation(init, update)


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference of two trees, relative to the largest number of each leaf of `theirs`.

        max over leaves of max|a - b| / max(max|b|, 1e-3 * the largest |b| of all leaves)

    The second term of the scale keeps rounding errors of leaves near 0 out.
    """
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    ]
    largest = max(float(np.max(np.abs(b))) for _, b in pairs)
    scales = [max(float(np.max(np.abs(b))), 1e-3 * largest, 1e-30) for _, b in pairs]
    differences = [
        float(np.max(np.abs(a - b))) / scale for (a, b), scale in zip(pairs, scales, strict=True)
    ]
    return float(np.max(differences))  # NaN stays NaN


def _sizes(small: Workload) -> plain.Sizes:
    llama = small.llama
    others = () if llama is None else (llama.rope_theta, llama.rms_norm_eps)
    return plain.Sizes(small.n_head, small.vocab_size, *others)


def _run_step(small):
    """(program, initial state, output of one step, arrays)."""
    arrays = make_arrays(small)
    program = make_program(small, arrays, optimizer=summing_sgd(LEARNING_RATE), dropout=False)
    key = jax.random.key(0)
    state = _quick(program.init)(key)
    state = _perturbed(state) if small.kind == "ppo" else state
    return program, state, jax.jit(program.step)(state, program.batch, key), arrays


def _perturbed(state):
    """A state whose reference differs from the policy, and whose values are not 0."""
    frozen = {**state.frozen, "ref": jax.tree.map(lambda x: 1.2 * x, state.frozen["ref"])}
    params = jax.tree.map(jnp.copy, state.params)
    if "value_head" in params:
        kernel = jnp.linspace(-0.1, 0.1, params["value_head"]["kernel"].size)
        params["value_head"] = {"kernel": kernel, "bias": jnp.float32(0.05)}
    return state._replace(frozen=frozen, params=params)


def _sft(small):
    program, state, (after, metrics), arrays = _run_step(small)
    loss, grads = _sft_gradient(_sizes(small), state.params, arrays["tokens"], arrays["loss_mask"])
    return relative(metrics[program.loss], loss), relative(after.opt_state, grads)


def _reward(small):
    program, state, (after, metrics), arrays = _run_step(small)
    full = {**state.params, "model": _full_params(program, state.frozen, state.params["model"])}
    tokens = (arrays[name] for name in ("prompts", "chosen", "rejected"))
    loss, grads = _reward_gradient(_sizes(small), full, *tokens)
    grads = {**grads, "model": _trained(program, small, grads["model"])}
    return relative(metrics[program.loss], loss), relative(after.opt_state, grads)


def _dpo(small):
    program, state, (after, metrics), arrays = _run_step(small)
    tokens = (arrays[name] for name in ("prompts", "chosen", "rejected"))
    loss, grads = _dpo_gradient(_sizes(small), state.params, *tokens)
    return relative(metrics[program.loss], loss), relative(after.opt_state, grads)


def _generate(small):
    program, _, _, arrays = _run_step(small)
    # The same parameters in the layout of a checkpoint.
    params = _quick(program.model.init)(jax.random.key(0))
    length, key = small.response_length, jax.random.key(0)
    sample = functools.partial(generate, program.model, max_new_tokens=length)
    rollout = jax.jit(sample)(params, *program.batch, key)
    sequences = jnp.concatenate([arrays["prompts"], rollout.tokens], axis=1)
    logprobs = _token_logprobs(_sizes(small), params, sequences)[:, -length:]
    greedy = jax.jit(functools.partial(sample, temperature=0.0))(params, *program.batch, key)
    tokens = _greedy(_sizes(small), params, arrays["prompts"], length)
    return relative(rollout.logprobs, logprobs), float(jnp.mean(tokens != greedy.tokens))


def _ppo(small):
    program, state, (after, metrics, rollout), arrays = _run_step(small)
    settings, sizes, base = ppo_settings(small), _sizes(small), state.frozen.get("base")
    model = program.model
    trained = {**state.params, "model": ppo.policy_params(model, state)}
    tokens = jnp.concatenate([arrays["prompts"], rollout.tokens], axis=1)
    ref, scorer = ppo.reference_params(model, state), state.frozen["reward"]
    experience = _ppo_experience(
        sizes, settings, trained, ref, scorer, tokens, small.response_length
    )
    total, losses = None, []
    for _ in range(settings.num_ppo_epochs):
        (_, loss), grads = jax.device_get(_ppo_gradient(trained, sizes, settings, experience))
        losses.append(loss)
        grads = {**grads, "model": _trained(program, small, grads["model"])}
        total = grads if total is None else jax.tree.map(np.add, total, grads)
        upper = {**trained, "model": _trained(program, small, trained["model"])}
        upper = jax.device_get(upper)
        upper = jax.tree.map(lambda x, g: x - LEARNING_RATE * g, upper, grads)
        trained = {**upper, "model": _full_params(program, base, upper["model"])}
    # The policy loss is near 0 at first, while whitened advantages are of size 1: this difference
    # is absolute.
    mean = float(np.mean(losses))
    loss = abs(float(metrics[program.loss]) - mean) / max(abs(mean), 1.0)
    parts = [(rollout.values, experience.values), (rollout.logprobs, experience.logprobs)]
    loss = max(loss, *(relative(*pair) for pair in parts))
    return loss, relative(after.opt_state, total)


def _grpo(small):
    program, state, (after, metrics, rollout), arrays = _run_step(small)
    length, groups = small.response_length, np.asarray(rollout.tokens)
    tokens = np.repeat(arrays["prompts"], groups.shape[1], axis=0)
    tokens = np.concatenate([tokens, groups.reshape(-1, length)], axis=1)
    scores = (groups % 2).mean(axis=-1)
    deviation = scores.std(axis=1, ddof=1, keepdims=True)
    advantages = (scores - scores.mean(axis=1, keepdims=True)) / (deviation + 1e-4)
    params, sizes = state.params["model"], _sizes(small)
    arrays = tokens, jnp.asarray(advantages.reshape(-1), jnp.float32)
    loss, grads = _grpo_gradient(sizes, params, *arrays, length)
    logprobs = _token_logprobs(sizes, params, tokens)[:, -length:]
    # The loss is near 0: its difference is absolute.
    difference = abs(float(metrics[program.loss]) - float(loss))
    difference = max(difference, relative(rollout.logprobs.reshape(-1, length), logprobs))
    return difference, relative(after.opt_state, {"model": grads})


def _full_params(program, frozen, trained):
    return trained if frozen is None else program.model.merge(frozen, trained)


def _trained(program, small, params):
    """The trained half of a full tree of parameters or gradients."""
    if small.num_layers_unfrozen is None:
        return params
    return program.model.split(params, small.num_layers_unfrozen)[1]
