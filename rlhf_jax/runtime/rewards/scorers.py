"""What scores responses: reward models on the device, functions in Python, sums of several."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.batches import Sequences
from rlhf_jax.data.chat import completion_texts
from rlhf_jax.data.datasets import Settings as DataSettings
from rlhf_jax.data.encoding import encode, pad_left, pad_right, warn, width, with_eos
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.partition import batch_sharding, tree_shardings
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.runtime import loading as assemble
from rlhf_jax.runtime.config import ModelSettings
from rlhf_jax.runtime.evaluation.responses import decode
from rlhf_jax.runtime.rewards.sources import RewardSource, check_names, plain_name, resolve_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# (tokens, mask), int[N, T] and bool[N, T], right-padded: a response to each of N prompts.
Tokens = tuple[Any, Any]
NARROWEST = 8  # of the widths that texts are padded to


class Named(NamedTuple):
    """A source of scores that was found, but not loaded.

    Attributes:
      name: of its metric.
      source: what the configuration says of it.
      function: it, where it is one.
    """

    name: str
    source: RewardSource
    function: assemble.ScoreFunction | None


def find_sources(
    reward_path: str | None,
    sources: Sequence[RewardSource],
    reward_fn: assemble.ScoreFunction | None = None,
) -> list[Named]:
    """All sources of scores, none where there are none; functions are imported, nothing is read.

    Args:
      reward_path: `model.reward_path`.
      sources: the section `rewards`.
      reward_fn: one more of weight 1, in place of `reward_path` where no source stands for that.

    Raises:
      InputError: a function cannot be found, or two sources have one name.
    """
    if reward_fn is not None and not any(source.is_bare for source in sources):
        reward_path = None
    found = []
    for source in resolve_sources(reward_path, sources):
        function = None if source.function is None else assemble.load_function(source.function)
        found.append(Named(source.name or "", source, function))
    if reward_fn is not None:
        name = plain_name(getattr(reward_fn, "__name__", "reward_fn"))
        found.append(Named(name, RewardSource(), reward_fn))
    check_names([each.name for each in found])
    return found


class Responses:
    """One or more responses to each of N prompts, as tokens and, where asked for, as texts.

    Args:
      tokenizer: of the tokens.
      prompts, prompt_mask: int[N, P] and bool[N, P], left-padded.
      candidates: the policy's responses, and perhaps the reference responses after them.
      columns: the other columns of the data set, N values each.
      indices: int[N], the row of the data set that each prompt is from.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompts: Any,
        prompt_mask: Any,
        candidates: Sequence[Tokens],
        columns: dict[str, list[Any]],
        indices: Any,
    ) -> None:
        self.tokenizer, self.columns = tokenizer, columns
        self.prompts, self.prompt_mask = prompts, prompt_mask
        self.candidates = tuple(candidates)
        self.indices = np.asarray(indices).tolist()

    @functools.cached_property
    def prompt_texts(self) -> list[str]:
        """The prompts without special tokens."""
        return decode(self.tokenizer, self.prompts, self.prompt_mask)

    @functools.cached_property
    def texts(self) -> list[list[str]]:
        """N texts without special tokens for each of the candidates."""
        return [decode(self.tokenizer, tokens, mask) for tokens, mask in self.candidates]

    @functools.cached_property
    def ended(self) -> list[np.ndarray]:
        """bool[N] for each of the candidates: whether EOS is its last token."""
        return [
            _last_tokens(np.asarray(tokens), np.asarray(mask)) == self.tokenizer.eos_token_id
            for tokens, mask in self.candidates
        ]


