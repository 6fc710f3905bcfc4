"""Scores of responses: by reward models on the device, functions in Python, and sums of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.batches import Sequences
from rlhf_jax.data.batching import eval_batches
from rlhf_jax.data.encoding import pad_left, pad_right, warn
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.partition import batch_sharding, tree_shardings
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.runtime import loading
from rlhf_jax.runtime.rewards.functions import ScoreFunction, call_scores, load_function
from rlhf_jax.runtime.rewards.sources import RewardSource, check_names, plain_name, resolve_sources
from rlhf_jax.runtime.rewards.texts import Responses, Tokens, retokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MIN_WIDTH = 8  # of the texts of a batch as tokens


class NamedSource(NamedTuple):
    """A source of scores whose function is imported, and whose reward model is not yet loaded.

    Attributes:
      name: of its metric.
      source: its element of the section `rewards`.
      function: of a source that is a function, else None.
    """

    name: str
    source: RewardSource
    function: ScoreFunction | None


def find_sources(
    reward_path: str | None,
    sources: Sequence[RewardSource],
    reward_fn: ScoreFunction | None = None,
) -> list[NamedSource]:
    """All sources of scores, perhaps none; functions are imported, and no model is read.

    Args:
      reward_path: `model.reward_path`.
      sources: the section `rewards`.
      reward_fn: another source, of weight 1; it takes the place of `reward_path` unless an element
        of `sources` stands for that.

    Raises:
      InputError: a function cannot be imported, or two sources have one name.
    """
    if reward_fn is not None and not any(source.is_bare for source in sources):
        reward_path = None
    named = []
    for source in resolve_sources(reward_path, sources):
        function = None if source.function is None else load_function(source.function)
        named.append(NamedSource(source.name or "", source, function))
    if reward_fn is not None:
        name = plain_name(getattr(reward_fn, "__name__", "reward_fn"))
        named.append(NamedSource(name, RewardSource(), reward_fn))
    check_names([each.name for each in named])
    return named


class ModelScorer:
    """Scores by a reward model.

    Args:
      model: its language model.
      tokenizer: its own, if it differs from the policy's: it then scores texts, not tokens.
      shardings: of its parameters and of a batch; by default all is on one device.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast | None = None,
        shardings: tuple[Any, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._has_warned, self._batch_sharding = False, None

        def score(params, sequences):
            return end_scores(model, params, sequences)

        if shardings is None:
            self._score = jax.jit(score)
        else:
            self._batch_sharding = shardings[1]
            self._score = jax.jit(score, in_shardings=shardings, out_shardings=shardings[1])

    def __call__(self, params: Params, responses: Responses, batch_size: int) -> np.ndarray:
        """f32[N, K]; `batch_size` prompts are on the device at a time."""
        if self.tokenizer is None:
            arrays = (responses.prompts, responses.prompt_mask, responses.candidates)
        else:
            arrays = self._retokenized(responses)
        sequences: Any = _stacked(*arrays)
        scores = []
        for batch in eval_batches(sequences, batch_size):
            if self._batch_sharding is not None:
                batch = hosts.from_host(batch, self._batch_sharding)
            scores.append(self._score(params, batch))
        return np.concatenate(hosts.to_host(scores))[: len(responses.indices)]

    def _retokenized(self, responses: Responses) -> tuple[Any, Any, tuple[Tokens, ...]]:
        """The texts as its own tokens; widths are powers of two, so that few shapes compile."""
        assert self.tokenizer is not None
        max_length = self.model.config.n_positions
        prompts, candidates, num_cut = retokenize(
            self.tokenizer, max_length, responses.prompt_texts, responses.texts, responses.ended
        )
        if num_cut and not self._has_warned:
            warn(
                num_cut,
                len(prompts),
                f"prompts or responses were cut to the reward model's {max_length} positions.",
            )
            self._has_warned = True
        longest = max(len(ids) for column in candidates for ids in column)
        padded = pad_left(prompts, _power_of_two(max(map(len, prompts)), max_length))
        columns = _power_of_two(longest, max_length)
        return (*padded, tuple(pad_right(column, columns) for column in candidates))


def _stacked(prompts: Any, prompt_mask: Any, candidates: Sequence[Tokens]) -> Sequences:
    """NumPy arrays with K responses to each prompt, padded on the right to the longest."""
    longest = max(tokens.shape[1] for tokens, _ in candidates)
    tokens, mask = (
        [np.pad(np.asarray(array), ((0, 0), (0, longest - array.shape[1]))) for array in arrays]
        for arrays in zip(*candidates, strict=True)
    )
    padded: tuple[Any, Any] = (np.stack(tokens, axis=1), np.stack(mask, axis=1))
    prompts, prompt_mask = np.asarray(prompts), np.asarray(prompt_mask)
    return Sequences(prompts, prompt_mask, *padded)


def _power_of_two(length: int, maximum: int) -> int:
    """The next power of two, at least `MIN_WIDTH` and at most `maximum`.

    >>> _power_of_two(3, 100), _power_of_two(9, 100), _power_of_two(70, 100)
    (8, 16, 100)
    """
    return min(maximum, max(MIN_WIDTH, 1 << (length - 1).bit_length()))


class FunctionScorer:
    """Scores by a function in Python, which scores the reference response of an example once."""

    def __init__(self, function: ScoreFunction) -> None:
        self.function = function
        self._reference_scores: dict[int, float] = {}

    def __call__(self, params: Params, responses: Responses, batch_size: int) -> np.ndarray:
        """f64[N, K]; the function is called once with all texts."""
        del params, batch_size
        scores = [self._call(responses, responses.texts[0], list(range(len(responses.indices))))]
        if len(responses.texts) > 1:
            scores.append(self._of_references(responses))
        return np.stack([np.asarray(each) for each in scores], axis=1)

    def _of_references(self, responses: Responses) -> list[float]:
        known = self._reference_scores
        places = {index: place for place, index in enumerate(responses.indices)}
        new = {index: place for index, place in places.items() if index not in known}
        if new:
            scores = self._call(responses, responses.texts[1], list(new.values()))
            known.update(zip(new, scores, strict=True))
        return [known[index] for index in responses.indices]

    def _call(self, responses: Responses, texts: list[str], places: list[int]) -> list[float]:
        prompts, completions = (
            [column[place] for place in places] for column in (responses.prompt_texts, texts)
        )
        columns = {
            name: [values[place] for place in places] for name, values in responses.columns.items()
        }
        return call_scores(self.function, prompts, completions, columns)


class Rewards:
    """The weighted sum of the scores of all sources.

    Args:
      names, weights: of the sources.
      scorers: the sources.

    The parameters of the reward models are an argument of the call, a tuple in the order of the
    sources, `()` if all are functions.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        scorers: Sequence[ModelScorer | FunctionScorer],
    ) -> None:
        self.names, self.weights, self.scorers = list(names), list(weights), list(scorers)

    @property
    def single(self) -> Model | None:
        """The reward model, if it is the only source, has weight 1 and scores tokens; else None."""
        if self.weights != [1.0] or not isinstance(self.scorers[0], ModelScorer):
            return None
        return self.scorers[0].model if self.scorers[0].tokenizer is None else None

    @property
    def models(self) -> list[Model]:
        """All reward models, in the order of their parameters."""
        return [scorer.model for scorer in self.scorers if isinstance(scorer, ModelScorer)]

    @property
    def token_models(self) -> list[Model]:
        """The reward models that score tokens, not texts."""
        models = [scorer for scorer in self.scorers if isinstance(scorer, ModelScorer)]
        return [scorer.model for scorer in models if scorer.tokenizer is None]

    def __call__(
        self, params: Sequence[Params], responses: Responses, batch_size: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(f32[N], parts): scores of the policy's responses, less those of the references.

        Parts, float[N] each, are `objective/rewards/NAME`, the scores that each of several sources
        gave to the policy's responses, and with references `objective/raw_scores` and
        `objective/reference_scores`, the weighted sums.

        Raises:
          InputError: the sum is not finite in float32.
        """
        of_models = iter(params)
        scores = [
            scorer(
                next(of_models) if isinstance(scorer, ModelScorer) else None, responses, batch_size
            )
            for scorer in self.scorers
        ]
        parts = {}
        if len(scores) > 1:
            for name, values in zip(self.names, scores, strict=True):
                parts[f"objective/rewards/{name}"] = values[:, 0]
        weighted = [weight * values for weight, values in zip(self.weights, scores, strict=True)]
        total = sum(weighted[1:], start=weighted[0])
        result = total[:, 0]
        if total.shape[1] > 1:
            parts |= {"objective/raw_scores": result, "objective/reference_scores": total[:, 1]}
            result = result - total[:, 1]
        return self._as_float32(result), parts

    def _as_float32(self, scores: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            scores = np.asarray(scores, np.float32)
        if not np.isfinite(scores).all():
            raise InputError(
                f"The scores of {', '.join(self.names)} come to {scores[~np.isfinite(scores)][0]}: "
                "give rewards that are finite in float32."
            )
        return scores


def load_rewards(
    sources: Sequence[NamedSource],
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerFast,
    mesh: Mesh | None = None,
) -> tuple[Rewards, tuple[Params, ...]]:
    """The rewards, and the parameters of their reward models.

    Args:
      sources: at least one.
      tokenizer: the policy's.
      mesh: of the reward models; by default they are on one device.

    Raises:
      InputError: a reward model or its tokenizer cannot be read.
    """
    scorers: list[ModelScorer | FunctionScorer] = []
    params: list[Params] = []
    for _, source, function in sources:
        if function is not None:
            scorers.append(FunctionScorer(function))
            continue
        path = source.path or ""
        model, tree, own_tokenizer = loading.load_reward(path, settings, source.label, mesh)
        shares_tokens = loading.shares_tokens(tokenizer, own_tokenizer)
        loading.check_vocabulary(model, tokenizer if shares_tokens else own_tokenizer, path)
        shardings = None
        if mesh is not None:
            rules = model.partition_rules
            shardings = (tree_shardings(mesh, tree, rules), batch_sharding(mesh))
        scorers.append(ModelScorer(model, None if shares_tokens else own_tokenizer, shardings))
        params.append(tree)
    names, weights = [s.name for s in sources], [s.source.weight for s in sources]
    return Rewards(names, weights, scorers), tuple(params)
