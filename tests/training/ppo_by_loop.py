"""One PPO iteration by loops in float64, and the smallest settings to compare them under."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import optax

from rlhf_jax.training import ppo
from tests.models.gpt2_by_loop import hidden_by_loop, log_softmax, logits_by_loop

EOS = 10
SETTINGS = ppo.Settings(
    batch_size=4,
    num_ppo_epochs=1,
    num_mini_batches=1,
    response_length=5,
    temperature=0.7,
    kl_coef=0.3,
    gamma=0.9,
    lam=0.8,
    vf_coef=0.5,
    missing_eos_penalty=0.75,
    cliprange_reward=1.5,
)
RATE = 0.05
SGD = optax.sgd(RATE)
KEY = jax.random.key(7)
SCORES = np.array([0.5, -2.0, 3.0, 1.0], np.float32)


@functools.cache  # the programs that tests share are compiled once
def update_with(model, settings):
    return jax.jit(ppo.make_update_step(model, settings, optimizer=SGD, stop_token_ids=(EOS,)))


def texts_of(scored):
    """[(prompt, response)] without padding."""
    arrays = (scored.prompts, scored.prompt_mask, scored.tokens, scored.mask)
    for prompt, prompt_mask, tokens, mask in zip(*(np.asarray(x) for x in arrays), strict=True):
        yield list(prompt[prompt_mask]), list(tokens[mask])


def logprobs_by_loop(params, config, prompt, response, temperature):
    """(log-probs of the response tokens, log-probs [T, V] that they were chosen from)."""
    if not response:
        return np.zeros(0), np.zeros((0, config.vocab_size))
    logits = logits_by_loop(params, config, prompt + response[:-1])[len(prompt) - 1 :]
    full = log_softmax(logits / temperature)
    return np.array([full[t, token] for t, token in enumerate(response)]), full


def values_by_loop(params, config, prompt, response):
    if not response:
        return np.zeros(0)
    states = hidden_by_loop(params["model"], config, prompt + response[:-1])[len(prompt) - 1 :]
    head = params["value_head"]
    return states @ np.asarray(head["kernel"], np.float64) + float(head["bias"])


def kl_by_loop(difference, kind):
    return {"k1": difference, "k3": np.exp(-difference) - 1 + difference}[kind]


def experience_by_loop(model, settings, state, scored, values=None):
    """One SimpleNamespace per example, and the numbers of the full iteration, in float64.

    `values` are those of each example, where a value model of its own gives them.
    """
    examples = []
    for i, ((prompt, response), score) in enumerate(
        zip(texts_of(scored), scored.scores, strict=True)
    ):
        example = SimpleNamespace(prompt=prompt, response=response, score=float(score))
        arguments = (model.config, prompt, response, settings.temperature)
        example.logprobs, full = logprobs_by_loop(state.params["model"], *arguments)
        example.ref_logprobs, _ = logprobs_by_loop(state.frozen["ref"], *arguments)
        example.entropy = -(np.exp(full) * full).sum(axis=1)
        example.values = (
            values_by_loop(state.params, model.config, prompt, response)
            if values is None
            else values[i]
        )
        example.kl = example.logprobs - example.ref_logprobs
        example.rewards = -float(state.kl_coef) * kl_by_loop(example.kl, settings.kl_estimator)
        if response:
            example.rewards[-1] += example.score
        examples.append(example)
    real = np.concatenate([example.rewards for example in examples])
    for example in examples:
        shaped = example.rewards
        if settings.whiten_rewards:
            scale = np.sqrt(real.var(ddof=1) + 1e-8)
            shaped = (shaped - real.mean()) / scale + real.mean()
        example.advantages = np.zeros(len(example.response))
        next_value = next_advantage = 0.0
        for t in reversed(range(len(example.response))):
            delta = shaped[t] + settings.gamma * next_value - example.values[t]
            next_advantage = delta + settings.gamma * settings.lam * next_advantage
            next_value, example.advantages[t] = example.values[t], next_advantage
        example.returns = example.advantages + example.values
    real = np.concatenate([example.advantages for example in examples])
    for example in examples:
        example.advantages = (example.advantages - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8)
    return examples


def losses_by_loop(model, settings, params, examples):
    """(policy loss, value loss, share of clipped tokens, ratio), means over the real tokens."""
    policy, value, clipped, ratios = [], [], [], []
    for example in examples:
        logprobs, _ = logprobs_by_loop(
            params["model"], model.config, example.prompt, example.response, settings.temperature
        )
        values = values_by_loop(params, model.config, example.prompt, example.response)
        for t in range(len(example.response)):
            ratio = np.exp(logprobs[t] - example.logprobs[t])
            within = min(max(ratio, 1 - settings.cliprange), 1 + settings.cliprange)
            advantage, old = example.advantages[t], example.values[t]
            policy.append(max(-advantage * ratio, -advantage * within))
            clipped.append(-advantage * within > -advantage * ratio)
            near = old + min(
                max(values[t] - old, -settings.cliprange_value), settings.cliprange_value
            )
            value.append(0.5 * max((x - example.returns[t]) ** 2 for x in (values[t], near)))
            ratios.append(ratio)
    return tuple(np.mean(x) for x in (policy, value, clipped, ratios))
