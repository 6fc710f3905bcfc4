"""Our numbers against the plain path, before any time is measured.

A step is run with an optimizer that adds up its gradients, on a small model with the workload's
settings, and the same is computed by `plain.py`.
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
# Prompt and response, in tokens. Attention takes queries in blocks, of which there are several in
# rows as long as these; of pairs in the prompt and in each response. Generation has no blocks.
LENGTHS = {
    "sft": (BLOCK + 7, 5),
    "reward": (BLOCK + 7, BLOCK + 5),
    "ppo": (BLOCK + 7, 5),
    "generate": (7, 5),
}
# The plain path is compiled quickly; ours is compiled as it is measured.
_quick = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


class Difference(NamedTuple):
    """What a check found.

    Attributes:
      check: the form that was checked, say "reward, 1 of 2 layers unfrozen".
      loss: the largest relative difference of losses, or of a generation's log-probabilities.
      gradients: likewise of all gradients; of a generation, the share of greedy tokens that differ.
    """

    check: str
    loss: float
    gradients: float


def check_all(workloads: Sequence[Workload]) -> list[Difference]:
    """What the steps of the workloads differ by, each form once.

    Raises:
      BenchmarkError: by more than 1e-4.
    """
    forms = dict.fromkeys(small_form(workload) for workload in workloads)
    found = []
    with jax.default_matmul_precision("highest"):
        for form in forms:
            found.append(difference(form))
            _judge(found[-1])
    return found


def small_form(workload: Workload, lengths: tuple[int, int] | None = None) -> Workload:
    """A small model with the settings of a workload: what its step computes, in a second.

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
        n_head=2,
        batch_size=4,
        prompt_length=prompt_length,
        response_length=response_length,
        num_layers_unfrozen=1 if frozen else None,
        num_ppo_epochs=2,
        # One, whose order is that of the rows: the plain path does not know the permutation.
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
    if workload.num_layers_unfrozen is not None:
        parts.append("lower layers frozen")
    if workload.kind == "ppo":
        parts.append(f"value_model {workload.value_model}")
    return ", ".join(parts)


def difference(form: Workload) -> Difference:
    """What the step of a small form differs by from the plain path."""
    checks = {"sft": _sft, "reward": _reward, "generate": _generate, "ppo": _ppo}
    return Difference(form.name, *checks[form.kind](form))


def _judge(found: Difference) -> None:
    worst = max(found.loss, found.gradients)
    if not worst <= LIMIT:  # nor NaN
        raise BenchmarkError(
            f"the check of {found.check} failed: loss and gradients differ from the plain path by "
            f"{found.loss:.1e} and {found.gradients:.1e}, and may by {LIMIT:.0e}; nothing was "
            "measured"
        )


