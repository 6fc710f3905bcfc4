"""Scores of responses: by reward models on the device, functions in Python, and sums of several."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.batches import Sequences
from rlhf_jax.data.batching import eval_batches
from rlhf_jax.data.encoding import pad_left, pad_right, warn
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.parallel import hosts
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.runtime import loading
from rlhf_jax.runtime.program import Placement
from rlhf_jax.runtime.rewards.functions import IDS, ScoreFunction, check_call, reads_ids, scores_of
from rlhf_jax.runtime.rewards.pool import FunctionPool, Scored
from rlhf_jax.runtime.rewards.sources import RewardSource, check_names, plain_name, resolve_sources
from rlhf_jax.runtime.rewards.texts import Responses, Tokens, retokenize
from rlhf_jax.runtime.rewards.worker import Call, bound

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MIN_WIDTH = 8  # of the texts of a batch as tokens


class NamedSource(NamedTuple):
    """A source of scores whose function is imported; None stands for a reward model, to be read."""

    name: str
    source: RewardSource
    function: ScoreFunction | None


def find_sources(
    reward_path: str | None,
    sources: Sequence[RewardSource],
    reward_fn: ScoreFunction | None = None,
) -> list[NamedSource]:
    """All sources of scores, perhaps none; functions are imported, and no model is read.

    `reward_fn` is another source, of weight 1; it takes the place of `model.reward_path` unless an
    element of `sources`, the section `rewards`, stands for that.

    Raises:
      InputError: a function cannot be imported, or two sources have one name.
    """
    if reward_fn is not None and not any(source.is_bare for source in sources):
        reward_path = None
    named = []
    for source in resolve_sources(reward_path, sources):
        function = None
        if source.function is not None:
            function = bound(source.function, source.kwargs)
        named.append(NamedSource(source.name or "", source, function))
    if reward_fn is not None:
        name = plain_name(getattr(reward_fn, "__name__", "reward_fn"))
        named.append(NamedSource(name, RewardSource(), reward_fn))
    check_names([each.name for each in named])
    return named


def check_sources_call(sources: Iterable[NamedSource], columns: Iterable[str]) -> None:
    """Raises an InputError if a reward in Python cannot be called with these columns of the data.

    Its `kwargs` are arguments already, and no columns.
    """
    for _, source, function in sources:
        if function is None:
            continue
        both = sorted({*source.kwargs} & {*columns})
        if both:
            raise InputError(
                f"rewards: {source.function} has {both[0]!r} in kwargs, which is a column of the "
                "data too; leave it out there, or rename the column by data.columns."
            )
        check_call(function, {*columns, *([IDS] if reads_ids(function) else [])})


class ModelScorer:
    """Scores by a reward model, of tokens, or of texts with a tokenizer of its own.

    Args:
      params: its parameters, of which shapes are enough.
      mesh: of the parameters.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        mesh: Mesh,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        self.model, self.tokenizer, self._has_warned = model, tokenizer, False
        self._place = Placement(mesh, model.partition_rules)
        self._score = self._place.scores(functools.partial(end_scores, model), params)

    def __call__(self, params: Params, responses: Responses, batch_size: int) -> np.ndarray:
        """f32[N, K]; `batch_size` prompts are on the device at a time."""
        arrays = (responses.prompts, responses.prompt_mask, responses.candidates)
        if self.tokenizer is not None:
            arrays = self._retokenized(responses, self.tokenizer)
        sequences: Any = _stacked(*arrays)
        batches = map(self._place.put, eval_batches(sequences, batch_size))
        scores = [self._score(params, batch) for batch in batches]
        return np.concatenate(hosts.to_host(scores))[: len(responses.indices)]

    def _retokenized(self, responses: Responses, tokenizer: Any) -> tuple[Any, Any, list[Tokens]]:
        """The texts as its own tokens; widths are powers of two, so that few shapes compile."""
        limit = self.model.config.n_positions
        prompts, candidates, num_cut = retokenize(
            tokenizer, limit, responses.prompt_texts, responses.texts, responses.ended
        )
        if not self._has_warned:
            message = f"prompts or responses were cut to the reward model's {limit} positions."
            warn(num_cut, len(prompts), message)
            self._has_warned = num_cut > 0
        longest = max(len(ids) for column in candidates for ids in column)
        padded = pad_left(prompts, _power_of_two(max(map(len, prompts)), limit))
        return *padded, [pad_right(ids, _power_of_two(longest, limit)) for ids in candidates]


