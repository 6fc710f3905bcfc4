"""The section `evaluation` of a configuration."""

import dataclasses

from rlhf_jax.checks import NonNegativeInt, PositiveInt, check_fields
from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The section `evaluation`: evaluation of responses to held-out prompts.

    Attributes:
      gold_fn: "module:function", a gold score, which nothing is trained on:
        f(prompts, completions, **columns) -> list of numbers. Null: the score alone.
      judge_fn: "module:function", a judge of two policies: f(prompts, responses_a, responses_b,
        **columns) -> for each prompt a number from 0 (a is better) to 1 (b is better), 0.5 being a
        tie. It is called in both orders, and the mean counts.
      batch_size: prompts at a time.
      num_samples: pairs of responses, before and after training, in the report.
      num_responses: responses to each prompt at the end of a run, for pass@1 to pass@n with
        intervals; with 1 there is no pass@k.
      pass_threshold: the score of a response that passes, or more.
    """

    gold_fn: str | None = None
    judge_fn: str | None = None
    batch_size: PositiveInt = 128
    num_samples: NonNegativeInt = 12
    num_responses: PositiveInt = 1
    pass_threshold: float = 1.0

    def __post_init__(self) -> None:
        check_fields("evaluation", self)


@dataclasses.dataclass(frozen=True)
class CommandEvaluationSettings(EvaluationSettings):
    """The section `evaluation` of `evaluate.py`: that of a run, and settings of this command.

    Attributes:
      gold_fn, judge_fn, batch_size, num_samples, num_responses, pass_threshold: as in a run.
      best_of: the numbers n of best-of-n sampling, such as [1, 2, 4, 8, 16]: the mean score of the
        best of n responses by the score. The largest n is sampled for each prompt. Empty: none.
      rouge_rows: the number of texts, the first ones, with teacher-forced ROUGE; 0: none.
    """

    best_of: tuple[int, ...] = ()
    rouge_rows: NonNegativeInt = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(n < 1 for n in self.best_of):
            raise InputError(
                f"evaluation.best_of must hold numbers from 1 on, but is {list(self.best_of)}."
            )
