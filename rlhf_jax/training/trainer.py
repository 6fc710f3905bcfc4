"""The record that describes a trainer to the rest of the library; nothing here imports jax."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal, NamedTuple

from rlhf_jax.data.formats import Kind
from rlhf_jax.training.settings import OptimizerSettings


class Headline(NamedTuple):
    """A metric that the report shows as a tile.

    Attributes:
      metric: its name, such as "eval/loss".
      label: of the tile, without the trainer's title.
      shows_start: whether the first value is shown beside the last.
    """

    metric: str
    label: str
    shows_start: bool = True


class Plot(NamedTuple):
    """A chart of the report: metrics over the training step.

    Attributes:
      title, unit: of the chart.
      lines: metric -> its name in the legend.
    """

    title: str
    unit: str
    lines: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The record of a training method, from which command, configuration, stage and report derive.

    Attributes:
      name: of the file in `training/`, of the section of the configuration, and of the command,
        which has hyphens for underscores.
      title: in the report and on the terminal, such as "Supervised fine-tuning".
      label: a short title for the tiles of the report, such as "SFT".
      summary: one line for `rlhf --help`.
      settings: the frozen dataclass of its section.
      reads: settings -> the kind of examples that it is trained on.
      online: whether it samples responses and scores them; such a trainer has the sections
        `rewards` and `evaluation`.
      samples_first: whether the examples that it `reads` are made before the first step, of
        responses that the model samples to the prompts of the data set and that are scored; such a
        trainer has the section `rewards`.
      trains: a language model, or a reward model.
      optimizer: its default optimizer settings.
      first_settings: names of its settings that the help lists first.
      headlines: metrics of the report's tiles.
      losses: metrics that must stay finite; training stops where one is not.
      scores: metrics that are mean scores of responses. Where one is not finite the rewards are at
        fault; report and terminal show those that a run has.
      plots: charts of its own metrics, after those of metrics that trainers share.
      diagnostics: likewise, before the diagnostics that trainers share.
      has_reference: whether its loss may compare with a reference: `has_reference` and
        `precompute_ref` of its settings show when, and its module has `make_reference_step`.
      has_dropout: whether it trains with dropout, by a setting of that name.
      has_rouge: whether it has `rouge_rows`: ROUGE of held-out completions in each evaluation.
      has_value_model: whether it may start a value model from `model.value_path`.
      mixes_texts: whether it may train on texts beside the responses (the section `ptx`).
      compares_groups: whether it compares the scores of several responses to a prompt; its update
        reads each of several rewards, and its state may hold no reference.
      module: the module with `init_state` and `make_step`; by default `rlhf_jax.training.NAME`.
    """

    name: str
    title: str
    label: str
    summary: str
    settings: type
    reads: Callable[[Any], Kind]
    online: bool = False
    samples_first: bool = False
    trains: Literal["policy", "reward_model"] = "policy"
    optimizer: OptimizerSettings = OptimizerSettings()
    first_settings: tuple[str, ...] = ("batch_size",)
    headlines: tuple[Headline, ...] = ()
    losses: tuple[str, ...] = ("train/loss",)
    scores: tuple[str, ...] = ("objective/scores",)
    plots: tuple[Plot, ...] = dataclasses.field(default=(), hash=False)
    diagnostics: tuple[Plot, ...] = dataclasses.field(default=(), hash=False)
    has_reference: bool = False
    has_dropout: bool = False
    has_rouge: bool = False
    has_value_model: bool = False
    mixes_texts: bool = False
    compares_groups: bool = False
    module: str = ""

    @property
    def score_labels(self) -> dict[str, str]:
        """Metric -> label of each of `scores`, by the headlines."""
        labels = {each.metric: each.label for each in self.headlines}
        return {name: labels.get(name, name.rpartition("/")[2]) for name in self.scores}

    @property
    def has_rewards(self) -> bool:
        """Whether responses are scored, before the first step or during training."""
        return self.online or self.samples_first

    def kind_in_data(self, settings: Any) -> Kind:
        """The kind of examples that the data set holds."""
        return "prompts" if self.samples_first else self.reads(settings)

    @property
    def command(self) -> str:
        """The sub-command of `rlhf`."""
        return self.name.replace("_", "-")

    @property
    def steps(self) -> ModuleType:
        """The module with the pure steps, imported when it is first needed."""
        return importlib.import_module(self.module or f"rlhf_jax.training.{self.name}")
