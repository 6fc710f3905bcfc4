"""Batches of arrays that the parts of the library exchange: named tuples, and so pytrees.

B is the batch size, P the positions of a prompt (left-padded), T those of a response
(right-padded), L = P + T, and K the number of responses that share one prompt. A mask is True on
real positions; token ids off the mask are 0 and have no meaning.
"""

from typing import NamedTuple

import jax


class TextBatch(NamedTuple):
    """Texts for supervised fine-tuning; a packed row holds several.

    Attributes:
      tokens: i32[B, L].
      segments: i32[B, L], 0 on padding and 1, 2, ... for the first, second, ... text of the row;
        a token attends to its own text alone, and positions count from its start.
      loss_mask: bool[B, L], True on the tokens whose prediction is trained: never the first token
        of a text.
      target_positions: i32[B, K], the positions of these tokens in each row, in order, then zeros;
        None where most tokens are targets. Logits are computed at these positions only.
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
      margin: f32[B], by how much the score of the chosen one should be higher; 0 if unknown.
      valid: bool[B], False on the padding of a short last batch.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    chosen: jax.Array
    chosen_mask: jax.Array
    rejected: jax.Array
    rejected_mask: jax.Array
    margin: jax.Array
    valid: jax.Array


class RankingBatch(NamedTuple):
    """Up to K responses to one prompt, the best one first.

    Attributes:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded. P may be 0.
      responses, mask: i32[B, K, T] and bool[B, K, T], right-padded, EOS included. A response
        without a real token is padding, and so is an example without two responses.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    responses: jax.Array
    mask: jax.Array


class PromptBatch(NamedTuple):
    """Prompts to sample responses to.

    Attributes:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded; the mask of the padding of a
        short last batch is False throughout.
      indices: i32[B], the index of each prompt in the data set.
      texts: texts that are trained on beside the responses (PPO-ptx), with a batch size of their
        own; None without them.
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
    """Sampled responses.

    Attributes:
      tokens: i32[B, T], 0 off the mask.
      mask: bool[B, T], True up to and including the stop token.
      logprobs: f32[B, T] in nats, under the distribution that was sampled from (temperature,
        top-k and top-p included); 0 off the mask, and everywhere when decoding greedily.
    """

    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array


class ScoredRollout(NamedTuple):
    """Sampled responses with the log-probabilities, values and scores that an update reads.

    Attributes:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded.
      tokens, mask: i32[B, T] and bool[B, T], right-padded.
      logprobs: f32[B, T], of the policy that sampled them, in nats at the sampling temperature.
      ref_logprobs: f32[B, T], of the reference, likewise.
      values: f32[B, T], of the state in which each token was chosen; None without a value model.
      scores: f32[B], one number for each response, penalised, clipped and scaled.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    ref_logprobs: jax.Array
    values: jax.Array | None
    scores: jax.Array
