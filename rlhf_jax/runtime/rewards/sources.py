"""The section `rewards` of a configuration: sources of scores and their weights."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from rlhf_jax.checks import NonNegativeInt, PositiveFloat, check_fields
from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class RewardSource:
    """An element of the list `rewards`; the score of a response is the weighted sum over them.

    A source with neither `path` nor `function` is the reward model of `model.reward_path`, or the
    one that `run_rlhf` trains.

    Attributes:
      path: a Hugging Face folder or hub name of a reward model. It scores tokens if it has the
        policy's tokenizer, else texts.
      function: "module:function", a reward in Python: f(prompts, completions, **columns) -> one
        number for each completion; `columns` are the other columns of the data set, and
        `completion_ids`, the tokens of each completion, where a parameter has that name. Of several
        sources one may give None for a response, where it does not apply: its score is then 0.
      kwargs: further arguments of the function, by name.
      conversations: the function gets prompts and completions as messages where the data have
        messages, as in TRL; otherwise it gets their texts.
      num_processes: processes that call the function, for one response at a time, so that a slow,
        hanging or dying call loses nothing but its own score. 0: all responses are one call in the
        process of the run, and an exception of the function ends the run.
      timeout: the seconds that a process may take for a response, after which it is replaced.
      failed_score: the score of a response for which the function raises, gives NaN, exceeds
        `timeout` or ends its process; `objective/failed_scores/NAME` is the share of them.
      weight: factor of its scores; with 0 they are only logged.
      name: of its metric; by default the function's name, or the folder's (not counting `hf`).
      label: of a classifier with several labels, the index of the logit that is the score.
    """

    path: str | None = None
    function: str | None = None
    weight: float = 1.0
    name: str | None = None
    label: int | None = None
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    conversations: bool = False
    num_processes: NonNegativeInt = 0
    timeout: PositiveFloat | None = None
    failed_score: float = 0.0

    def __post_init__(self) -> None:
        check_fields("rewards", self)
        self._check_function()
        if self.path is not None and self.function is not None:
            raise InputError(
                f"rewards: a source is a path or a function, but one is {self.path!r} and "
                f"{self.function!r}; make two of it."
            )
        if self.name is not None and not re.fullmatch(r"[\w.-]+", self.name):
            raise InputError(
                "rewards: name must be letters, digits, points, hyphens or underscores, but is "
                f"{self.name!r}."
            )
        if self.label is not None and (self.label < 0 or self.function is not None):
            raise InputError(
                "rewards: label must be 0 or more, and belongs to a reward model, but is "
                f"{self.label}."
            )

    def _check_function(self) -> None:
        """Raises an InputError for settings that have no effect without another one."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("kwargs", "conversations", "num_processes"):
            if self.function is None and getattr(self, name):
                raise InputError(
                    f"rewards: {name} belongs to a function, but one source has none: leave it out."
                )
        for name in ("timeout", "failed_score"):
            if not self.num_processes and getattr(self, name) != defaults[name]:
                raise InputError(
                    f"rewards: {name} is of calls in other processes: give the source "
                    "num_processes of 1 or more, or leave it out."
                )

    @property
    def is_bare(self) -> bool:
        """Whether it stands for the reward model of `model.reward_path`, or the trained one."""
        return self.path is None and self.function is None


def resolve_sources(
    reward_path: str | None, sources: Sequence[RewardSource]
) -> tuple[RewardSource, ...]:
    """The sources with their paths and names, including that of `model.reward_path`.

    If `model.reward_path` is set and no source stands for it, it comes first, with weight 1.

    Raises:
      InputError: a source stands for `model.reward_path`, which is not set; or two have one name.
    """
    has_bare = any(source.is_bare for source in sources)
    if reward_path is None and has_bare:
        raise InputError(
            "rewards: a source without path and function is the reward model of model.reward_path, "
            "which is not given; give it, or the source a path or a function."
        )
    if reward_path is not None and not has_bare:
        sources = (RewardSource(), *sources)
    resolved = []
    for source in sources:
        path = reward_path if source.is_bare else source.path
        name = source.name or _default_name(source.function, path)
        resolved.append(dataclasses.replace(source, path=path, name=name))
    check_names([source.name or "" for source in resolved])
    return tuple(resolved)


def check_names(names: Sequence[str]) -> None:
    """Raises an InputError if two sources have one name."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"rewards: two sources are called {name!r}; give one another name.")


def _default_name(function: str | None, path: str | None) -> str:
    """The function's name, or that of the last folder of the path, `hf` not counted."""
    parts = [part for part in (path or "").split("/") if part not in ("", "hf")]
    return plain_name(function.rpartition(":")[2] if function else (parts or [""])[-1])


def plain_name(text: str) -> str:
    """The text as a name of a metric."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_") or "reward"