class ModelScores:
    """Scores by a reward model.

    Args:
      model: its trunk.
      tokenizer: its own, if that is another than the policy's: it is then given texts.
      shardings: of its parameters and of the rows of a batch; by default all is on one device.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast | None = None,
        shardings: tuple[Any, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._warned, self._rows = False, None

        def score(params, prompts, prompt_mask, candidates):
            sequences = Sequences(prompts, prompt_mask, *_stacked(candidates))
            return end_scores(model, params, sequences)

        if shardings is None:
            self._score = jax.jit(score)
        else:
            params, rows = shardings
            self._rows = rows
            placed = (params, rows, rows, rows)
            self._score = jax.jit(score, in_shardings=placed, out_shardings=rows)

    def __call__(self, params: Params, responses: Responses, batch_size: int) -> np.ndarray:
        """f32[N, K]; `batch_size` prompts are on the device at a time."""
        if self.tokenizer is None:
            arrays = (responses.prompts, responses.prompt_mask, responses.candidates)
        else:
            arrays = self._encoded(responses)
        count = arrays[0].shape[0]
        parts = []
        for start in range(0, count, batch_size):
            part = arrays if count == batch_size else _rows(arrays, start, batch_size)
            part = part if self._rows is None else hosts.from_host(part, self._rows)
            parts.append(self._score(params, *part))
        return np.concatenate(hosts.to_host(parts))[:count]

    def _encoded(self, responses: Responses) -> tuple[Any, Any, tuple[Tokens, ...]]:
        """The texts as tokens of its own; their widths are powers of two, so that few compile."""
        assert self.tokenizer is not None
        most = self.model.config.n_positions
        prompts, candidates, cut = retokenize(
            self.tokenizer, most, responses.prompt_texts, responses.texts, responses.ended
        )
        if cut and not self._warned:
            what = f"prompts or responses were cut to the reward model's {most} positions."
            warn(cut, len(prompts), what)
            self._warned = True
        longest = max(len(row) for rows in candidates for row in rows)
        placed = pad_left(prompts, _power_of_two(max(map(len, prompts)), most))
        columns = _power_of_two(longest, most)
        return (*placed, tuple(pad_right(rows, columns) for rows in candidates))


class FunctionScores:
    """Scores by a function in Python; those of the reference responses are asked for once."""

    def __init__(self, function: assemble.ScoreFunction) -> None:
        self.function = function
        self._references: dict[int, float] = {}

    def __call__(self, params: Params, responses: Responses, batch_size: int) -> np.ndarray:
        """f64[N, K]; the function is called once with all texts."""
        del params, batch_size
        scores = [self._call(responses, responses.texts[0], list(range(len(responses.indices))))]
        if len(responses.texts) > 1:
            scores.append(self._reference_scores(responses))
        return np.stack([np.asarray(each) for each in scores], axis=1)

    def _reference_scores(self, responses: Responses) -> list[float]:
        places = {index: place for place, index in enumerate(responses.indices)}
        new = [place for index, place in places.items() if index not in self._references]
        if new:
            scores = self._call(responses, responses.texts[1], new)
            indices = [responses.indices[place] for place in new]
            self._references.update(zip(indices, scores, strict=True))
        return [self._references[index] for index in responses.indices]

    def _call(self, responses: Responses, texts: list[str], places: list[int]) -> list[float]:
        prompts = [responses.prompt_texts[place] for place in places]
        columns = {
            name: [values[place] for place in places] for name, values in responses.columns.items()
        }
        return assemble.call_scores(
            self.function, prompts, [texts[place] for place in places], columns
        )


class Rewards:
    """The weighted sum of what all sources give.

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
        scorers: Sequence[ModelScores | FunctionScores],
    ) -> None:
        self.names, self.weights, self.scorers = list(names), list(weights), list(scorers)

    @property
    def single(self) -> Model | None:
        """The reward model whose scores of tokens are all there is to it; None if there is more."""
        if self.weights != [1.0] or not isinstance(self.scorers[0], ModelScores):
            return None
        return self.scorers[0].model if self.scorers[0].tokenizer is None else None

    @property
    def token_models(self) -> list[Model]:
        """The reward models that score tokens, not texts."""
        models = [scorer for scorer in self.scorers if isinstance(scorer, ModelScores)]
        return [scorer.model for scorer in models if scorer.tokenizer is None]

    def __call__(
        self, params: Sequence[Params], responses: Responses, batch_size: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(f32[N], parts): scores of the policy's responses, less those of the references.

        Parts, float[N] each, are `objective/rewards/NAME`, what each of several sources gave to the
        policy's responses, and where there are references `objective/raw_scores` and
        `objective/reference_scores`, the weighted sums.
        """
        left = iter(params)
        given = [
            scorer(next(left) if isinstance(scorer, ModelScores) else None, responses, batch_size)
            for scorer in self.scorers
        ]
        parts = {}
        if len(given) > 1:
            for name, scores in zip(self.names, given, strict=True):
                parts[f"objective/rewards/{name}"] = scores[:, 0]
        weighted = [weight * scores for weight, scores in zip(self.weights, given, strict=True)]
        total = sum(weighted[1:], start=weighted[0])
        scores = total[:, 0]
        if total.shape[1] > 1:
            parts |= {"objective/raw_scores": scores, "objective/reference_scores": total[:, 1]}
            scores = scores - total[:, 1]
        return self._checked(scores), parts

    def _checked(self, scores: np.ndarray) -> np.ndarray:
        """f32[N], if all are finite in that."""
        with np.errstate(over="ignore"):
            scores = np.asarray(scores, np.float32)
        if not np.isfinite(scores).all():
            raise InputError(
                f"The scores of {', '.join(self.names)} come to {scores[~np.isfinite(scores)][0]}: "
                "give rewards that are finite in float32."
            )
        return scores


def load_rewards(
    found: Sequence[Named],
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerFast,
    mesh: Mesh | None = None,
) -> tuple[Rewards, tuple[Params, ...]]:
    """What scores responses, and the parameters of its reward models.

    Args:
      found: the sources, at least one.
      tokenizer: the policy's.
      mesh: where the reward models are and run; by default on one device.

    Raises:
      InputError: a reward model or its tokenizer cannot be read.
    """
    scorers: list[ModelScores | FunctionScores] = []
    params: list[Params] = []
    for each in found:
        if each.function is not None:
            scorers.append(FunctionScores(each.function))
            continue
        path = each.source.path or ""
        model, tree, theirs = assemble.load_reward(path, settings, each.source.label, mesh)
        shares = assemble.shares_tokens(tokenizer, theirs)
        assemble.check_vocabulary(model, tokenizer if shares else theirs, path)
        shardings = None if mesh is None else (tree_shardings(mesh, tree), batch_sharding(mesh))
        scorers.append(ModelScores(model, None if shares else theirs, shardings))
        params.append(tree)
    weights = [each.source.weight for each in found]
    return Rewards([each.name for each in found], weights, scorers), tuple(params)


def reference_tokens(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, settings: DataSettings
) -> Tokens:
    """The reference responses of "references" rows, EOS appended once, as int and bool [N, T].

    They keep their first `max_response_length` tokens, as the judged responses of pairs do.
    """
    most, eos = settings.max_response_length, tokenizer.eos_token_id
    texts = [
        completion_texts(row["prompt"], row["completion"], number, tokenizer)[1]
        for number, row in enumerate(rows, 1)
    ]
    found = [with_eos(ids, eos) for ids in encode(tokenizer, texts)]
    warn(
        sum(len(ids) > most for ids in found),
        len(found),
        "reference responses lost their right end: they exceed data.max_response_length "
        f"({most} tokens).",
    )
    cut = [ids[:most] for ids in found]
    return pad_right(cut, width([len(ids) for ids in cut], most))


def retokenize(
    tokenizer: PreTrainedTokenizerFast,
    most: int,
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    ended: Sequence[Sequence[bool] | np.ndarray],
) -> tuple[list[list[int]], list[list[list[int]]], int]:
    """Prompts and K responses to each as tokens of another tokenizer than the policy's.

    Prompt and response are tokenized apart, as in training. EOS is appended to responses that ended
    with it, and to empty ones, for there to be a token to read a score at; an empty prompt is BOS,
    or EOS where there is no BOS. A response keeps its first `most - 1` tokens, and the prompt as
    many of its last as there is room for beside its longest response.

    Args:
      most: positions of the reward model.
      texts: K lists of N.
      ended: bool[N] likewise.

    Returns:
      (prompts, K lists of responses, how many of the N rows had anything cut).
    """
    eos = tokenizer.eos_token_id
    start = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    whole = [ids or [start] for ids in encode(tokenizer, prompts)]
    responses = [
        [
            with_eos(ids, eos) if has_ended or not ids else ids
            for ids, has_ended in zip(encode(tokenizer, column), ends, strict=True)
        ]
        for column, ends in zip(texts, ended, strict=True)
    ]
    longest = [max(map(len, row)) for row in zip(*responses, strict=True)]
    cut = sum(len(row) + length > most for row, length in zip(whole, longest, strict=True))
    kept = [row[-max(1, most - length) :] for row, length in zip(whole, longest, strict=True)]
    return kept, [[ids[: most - 1] for ids in column] for column in responses], cut


def _stacked(candidates: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """K responses to each prompt in one array, padded on the right to the widest."""
    widest = max(tokens.shape[1] for tokens, _ in candidates)
    tokens, mask = (
        [jnp.pad(pair[place], ((0, 0), (0, widest - pair[place].shape[1]))) for pair in candidates]
        for place in (0, 1)
    )
    return jnp.stack(tokens, axis=1), jnp.stack(mask, axis=1)


def _last_tokens(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """int[N]: the last real token of each row, -1 where there is none."""
    last = np.maximum(mask.sum(axis=1) - 1, 0)[:, None]
    return np.where(mask.any(axis=1), np.take_along_axis(tokens, last, axis=1)[:, 0], -1)


def _rows(arrays: Any, start: int, count: int) -> Any:
    """Rows of all arrays, filled up with zeros where there are not as many."""

    def rows(array):
        part = np.asarray(array)[start : start + count]
        return np.pad(part, [(0, count - part.shape[0]), (0, 0)])

    return jax.tree.map(rows, arrays)


def _power_of_two(length: int, most: int) -> int:
    """The next power of two, at least `NARROWEST` and at most `most`.

    >>> _power_of_two(3, 100), _power_of_two(9, 100), _power_of_two(70, 100)
    (8, 16, 100)
    """
    return min(most, max(NARROWEST, 1 << (length - 1).bit_length()))
