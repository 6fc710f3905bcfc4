"""What travels between the stages: named tuples of arrays, and so pytrees.

B rows, P prompt positions (left-padded), T response positions (right-padded), L = P + T. A mask is
True on real positions; token ids off the mask are 0 and mean nothing. K responses may share one
prompt.
"""

from typing import NamedTuple

import jax


class TextBatch(NamedTuple):
    """Texts for supervised fine-tuning, several to a row where they are packed.

    Attributes:
      tokens: i32[B, L].
      segments: i32[B, L], 0 on padding and 1, 2, ... for the first, second, ... text of the row;
        a token attends to its own text alone, and positions count from its start.
      loss_mask: bool[B, L], True on the tokens that the model is to predict. The first token of a
        text has nothing before it and is never among them.
      target_positions: i32[B, K], the positions of these tokens in each row, in order, then zeros;
        None where most tokens are targets. Logits are computed at these positions only.
    """

    tokens: jax.Array
    segments: jax.Array
    loss_mask: jax.Array
    target_positions: jax.Array | None = None


class PairBatch(NamedTuple):
    """Two responses to one prompt, of which the first was preferred.

    Attributes:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded. P may be 0.
      chosen, chosen_mask: i32[B, T] and bool[B, T], right-padded, EOS included.
      rejected, rejected_mask: the same for the other response.
      margin: f32[B], by how much the chosen one should win; 0 where nothing is known.
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
      responses, mask: i32[B, K, T] and bool[B, K, T], right-padded, EOS included. A place that is
        False throughout holds no response, and a row without two responses only fills up a batch.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    responses: jax.Array
    mask: jax.Array


class PromptBatch(NamedTuple):
    """Prompts to be answered.

    Attributes:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded; a row that only fills up a short
        last batch is False throughout.
      indices: i32[B], the row of the data set that each prompt is from.
      texts: of PPO-ptx, to be learned in the updates on the responses, a number of rows of their
        own; None without it.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    indices: jax.Array
    texts: TextBatch | None = None


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
    """Sampled responses with all that the PPO update reads of them.

    Attributes:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded.
      tokens, mask: i32[B, T] and bool[B, T], right-padded.
      logprobs: f32[B, T], of the policy that sampled them, in nats at the sampling temperature.
      ref_logprobs: f32[B, T], of the reference, likewise.
      values: f32[B, T], of the state in which each token was chosen.
      scores: f32[B], one number for each response, penalised, clipped and scaled.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    ref_logprobs: jax.Array
    values: jax.Array
    scores: jax.Array