def _stacked(prompts: Any, prompt_mask: Any, candidates: Sequence[Tokens]) -> Sequences:
    """NumPy arrays with K responses to each prompt, padded on the right to the longest."""
    longest = max(tokens.shape[1] for tokens, _ in candidates)
    stacked: Any = (
        np.stack([np.pad(x, ((0, 0), (0, longest - x.shape[1]))) for x in arrays], axis=1)
        for arrays in zip(*candidates, strict=True)
    )
    prompts, prompt_mask = np.asarray(prompts), np.asarray(prompt_mask)
    return Sequences(prompts, prompt_mask, *stacked)


def _power_of_two(length: int, maximum: int) -> int:
    """The next power of two, at least `MIN_WIDTH` and at most `maximum`.

    >>> _power_of_two(3, 100), _power_of_two(9, 100), _power_of_two(70, 100)
    (8, 16, 100)
    """
    return min(maximum, max(MIN_WIDTH, 1 << (length - 1).bit_length()))


class FunctionScorer:
    """Scores by a function in Python, which scores the reference response of an example once.

    Args:
      source: the settings of its calls.
    """

    def __init__(self, function: ScoreFunction, source: RewardSource | None = None) -> None:
        self.function, self.source = function, source or RewardSource()
        self.failed: np.ndarray | None = None  # bool[N], of the policy's responses in the last call
        self._reads_ids = reads_ids(function)
        self._reference_scores: dict[int, float] = {}
        self._pool: FunctionPool | None = None
        if self.source.num_processes:
            self._pool = FunctionPool(
                self.source.function or "",
                self.source.kwargs,
                num_processes=self.source.num_processes,
                timeout=self.source.timeout,
                failed_score=self.source.failed_score,
            )

    def __call__(self, params: Params, responses: Responses, batch_size: int) -> np.ndarray:
        """f64[N, K], NaN where the function gives None; all texts are scored together."""
        del params, batch_size
        indices, known = np.asarray(responses.indices).tolist(), self._reference_scores
        own, failed = self._call(responses, 0, range(len(indices)))
        self.failed = np.asarray(failed) if self._pool is not None else None
        scores = [own]
        for number in range(1, len(responses.texts)):
            new = {index: n for n, index in enumerate(indices) if index not in known}
            if new:
                of_new, _ = self._call(responses, number, new.values())
                known.update(zip(new, of_new, strict=True))
            scores.append([known[index] for index in indices])
        return np.stack([np.asarray(each) for each in scores], axis=1)

    def _call(self, responses: Responses, candidate: int, numbers: Iterable[int]) -> Scored:
        """The scores of candidate k of the prompts with these numbers."""
        numbers = list(numbers)
        prompts, completions = self._texts(responses, candidate)
        columns = dict(responses.columns)
        if self._reads_ids:
            columns = {IDS: responses.ids[candidate]} | columns
        prompts, completions, *values = (
            [column[n] for n in numbers] for column in (prompts, completions, *columns.values())
        )
        named = dict(zip(columns, values, strict=True))
        return Scored(*hosts.from_first(self._scored, prompts, completions, named))

    def _scored(self, prompts: list[Any], completions: list[Any], columns: Any) -> Scored:
        if self._pool is None:
            scores = scores_of(self.function, prompts, completions, columns, allow_none=True)
            return Scored(scores, [False] * len(scores))
        columns_of_call = [
            {name: values[n] for name, values in columns.items()} for n in range(len(prompts))
        ]
        return self._pool([*map(Call, prompts, completions, columns_of_call)])

    def _texts(self, responses: Responses, candidate: int) -> tuple[list[Any], list[Any]]:
        """Prompts and completions, texts, or messages where the source and the data have these."""
        prompts, texts = responses.prompt_texts, responses.texts[candidate]
        if not (self.source.conversations and responses.turns):
            return prompts, texts
        are_texts = [isinstance(turns, str | None) for turns in responses.turns]
        return (
            [p if is_text else t for p, t, is_text in zip(prompts, responses.turns, are_texts)],
            [
                x if is_text else [{"role": "assistant", "content": x}]
                for x, is_text in zip(texts, are_texts)
            ],
        )


