"""Online trainers side by side on problems that the fine-tuned model solves in part.

    python scripts/policy_gradients.py --config configs/arithmetic/policy_gradients.yaml

A model is fine-tuned on answers of which a part is wrong, and `rlhf filter` keeps the problems
whose pass rate lies in a range. Each method then trains on these problems, once for each seed, and
the probability of a right answer to them is a curve: a trainer that works brings it close to 1 (Qi
et al., Defeating the Training-Inference Mismatch via FP16, arXiv:2510.26788). Runs that are
finished are not repeated.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.runtime import run_filter, train, train_sft
from rlhf_jax.runtime.commands.terminal import run_command
from rlhf_jax.runtime.config import FilterConfig, RunConfig, SFTConfig, config_of, resolve
from rlhf_jax.runtime.evaluation.policies import read_evaluation
from rlhf_jax.runtime.parsing import merge
from rlhf_jax.runtime.rewards.sources import plain_name
from rlhf_jax.training import TRAINERS

sys.path.append(str(Path(__file__).resolve().parent / "lessons"))
from plots import Line, line_plot, save  # noqa: E402  (the lessons' own)

METRIC = "eval/scores"


@dataclasses.dataclass(frozen=True)
class Config:
    """Methods side by side.

    Attributes:
      sft: the fine-tuning; its run is `sft/` in the run folder.
      filter: which problems are kept, in `problems.jsonl` there: of the first `data.max_rows` that
        the model was fine-tuned on.
      shared: sections of the configuration of all methods. `settings` are those of the trainer's
        own section.
      methods: for each method the name of its `trainer`, and sections laid over the shared ones.
      selected: the methods that are run; empty: all.
      seeds: a run of each method for each; the fine-tuned model and the problems are the same.
      target: the mean pass@1 that each method is to reach.
      run_dir: the folder of all runs, the table and the plot.
    """

    sft: SFTConfig = SFTConfig()  # type: ignore[valid-type]
    filter: FilterConfig = FilterConfig()
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
    methods: dict[str, Any] = dataclasses.field(default_factory=dict)
    selected: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    target: float = 0.95
    run_dir: str = "runs/policy_gradients"

    def __post_init__(self) -> None:
        online = [trainer.name for trainer in TRAINERS if trainer.online]
        for name, method in self.methods.items():
            if not isinstance(method, Mapping) or method.get("trainer") not in online:
                raise InputError(f"methods.{name} needs a trainer of {', '.join(online)}.")
        for name in self.selected:
            if name not in self.methods:
                raise InputError(
                    f"selected has {name!r}, but the methods are {', '.join(self.methods)}."
                )
        if not self.methods or not self.seeds:
            raise InputError("methods and seeds must not be empty: give one of each.")


class Result(NamedTuple):
    """A run: curve of (responses, mean score), and pass@1 before and after it."""

    curve: list[tuple[int, float]]
    before: float
    after: float


def run_config(config: Config, method: str, seed: int) -> RunConfig:
    """The configuration of a run, on the problems that were kept."""
    own = dict(config.methods[method])
    trainer = own.pop("trainer")
    values = merge(config.shared, own)
    settings = values.pop("settings", {})
    folder = Path(config.run_dir)
    problems = str(folder / "problems.jsonl")
    values = merge(
        merge({trainer: settings}, values),
        {
            "model": {"path": str(folder / "sft" / "hf")},
            # All problems, also to evaluate on.
            "data": {"path": problems, "eval_path": problems, "eval_rows": 2**20},
            "run_dir": str(folder / f"{plain_name(method).lower()}-{seed}"),
            "seed": seed,
        },
    )
    (record,) = (each for each in TRAINERS if each.name == trainer)
    run = resolve(config_of(record), values)
    if run.section("evaluation").num_responses < 2:
        raise InputError("shared.evaluation.num_responses must be 2 or more, for pass@1.")
    return run


def result_of(run: RunConfig) -> Result:
    """The curve of a finished run."""
    group = run.settings.num_responses or 1
    scores: dict[int, float] = {}
    for line in (Path(run.run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if METRIC in entry:
            scores[entry["step"] * run.settings.batch_size * group] = entry[METRIC]
    metrics = (read_evaluation(run.run_dir) or {})["metrics"]
    return Result(sorted(scores.items()), metrics["before_pass@1"], metrics["pass@1"])


def table_of(results: Mapping[str, list[Result]]) -> str:
    """A Markdown table of pass@1 at the end of each method, over the seeds."""
    lines = ["| method | pass@1 before | after: mean | lowest seed | seeds |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for method, runs in results.items():
        before, after = zip(*(each[1:] for each in runs), strict=True)
        numbers = float(np.mean(before)), float(np.mean(after)), min(after)
        cells = " | ".join(f"{x:.3f}" for x in numbers)
        lines.append(f"| {method} | {cells} | {len(runs)} |")
    return "\n".join(lines)


def draw(results: Mapping[str, list[Result]], folder: Path) -> Path:
    """The plot: for each method the mean over the seeds in a band between the extremes."""
    lines = []
    for colour, (method, runs) in enumerate(results.items()):
        shared = sorted(set.intersection(*({x for x, _ in each.curve} for each in runs)))
        values = np.array([[dict(each.curve)[x] for x in shared] for each in runs])
        band = values.min(axis=0), values.max(axis=0)
        lines.append(Line(method, shared, values.mean(axis=0), *band, colour=colour))
    labels = "sampled responses", "share of right answers"
    return save(folder, "curves", line_plot("Right answers while training", lines, labels=labels))


def main(config: Config) -> None:
    """Runs what is missing, prints the table and draws the plot."""
    runs = {
        method: [run_config(config, method, seed) for seed in config.seeds]
        for method in config.selected or config.methods
    }
    folder = Path(config.run_dir)
    sft = folder / "sft"
    if not (sft / "hf").exists():
        train_sft(dataclasses.replace(config.sft, run_dir=str(sft)))
    if not (folder / "problems.jsonl").exists():
        own = config.filter
        model = dataclasses.replace(own.model, path=str(sft / "hf"))
        data = dataclasses.replace(config.sft.data, max_rows=own.data.max_rows)
        output = str(folder / "problems.jsonl")
        run_filter(dataclasses.replace(own, model=model, data=data, output=output))
    for run in (run for each in runs.values() for run in each):
        if read_evaluation(run.run_dir) is None:
            train(run.trainer, run)
    results = {method: [result_of(run) for run in each] for method, each in runs.items()}
    print(table_of(results), end="\n\n")
    for method, each in results.items():
        mean = np.mean([result.after for result in each])
        verdict = "reached" if mean >= config.target else "not reached"
        print(f"{method}: the target, a mean pass@1 of {config.target:g}, is {verdict}")
    print(f"Plot: {draw(results, folder)}")


if __name__ == "__main__":
    sys.exit(run_command("scripts/policy_gradients.py", Config, main, sys.argv[1:]))
