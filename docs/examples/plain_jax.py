"""PPO on a network written by hand: nothing but JAX, optax and the functions of rlhf_jax.

A recurrent network reads one letter and writes a word. The score of the word is the share of its
eight places that repeat the letter, so the policy has to learn to repeat, and not to stop early.

    python docs/examples/plain_jax.py

takes about six seconds on one CPU core. The mean score rises from below 0.1 to above 0.9.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import functional

EOS, LETTERS = 0, 8  # token 0 ends a word; tokens 1 to 8 are letters
VOCABULARY = LETTERS + 1
WIDTH, WORDS, LENGTH = 32, 64, 8  # of the network, words an iteration, tokens a word
EPOCHS, VALUE_COEF = 4, 0.1

optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


class State(NamedTuple):
    """The state of an iteration."""

    params: dict
    opt_state: optax.OptState
    ref_params: dict  # the policy as it was at the beginning


# The network: a GRU with two heads, one for the next token and one for the value.


def init_params(key):
    keys = jax.random.split(key, 4)
    return {
        "embedding": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
        "gates": jax.random.normal(keys[1], (2 * WIDTH, 2 * WIDTH)) / WIDTH**0.5,
        "candidate": jax.random.normal(keys[2], (2 * WIDTH, WIDTH)) / WIDTH**0.5,
        "policy_head": 0.1 * jax.random.normal(keys[3], (WIDTH, VOCABULARY)),
        "value_head": jnp.zeros(WIDTH),
    }


def read(params, memory, tokens):
    """The memory f32[B, D] after one more token of each row, i32[B]."""
    x = params["embedding"][tokens]
    gates = jax.nn.sigmoid(jnp.concatenate([x, memory], axis=-1) @ params["gates"])
    update, reset = jnp.split(gates, 2, axis=-1)
    candidate = jnp.tanh(jnp.concatenate([x, reset * memory], axis=-1) @ params["candidate"])
    return update * memory + (1 - update) * candidate


def sample(params, prompts, key):
    """One word for each letter i32[B]: tokens i32[B, T], drawn from the policy."""

    def step(carry, key):
        memory, token = carry
        memory = read(params, memory, token)
        token = jax.random.categorical(key, memory @ params["policy_head"])
        return (memory, token), token

    start = jnp.zeros((prompts.size, WIDTH)), prompts
    return jax.lax.scan(step, start, jax.random.split(key, LENGTH))[1].T


def forward(params, prompts, tokens):
    """Logits f32[B, T, V] and values f32[B, T] of the states in which each token was chosen.

    Token t is chosen when the prompt and the tokens before t have been read: the inputs are the
    tokens moved on by one place, so that logits[:, t] belong to tokens[:, t].
    """

    def step(memory, token):
        memory = read(params, memory, token)
        return memory, memory

    inputs = jnp.concatenate([prompts[:, None], tokens[:, :-1]], axis=1)
    _, hidden = jax.lax.scan(step, jnp.zeros((prompts.size, WIDTH)), inputs.T)
    hidden = hidden.swapaxes(0, 1)
    return hidden @ params["policy_head"], hidden @ params["value_head"]


# The task, and one iteration of PPO.


def word_scores(prompts, tokens, mask):
    """The share of the places of each word that repeat its letter, f32[B]."""
    return jnp.mean(mask & (tokens == prompts[:, None]), axis=1)


def init_state(key):
    params = init_params(key)
    return State(params, optimizer.init(params), params)


def iterate(state, key, clip_range, kl_coef):
    """One iteration: sample, score, estimate advantages, and take some clipped steps."""
    prompt_key, sample_key = jax.random.split(key)
    prompts = jax.random.randint(prompt_key, (WORDS,), 1, VOCABULARY)

    # 1. Sample. The mask is True up to and including the first EOS; what is after it is padding.
    tokens = sample(state.params, prompts, sample_key)
    mask = functional.response_mask(tokens, (EOS,))
    scores = word_scores(prompts, tokens, mask)

    # 2. Read off what the policy and the reference think of these tokens.
    logits, values = forward(state.params, prompts, tokens)
    logprobs = functional.token_logprobs(logits, tokens)
    ref_logits, _ = forward(state.ref_params, prompts, tokens)
    ref_logprobs = functional.token_logprobs(ref_logits, tokens)

    # 3. From one score per word to one advantage per token. Whitening comes after the returns.
    rewards, kl = functional.token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef)
    advantages, returns = functional.gae(rewards, values, mask, gamma=1.0, lam=0.95)
    advantages = functional.masked_whiten(advantages, mask)

    # 4. Some steps on the same words. The numbers of 2. are the old ones now, and stay as they are.
    def loss_fn(params):
        new_logits, new_values = forward(params, prompts, tokens)
        new_logprobs = functional.token_logprobs(new_logits, tokens)
        policy_loss, _ = functional.ppo_policy_loss(
            new_logprobs, logprobs, advantages, mask, clip_range=clip_range
        )
        value_loss, _ = functional.ppo_value_loss(new_values, values, returns, mask)
        return policy_loss + VALUE_COEF * value_loss

    def update(carry, _):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    start = state.params, state.opt_state
    (params, opt_state), _ = jax.lax.scan(update, start, length=EPOCHS)
    metrics = {"score": jnp.mean(scores), "kl": jnp.mean(jnp.sum(kl, axis=1))}
    return State(params, opt_state, state.ref_params), metrics


iterate_compiled = jax.jit(iterate)


def main(iterations=60, clip_range=0.2, kl_coef=0.01):
    """Trains, prints, and returns the mean score of the words of each iteration."""
    init_key, key = jax.random.split(jax.random.key(0))
    state, curve = init_state(init_key), []
    for index, iteration_key in enumerate(jax.random.split(key, iterations)):
        state, metrics = iterate_compiled(state, iteration_key, clip_range, kl_coef)
        curve.append(float(metrics["score"]))
        if index % 10 == 0 or index == iterations - 1:
            print(f"iteration {index:3}   score {curve[-1]:.3f}   KL {metrics['kl']:.2f} nats")
    return curve


if __name__ == "__main__":
    main()