@dataclasses.dataclass(frozen=True)
class Rewards:
    """The weighted sum of the scores of all sources.

    The parameters of the reward models are an argument of the call, a tuple in the order of the
    sources, `()` if all are functions.
    """

    names: Sequence[str]
    weights: Sequence[float]
    scorers: Sequence[ModelScorer | FunctionScorer]

    @property
    def _model_scorers(self) -> list[ModelScorer]:
        return [scorer for scorer in self.scorers if isinstance(scorer, ModelScorer)]

    @property
    def single(self) -> Model | None:
        """The reward model, if it is the only source, has weight 1 and scores tokens; else None."""
        return self.token_models[0] if self.weights == [1.0] and self.token_models else None

    @property
    def models(self) -> list[Model]:
        """All reward models, in the order of their parameters."""
        return [scorer.model for scorer in self._model_scorers]

    @property
    def token_models(self) -> list[Model]:
        """The reward models that score tokens, not texts."""
        return [scorer.model for scorer in self._model_scorers if scorer.tokenizer is None]

    def __call__(
        self, params: Sequence[Params], responses: Responses, batch_size: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(f32[N], parts): scores of the policy's responses, less those of the references.

        Parts, float[N] each, are `objective/rewards/NAME`, the scores that each of several sources
        gave to the policy's responses, NaN where it does not apply, `objective/failed_scores/NAME`,
        whether its call in another process failed, and with references `objective/raw_scores` and
        `objective/reference_scores`, the weighted sums.

        Raises:
          InputError: no source applies to a response, or the sum is not finite in float32.
        """
        of_models = iter(params)
        scores, parts = [], {}
        for name, scorer in zip(self.names, self.scorers, strict=True):
            own = next(of_models) if isinstance(scorer, ModelScorer) else None
            scores.append(scorer(own, responses, batch_size))
            if len(self.scorers) > 1:
                parts[f"objective/rewards/{name}"] = scores[-1][:, 0]
            if isinstance(scorer, FunctionScorer) and scorer.failed is not None:
                parts[f"objective/failed_scores/{name}"] = scorer.failed
        self._check_applies(scores, responses)
        weighted = [
            weight * np.where(np.isnan(values), 0.0, values)
            for weight, values in zip(self.weights, scores, strict=True)
        ]
        total = sum(weighted[1:], start=weighted[0])
        result = total[:, 0]
        if total.shape[1] > 1:
            parts |= {"objective/raw_scores": result, "objective/reference_scores": total[:, 1]}
            result = result - total[:, 1]
        with np.errstate(over="ignore"):
            result = np.asarray(result, np.float32)
        if not np.isfinite(result).all():
            raise InputError(
                f"The scores of {', '.join(self.names)} come to {result[~np.isfinite(result)][0]}: "
                "give rewards that are finite in float32."
            )
        return result, parts

    def _check_applies(self, scores: Sequence[np.ndarray], responses: Responses) -> None:
        """Raises an InputError where no source gave a score to a response."""
        without = np.isnan(scores).all(axis=0)
        if without.any():
            number, candidate = (int(each) for each in np.argwhere(without)[0])
            raise InputError(
                f"{' and '.join(self.names)} gave None for the completion "
                f"{responses.texts[candidate][number][:80]!r}; at least one reward has to give a "
                "number for each completion."
            )


def means_of_parts(parts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each of the parts of rewards over the responses to which it applies, if any."""
    applying = {name: values[~np.isnan(values)] for name, values in parts.items()}
    return {name: float(np.mean(values)) for name, values in applying.items() if values.size}


def load_rewards(
    sources: Sequence[NamedSource],
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerFast,
    mesh: Mesh,
) -> tuple[Rewards, tuple[Params, ...]]:
    """The rewards of at least one source, and the parameters of their reward models.

    `tokenizer` is the policy's.

    Raises:
      InputError: a reward model or its tokenizer cannot be read, or not split over the mesh.
    """
    scorers: list[ModelScorer | FunctionScorer] = []
    params: list[Params] = []
    for _, source, function in sources:
        if function is not None:
            scorers.append(FunctionScorer(function, source))
            continue
        path = source.path or ""
        model, tree, own_tokenizer = loading.load_reward(path, settings, source.label, mesh)
        shares_tokens = loading.shares_tokens(tokenizer, own_tokenizer)
        loading.check_vocabulary(model, tokenizer if shares_tokens else own_tokenizer, path)
        own = None if shares_tokens else own_tokenizer
        scorers.append(ModelScorer(model, tree, mesh, own))
        params.append(tree)
    names, weights = [s.name for s in sources], [s.source.weight for s in sources]
    return Rewards(names, weights, scorers), tuple(params)
