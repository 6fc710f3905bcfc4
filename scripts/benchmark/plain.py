"""The plain path: the same losses from full sequences, all logits, and no cache.

Written from the formulas, with nothing of the library but its parameters: GPT-2 and Llama as loops
over layers, log-probabilities from logits [B, L, V], a pair as two full sequences, and PPO with
full forward passes in each epoch. Sequences have no padding. It is slow, and is what the checks of
the benchmark compare with.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any


class Sizes(NamedTuple):
    """Sizes that the shapes of the parameters do not show.

    Attributes:
      n_head: attention heads.
      vocab_size: tokens of the embedding, without its padding.
      rope_theta, rms_norm_eps: of a Llama; None of a GPT-2.
    """

    n_head: int
    vocab_size: int
    rope_theta: float | None = None
    rms_norm_eps: float | None = None


def hidden(sizes: Sizes, params: Params, tokens: jax.Array) -> jax.Array:
    """f32[B, L, D] after the final norm."""
    model = _gpt2 if sizes.rope_theta is None else _llama
    return model(sizes, params, tokens)


def _gpt2(sizes, params, tokens):
    """Radford et al. 2019."""
    length = tokens.shape[1]
    x = params["wte"]["embedding"][tokens] + params["wpe"]["embedding"][:length]
    for i in range(params["layers"]["ln_1"]["scale"].shape[0]):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        x = x + _attention(sizes, layer["attn"], _norm(layer["ln_1"], x))
        inner = _dense(layer["mlp"]["c_fc"], _norm(layer["ln_2"], x))
        x = x + _dense(layer["mlp"]["c_proj"], _gelu(inner))
    return _norm(params["ln_f"], x)


def _attention(sizes, params, x):
    batch, length, _ = x.shape
    qkv = jnp.einsum("bld,dce->cble", x, params["c_attn"]["kernel"])
    qkv = qkv + params["c_attn"]["bias"][:, None, None]
    heads = qkv.reshape(3, batch, length, sizes.n_head, -1).transpose(0, 1, 3, 2, 4)
    return _dense(params["c_proj"], _attend(*heads))


def _attend(q, k, v):
    """[B, L, H * d] of causal attention, from [B, H, L, d] each."""
    batch, _, length, width = q.shape
    weights = q @ k.swapaxes(-1, -2) / jnp.sqrt(float(width))
    weights = jnp.where(jnp.tril(jnp.ones((length, length), bool)), weights, -jnp.inf)
    out = jax.nn.softmax(weights, axis=-1) @ v
    return out.transpose(0, 2, 1, 3).reshape(batch, length, -1)


def _llama(sizes, params, tokens):
    """Touvron et al. 2023 (arXiv:2302.13971), grouped heads and tied embeddings."""
    x = params["embed_tokens"]["embedding"][tokens]
    for i in range(params["layers"]["input_layernorm"]["scale"].shape[0]):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        h = _rms_norm(sizes, layer["input_layernorm"], x)
        x = x + _grouped_attention(sizes, layer["self_attn"], h)
        h = _rms_norm(sizes, layer["post_attention_layernorm"], x)
        gate, up = (h @ layer["mlp"][name]["kernel"] for name in ("gate_proj", "up_proj"))
        x = x + (gate / (1.0 + jnp.exp(-gate)) * up) @ layer["mlp"]["down_proj"]["kernel"]
    return _rms_norm(sizes, params["norm"], x)


def _grouped_attention(sizes, params, x):
    heads = [x @ params[f"{name}_proj"]["kernel"] for name in "qkv"]
    width = heads[0].shape[-1] // sizes.n_head
    q, k, v = (part.reshape(*x.shape[:2], -1, width).transpose(0, 2, 1, 3) for part in heads)
    groups = sizes.n_head // k.shape[1]
    k, v = (jnp.repeat(part, groups, axis=1) for part in (_turned(sizes, k), v))
    return _attend(_turned(sizes, q), k, v) @ params["o_proj"]["kernel"]


def _turned(sizes, x):
    """Rotary positions of [B, H, L, d] (Su et al. 2021), each pair a complex number."""
    half = x.shape[-1] // 2
    frequencies = sizes.rope_theta ** (-jnp.arange(half) / half)
    turn = jnp.exp(1j * jnp.arange(x.shape[2])[:, None] * frequencies)
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def _rms_norm(sizes, params, x):
    square = jnp.mean(x**2, axis=-1, keepdims=True)
    return x / jnp.sqrt(square + sizes.rms_norm_eps) * params["scale"]


def _dense(params, x):
    return x @ params["kernel"] + params["bias"]


def _gelu(x):
    return 0.5 * x * (1.0 + jnp.tanh(jnp.sqrt(2.0 / jnp.pi) * (x + 0.044715 * x**3)))


def _norm(params, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return centred / jnp.sqrt(variance + 1e-5) * params["scale"] + params["bias"]


def next_logprobs(sizes: Sizes, params: Params, states: jax.Array) -> jax.Array:
    """f32[B, L, V] of all next tokens."""
    name = "wte" if sizes.rope_theta is None else "embed_tokens"
    table = params[name]["embedding"][: sizes.vocab_size]
    return jax.nn.log_softmax(states @ table.T, axis=-1)


def token_logprobs(sizes: Sizes, params: Params, tokens: jax.Array) -> jax.Array:
    """f32[B, L - 1]: log-probabilities of the tokens from the second on."""
    logprobs = next_logprobs(sizes, params, hidden(sizes, params, tokens))[:, :-1]
    return jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]


def sft_loss(sizes: Sizes, params: Params, tokens: jax.Array, loss_mask: jax.Array) -> jax.Array:
    """Mean cross entropy of the tokens in the mask, in nats."""
    mask = loss_mask[:, 1:]
    return -jnp.sum(token_logprobs(sizes, params, tokens) * mask) / jnp.sum(mask)


def end_scores(sizes: Sizes, params: Params, tokens: jax.Array) -> jax.Array:
    """f32[B]: scores of a reward model {"model", "head"} at the last token."""
    return hidden(sizes, params["model"], tokens)[:, -1] @ params["head"]["kernel"]


def reward_loss(
    sizes: Sizes, params: Params, prompts: jax.Array, chosen: jax.Array, rejected: jax.Array
) -> jax.Array:
    """-log sigmoid(score of chosen - score of rejected), a mean over pairs."""
    better, worse = (
        end_scores(sizes, params, jnp.concatenate([prompts, responses], axis=1))
        for responses in (chosen, rejected)
    )
    return jnp.mean(jnp.log1p(jnp.exp(worse - better)))


def dpo_loss(
    sizes: Sizes, params: Params, prompts: jax.Array, chosen: jax.Array, rejected: jax.Array
) -> jax.Array:
    """-log sigmoid(0.1 * (log-probability of chosen - of rejected)), a mean over pairs.

    The reference finds both equally likely.
    """
    better, worse = (
        token_logprobs(sizes, params, jnp.concatenate([prompts, responses], axis=1))[
            :, -responses.shape[1] :
        ].sum(axis=1)
        for responses in (chosen, rejected)
    )
    return jnp.mean(jnp.log1p(jnp.exp(0.1 * (worse - better))))


def grpo_loss(
    sizes: Sizes, params: Params, tokens: jax.Array, advantages: jax.Array, length: int
) -> jax.Array:
    """-A * ratio of the last T tokens of each sequence, a mean over tokens; the ratios are 1."""
    logprobs = token_logprobs(sizes, params, tokens)[:, -length:]
    return -jnp.mean(advantages[:, None] * jnp.exp(logprobs - jax.lax.stop_gradient(logprobs)))


def greedy(sizes: Sizes, params: Params, prompts: jax.Array, length: int) -> jax.Array:
    """i32[B, length]: the most likely tokens, each by a pass over all previous tokens."""
    tokens = prompts
    for _ in range(length):
        logprobs = next_logprobs(sizes, params, hidden(sizes, params, tokens))[:, -1]
        token = jnp.argmax(logprobs, axis=-1).astype(tokens.dtype)
        tokens = jnp.concatenate([tokens, token[:, None]], axis=1)
    return tokens[:, prompts.shape[1] :]


class Experience(NamedTuple):
    """The data of the PPO epochs: f32[B, T] each, except `tokens` i32[B, P + T]."""

    tokens: jax.Array
    logprobs: jax.Array
    values: jax.Array
    advantages: jax.Array
    returns: jax.Array


def ppo_values(sizes: Sizes, trained: Params, tokens: jax.Array, length: int) -> jax.Array:
    """f32[B, T]: values of the states in which the last T tokens are chosen.

    Args:
      trained: {"model": the policy, "value_head"} or {"model", "value_model": {"model", "head"}},
        with full parameters.
    """
    own = trained.get("value_model")
    head = trained["value_head"] if own is None else own["head"]
    states = hidden(sizes, trained["model"] if own is None else own["model"], tokens)
    return states[:, -length - 1 : -1] @ head["kernel"] + head["bias"]


def ppo_experience(
    sizes: Sizes, settings: Any, trained: Params, ref: Params, scorer: Params, tokens, length: int
) -> Experience:
    """Log-probabilities, values, advantages and returns of the last T tokens of each sequence."""
    logprobs, ref_logprobs = (
        token_logprobs(sizes, params, tokens)[:, -length:] for params in (trained["model"], ref)
    )
    values = ppo_values(sizes, trained, tokens, length)
    rewards = -settings.kl_coef * (logprobs - ref_logprobs)
    rewards = rewards.at[:, -1].add(end_scores(sizes, scorer, tokens))
    advantage = following = jnp.zeros_like(values[:, 0])
    advantages: list[jax.Array] = []
    for t in reversed(range(length)):
        delta = rewards[:, t] + settings.gamma * following - values[:, t]
        advantage = delta + settings.gamma * settings.lam * advantage
        following = values[:, t]
        advantages.insert(0, advantage)
    estimates = jnp.stack(advantages, axis=1)
    whitened = (estimates - estimates.mean()) / jnp.sqrt(jnp.var(estimates, ddof=1) + 1e-8)
    return Experience(tokens, logprobs, values, whitened, estimates + values)


def ppo_loss(
    trained: Params, sizes: Sizes, settings: Any, experience: Experience
) -> tuple[jax.Array, jax.Array]:
    """(loss, policy loss): the sum of both clipped losses, means over tokens."""
    length = experience.values.shape[1]
    logprobs = token_logprobs(sizes, trained["model"], experience.tokens)[:, -length:]
    ratio = jnp.exp(logprobs - experience.logprobs)
    clipped_ratio = jnp.clip(ratio, 1 - settings.cliprange, 1 + settings.cliprange)
    advantages = experience.advantages
    policy = -jnp.mean(jnp.minimum(advantages * ratio, advantages * clipped_ratio))
    values, old = ppo_values(sizes, trained, experience.tokens, length), experience.values
    clipped = jnp.clip(values, old - settings.cliprange_value, old + settings.cliprange_value)
    squares = ((x - experience.returns) ** 2 for x in (values, clipped))
    return policy + settings.vf_coef * 0.5 * jnp.mean(jnp.maximum(*squares)), policy