def recording(learning_rate: float) -> optax.GradientTransformation:
    """Gradient descent whose state is the sum of all gradients until now."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads, total, params=None):
        del params
        updates = jax.tree.map(lambda x: -learning_rate * x, grads)
        return updates, jax.tree.map(jnp.add, total, grads)

    return optax.GradientTransformation(init, update)


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference of two trees, each leaf's over the largest number of that leaf.

    Of a leaf that is all but zero, over a thousandth of the largest number anywhere: what is left
    there is rounding.
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


def _sizes(form: Workload) -> plain.Sizes:
    return plain.Sizes(form.n_head, form.vocab_size)


def _stepped(form):
    """(program, state before, output of one step, arrays)."""
    arrays = make_arrays(form)
    program = make_program(form, arrays, optimizer=recording(LEARNING_RATE), dropout=False)
    key = jax.random.key(0)
    state = _quick(program.init)(key)
    state = _disturbed(state) if form.kind == "ppo" else state
    return program, state, jax.jit(program.step)(state, program.batch, key), arrays


def _disturbed(state):
    """A reference that is not the policy, and values that are not 0, so that both show."""
    frozen = {**state.frozen, "ref": jax.tree.map(lambda x: 1.2 * x, state.frozen["ref"])}
    params = jax.tree.map(jnp.copy, state.params)
    if "value_head" in params:
        kernel = jnp.linspace(-0.1, 0.1, params["value_head"]["kernel"].size)
        params["value_head"] = {"kernel": kernel, "bias": jnp.float32(0.05)}
    return state._replace(frozen=frozen, params=params)


def _sft(form):
    program, state, (after, metrics), arrays = _stepped(form)
    gradient = _quick(jax.value_and_grad(plain.sft_loss, argnums=1), static_argnums=0)
    loss, grads = gradient(_sizes(form), state.params, arrays["tokens"], arrays["loss_mask"])
    return relative(metrics[program.loss], loss), relative(after.opt_state, grads)


def _reward(form):
    program, state, (after, metrics), arrays = _stepped(form)
    whole = {**state.params, "model": _whole(program, state.frozen, state.params["model"])}
    rows = (arrays[name] for name in ("prompts", "chosen", "rejected"))
    gradient = _quick(jax.value_and_grad(plain.reward_loss, argnums=1), static_argnums=0)
    loss, grads = gradient(_sizes(form), whole, *rows)
    grads = {**grads, "model": _trained(program, form, grads["model"])}
    return relative(metrics[program.loss], loss), relative(after.opt_state, grads)


def _generate(form):
    program, _, rollout, arrays = _stepped(form)
    # The same numbers, as a checkpoint would hold them.
    params = _quick(program.model.init)(jax.random.key(0))
    rows = jnp.concatenate([arrays["prompts"], rollout.tokens], axis=1)
    length = form.response_length
    logprobs = _quick(plain.token_logprobs, static_argnums=0)(_sizes(form), params, rows)
    logprobs = logprobs[:, -length:]
    sample = functools.partial(generate, program.model, max_new_tokens=length, temperature=0.0)
    likeliest = jax.jit(sample)(params, *program.batch, jax.random.key(0))
    greedy = _quick(plain.greedy, static_argnums=(0, 3))
    tokens = greedy(_sizes(form), params, arrays["prompts"], length)
    return relative(rollout.logprobs, logprobs), float(jnp.mean(tokens != likeliest.tokens))


def _ppo(form):
    program, state, (after, metrics, rollout), arrays = _stepped(form)
    settings, sizes, trunk = ppo_settings(form), _sizes(form), state.frozen.get("base")
    model = program.model
    trained = {**state.params, "model": ppo.policy_params(model, state)}
    tokens = jnp.concatenate([arrays["prompts"], rollout.tokens], axis=1)
    ref, scorer = ppo.reference_params(model, state), state.frozen["reward"]
    experience = _quick(plain.ppo_experience, static_argnums=(0, 1, 6))(
        sizes, settings, trained, ref, scorer, tokens, form.response_length
    )
    gradient = _quick(jax.value_and_grad(plain.ppo_loss, has_aux=True), static_argnums=(1, 2))
    total, losses = None, []
    for _ in range(settings.num_ppo_epochs):
        (_, loss), grads = gradient(trained, sizes, settings, experience)
        losses.append(loss)
        grads = {**grads, "model": _trained(program, form, grads["model"])}
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        upper = {**trained, "model": _trained(program, form, trained["model"])}
        upper = jax.tree.map(lambda x, g: x - LEARNING_RATE * g, upper, grads)
        trained = {**upper, "model": _whole(program, trunk, upper["model"])}
    # The policy's loss begins near 0, where a relative difference says nothing: whitened
    # advantages are of size 1.
    mean = float(jnp.mean(jnp.stack(losses)))
    loss = abs(float(metrics[program.loss]) - mean) / max(abs(mean), 1.0)
    parts = [(rollout.values, experience.values), (rollout.logprobs, experience.logprobs)]
    loss = max(loss, *(relative(*pair) for pair in parts))
    return loss, relative(after.opt_state, total)


def _whole(program, frozen, trained):
    return trained if frozen is None else program.model.merge(frozen, trained)


def _trained(program, form, params):
    """The half of a whole tree that is trained: gradients of the other are dropped."""
    if form.num_layers_unfrozen is None:
        return params
    return program.model.split(params, form.num_layers_unfrozen)[1]
