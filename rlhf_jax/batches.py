"""Batches and rollouts: named tuples of arrays, and so pytrees. Importing this imports no jax.

B examples, P prompt positions (left-padded), T response positions (right-padded), L = P + T. A mask
is True on real positions; token ids off the mask are 0 and have no meaning. K responses may share
one prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import jax


class TextBatch(NamedTuple):
    """Texts for supervised fine-tuning, with several texts per sequence if they are packed.

    Attributes:
      tokens: i32[B, L].
      segments: i32[B, L], 0 on padding and 1, 2, ... for the first, second, ... text of the
        sequence; a token attends to its own text only, and positions count from its start.
      loss_mask: bool[B, L], True on target tokens. The first token of a text has no context and is
        never a target.
      target_positions: i32[B, K], the positions of the targets in each sequence, in order, then
        zeros; None if most tokens are targets. Logits are computed at these positions only.
    """

    tokens: jax.Array
    segments: jax.Array
    loss_mask: jax.Array
    target_positions: jax.Array | None = None


class PairBatch(NamedTuple):
    """Two responses to one prompt; the first, "chosen", was preferred.

    Attributes:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded. P may be 0.
      chosen, chosen_mask: i32[B, T] and bool[B, T], right-padded, EOS included.
      rejected, rejected_mask: the same for the other response.
      margin: f32[B], the required difference of scores; 0 if unknown.
      valid: bool[B], False on the padding of a short last batch.
      ref_chosen, ref_rejected: f32[B], log-probabilities of the responses under a reference, in
        nats: sums over their tokens. None where they are not read, or computed in the step.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    chosen: jax.Array
    chosen_mask: jax.Array
    rejected: jax.Array
    rejected_mask: jax.Array
    margin: jax.Array
    valid: jax.Array
    ref_chosen: jax.Array | None = None
    ref_rejected: jax.Array | None = None


class UnpairedBatch(NamedTuple):
    """One response to each prompt, desirable or not.

    Attributes:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded.
      responses, mask: i32[B, T] and bool[B, T], right-padded, EOS included.
      other, other_mask: the same for the response of another example, to another prompt; their
        log-probabilities after this prompt estimate the KL divergence from a reference.
      labels: bool[B], True for desirable responses.
      valid: bool[B], False on the padding of a short last batch.
      ref_response, ref_other: f32[B], log-probabilities of both under a reference, in nats: sums
        over their tokens. None where they are computed in the step.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    responses: jax.Array
    mask: jax.Array
    other: jax.Array
    other_mask: jax.Array
    labels: jax.Array
    valid: jax.Array
    ref_response: jax.Array | None = None
    ref_other: jax.Array | None = None


class RankingBatch(NamedTuple):
    """Up to K responses to one prompt, the best one first.

    Attributes:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded. P may be 0.
      responses, mask: i32[B, K, T] and bool[B, K, T], right-padded, EOS included. The mask of a
        missing response is False everywhere; an example without two responses is padding of the
        batch.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    responses: jax.Array
    mask: jax.Array


class PromptBatch(NamedTuple):
    """Prompts for sampling responses.

    Attributes:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded; the mask of an entry that pads a
        short last batch is False everywhere.
      indices: i32[B], the index of each prompt in the data set.
      texts: of PPO-ptx, trained on in the same updates as the responses, with a batch size of their
        own; None without it.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    indices: jax.Array
    texts: TextBatch | None = None


class Sequences(NamedTuple):
    """Prompts and their responses.

    Attributes:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded.
      tokens, mask: i32[B, T] and bool[B, T], right-padded, EOS included; with K responses to each
        prompt i32[B, K, T] and bool[B, K, T], each of which attends to the prompt and to itself.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array


class Rollout(NamedTuple):
    """Sampled responses; with K to each prompt all arrays are [B, K, T].

    Attributes:
      tokens: i32[B, T], 0 off the mask.
      mask: bool[B, T], True up to and including the stop token.
      logprobs: f32[B, T] in nats, under the distribution that was sampled from (temperature,
        top-k and top-p included); 0 off the mask, and everywhere when decoding greedily.
    """

    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array

    @property
    def acted(self) -> jax.Array | None:
        """None: the policy sampled all tokens."""
        return None

    @property
    def actions(self) -> jax.Array:
        """bool[B, T]: the tokens that the policy sampled."""
        return self.mask


class TurnRollout(NamedTuple):
    """A `Rollout` of several turns, in which an environment wrote some of the tokens.

    Attributes:
      tokens, mask, logprobs: as in `Rollout`; logprobs are 0 on the text of the environment.
      acted: bool[B, T], the tokens of the mask that the policy sampled.
    """

    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    acted: jax.Array

    @property
    def actions(self) -> jax.Array:
        """bool[B, T]: the tokens that the policy sampled."""
        return self.acted


class ScoredRollout(NamedTuple):
    """Sampled responses with the inputs of an update.

    With K responses to each prompt, arrays of tokens are [B, K, T], and scores f32[B, K].

    Attributes:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded.
      tokens, mask: i32[B, T] and bool[B, T], right-padded.
      logprobs: f32[B, T], of the policy that sampled them, in nats at the sampling temperature.
      ref_logprobs: f32[B, T], of the reference, likewise; None without one.
      values: f32[B, T], of the state in which each token was chosen; None without a value model.
      scores: f32[B], one number for each response, penalised, clipped and scaled.
      advantages: f32[B, T], as the policy loss reads them; None before they are computed, and from
        trainers without any of tokens.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    ref_logprobs: jax.Array | None
    values: jax.Array | None
    scores: jax.Array
    advantages: jax.Array | None = None
