"""Responses of several turns: what is sampled, what the environment writes, and what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import PromptBatch, Rollout, Sequences, TurnRollout
from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.rollout.score import response_logprobs
from rlhf_jax.runtime import train_grpo
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages.groups import GroupStage
from rlhf_jax.training import grpo, rloo_settings
from tests import small

REPLY = " yes"


def environment(prompts, transcripts, **columns):
    """Ends a response with two replies, and odd prompts at once."""
    assert len(prompts) == len(transcripts)
    return [None if text.count(REPLY) >= 2 else REPLY for text in transcripts]


def bad_reply(prompts, transcripts, **columns):
    return [5 for _ in transcripts]


def config(folder, sft_run, **settings):
    turns = {
        "environment_fn": "tests.runtime.sampling.test_turns:environment",
        "stop_strings": ["e", "a"],
        "turn_length": 4,
        "max_turns": 3,
        "response_length": 14,
        "total_episodes": 48,
        "beta": 0.1,
    }
    return small.grpo(
        folder,
        sft_run[0],
        grpo={**turns, **settings},
        rewards=[{"function": "tests.small:short_response"}],
        logging={"eval_every": 0, "samples_every": 1},
    )


def replies_in(tokenizer, tokens, own):
    """The number of replies in a response, each behind a turn that has an end."""
    reply = tokenizer.encode(REPLY, add_special_tokens=False)
    starts = [t for t in range(1, len(tokens)) if own[t - 1] and not own[t]]
    turns = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(own)) + 1)
    assert own[0]
    for turn in turns:
        part = tokens[turn[0] : turn[-1] + 1]
        if not own[turn[0]]:
            assert part == reply[: len(part)]
        elif turn[-1] + 1 < len(tokens):
            stops = [stop in tokenizer.decode(part) for stop in "ea"]
            assert any(stops) or len(part) == 4 or part[-1] == tokenizer.eos_token_id
            assert not any(stop in tokenizer.decode(part[:-1]) for stop in "ea")
    return len(starts)


@pytest.mark.newest
def test_a_run_with_an_environment_trains_on_its_own_tokens_and_continues_bit_for_bit(
    tmp_path, monkeypatch, sft_run
):
    rollouts, step = [], GroupStage.step

    def kept(self, state, index):
        sampled = self._sample(state, self._batch(index), jax.random.fold_in(self.key, index))
        again = self._sample(state, self._batch(index), jax.random.fold_in(self.key, index))
        jax.tree.map(np.testing.assert_array_equal, sampled, again)
        if not rollouts:
            policy = grpo.policy_params(self.model, state)
            batch = self._batch(index)
            sequences = Sequences(*batch[:2], sampled.tokens, sampled.mask)
            logprobs, _, _ = jax.jit(response_logprobs, static_argnums=0)(
                self.model, policy, sequences, temperature=1.0
            )
            rollouts.append((self.tokenizer, jax.device_get(sampled), np.asarray(logprobs)))
        return step(self, state, index)

    with monkeypatch.context() as patch:
        patch.setattr(GroupStage, "step", kept)
        result = train_grpo(config(tmp_path / "one", sft_run))
    ((tokenizer, rollout, logprobs),) = rollouts
    acted, mask = rollout.acted, rollout.mask
    np.testing.assert_allclose(rollout.logprobs[acted], logprobs[acted], atol=2e-5)
    assert not rollout.logprobs[~acted].any()
    assert mask[acted].all()
    num_replies = sum(
        replies_in(tokenizer, rollout.tokens[row][mask[row]].tolist(), acted[row][mask[row]])
        for row in np.ndindex(mask.shape[:2])
    )
    assert num_replies > mask.shape[0] * mask.shape[1]
    assert 0 < result.metrics["completions/mean_length"] < 13
    assert result.metrics["sampling/sampling_logp_difference/max"] < 2e-5

    with monkeypatch.context() as patch:
        small.interrupt_in(patch, GroupStage, "step", 2)
        with pytest.raises(loop.Interrupted):
            train_grpo(config(tmp_path / "two", sft_run))
    train_grpo(config(tmp_path / "two", sft_run))
    small.assert_same_run(tmp_path / "one", tmp_path / "two", step=2)


@pytest.mark.newest
def test_replies_of_an_environment_change_no_gradient_but_through_the_context():
    model = GPT2(GPT2Config(vocab_size=11, n_positions=12, n_embd=8, n_layer=1, n_head=1))
    params = model.init(jax.random.key(0))
    settings = grpo.Settings(batch_size=2, num_generations=2, response_length=6, beta=0.5)
    rng = np.random.default_rng(0)
    mask = np.ones((2, 2, 6), bool)
    mask[0, 1, 4:] = False
    acted = mask.copy()
    acted[:, :, 2:4] = False
    tokens = jnp.asarray(np.where(mask, rng.integers(0, 11, mask.shape), 0))
    batch = PromptBatch(jnp.ones((2, 3), int), jnp.ones((2, 3), bool), jnp.arange(2))
    scores = jnp.asarray([[1.0, 0.0], [0.0, 3.0]])
    update = jax.jit(grpo.make_update_step(model, settings, stop_token_ids=(10,)))
    reference = jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params
    )
    state = grpo.init_state(model, params, settings, jax.random.key(1), ref_params=reference)

    def metrics_of(*acted):
        make = TurnRollout if acted else Rollout
        rollout = make(tokens, jnp.asarray(mask), jnp.zeros(mask.shape), *acted)
        return update(state, batch, rollout, scores, jax.random.key(2))[1]

    def by_loop(own):
        sequences = Sequences(*batch[:2], tokens, jnp.asarray(mask))
        (logprobs, _, _), (ref, _, _) = (
            response_logprobs(model, each, sequences, temperature=1.0)
            for each in (params, reference)
        )
        log_ratio = np.asarray(ref - logprobs, np.float64)
        kl = np.exp(log_ratio) - log_ratio - 1
        advantages = np.array([[0.5, -0.5], [-1.5, 1.5]]) / (np.array([[0.5], [4.5]]) ** 0.5 + 1e-4)
        total = sum(
            -advantages[row] + 0.5 * kl[(*row, t)]
            for row in np.ndindex(2, 2)
            for t in range(6)
            if own[(*row, t)]
        )
        return total / own.sum()

    for own, given in ((acted, [jnp.asarray(acted)]), (mask, [])):
        metrics = metrics_of(*given)
        assert metrics["train/loss"] == pytest.approx(by_loop(own), rel=1e-5)
        lengths = own.sum(axis=-1)
        assert metrics["completions/mean_length"] == lengths.mean()
    # The last response reaches the limit without a stop token; one ended before it.
    assert metrics_of(jnp.asarray(acted))["completions/clipped_ratio"] == 0.75


@pytest.mark.parametrize(
    ("name", "value"), [("stop_strings", ("=",)), ("turn_length", 4), ("max_turns", 3)]
)
def test_settings_of_turns_need_an_environment(name, value):
    for settings in (grpo.Settings, rloo_settings.Settings):
        said = rf"{settings.section}\.{name} is .*, but has an effect with {settings.section}\."
        with pytest.raises(InputError, match=said):
            settings(**{name: value})


def test_defaults_of_turns_need_no_environment():
    for given in ({}, {"stop_strings": []}, {"turn_length": None}, {"max_turns": 8}):
        assert grpo.Settings(**given).environment_fn is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"environment_fn": None}, "but has an effect with grpo.environment_fn only"),
        ({"turn_length": 15}, "grpo.turn_length must be at most grpo.response_length = 14"),
        ({"stop_strings": [""]}, "grpo.stop_strings must not hold an empty text."),
        ({"truncate_token": "x"}, "grpo.truncate_token is not for turns"),
        ({"response_length": 45, "turn_length": 8}, "exceeds the model's n_positions = 64"),
        (
            {"environment_fn": "tests.runtime.sampling.test_turns:bad_reply"},
            "bad_reply gave 5 at index 0; it has to give a text, or None where the response ends.",
        ),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, sft_run, settings, said):
    with pytest.raises(InputError) as error:
        train_grpo(config(tmp_path, sft_run, **settings))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
