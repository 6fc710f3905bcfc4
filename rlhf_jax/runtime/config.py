"""Configurations of the commands: frozen dataclasses composed of each room's settings.

A value comes from the class, then from the file given by `--config`, then from `--section.key`.
The configuration of a trainer derives from its record.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from rlhf_jax import training
from rlhf_jax.checks import Fraction, Limit, PositiveInt, TwoOrMore, check_fields
from rlhf_jax.data.settings import DataSettings, TokenizerSettings
from rlhf_jax.errors import InputError
from rlhf_jax.models.adapter_settings import LoraSettings, check_start
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.parallel.settings import DistributedSettings, MeshSettings
from rlhf_jax.rollout.settings import GenerationSettings
from rlhf_jax.runtime.evaluation.settings import CommandEvaluationSettings, EvaluationSettings
from rlhf_jax.runtime.inherit import with_data_of_run
from rlhf_jax.runtime.parsing import (
    build,
    checked_section,
    read_values,
    split_flags,
    to_yaml,
)
from rlhf_jax.runtime.rewards.sources import RewardSource
from rlhf_jax.runtime.run.settings import CheckpointSettings, LoggingSettings
from rlhf_jax.training.ppo_settings import Settings as PPOSettings
from rlhf_jax.training.reward_settings import Settings as RewardSettings
from rlhf_jax.training.settings import OptimizerSettings
from rlhf_jax.training.sft_settings import Settings as SFTSettings
from rlhf_jax.training.trainer import Trainer

Config = TypeVar("Config")
# JAX's keys of other seeds are those of the seed modulo 2^32.
Seed = Annotated[int, Limit(lambda x: 0 <= x < 2**32, "be from 0 to 2^32 - 1")]


@dataclasses.dataclass(frozen=True)
class CommandConfig:
    """Settings that every command has.

    Attributes:
      seed: of all random numbers, from 0 to 2^32 - 1.
    """

    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings = DataSettings()
    mesh: MeshSettings = MeshSettings()
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields("", self)

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Given values, with those laid under them that follow from other files."""
        return values


@dataclasses.dataclass(frozen=True)
class RunConfig(CommandConfig):
    """Settings that every training run has.

    The configuration of a trainer adds the section with its own settings, under its name, and:
    `generation` for offline training of a policy, `rewards` and `evaluation` for online training,
    `rewards` where responses are sampled before the first step, and `ptx` where texts may be mixed
    in.

    Attributes:
      run_dir: the folder that the run writes, local or an address such as gs://.
    """

    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    distributed: DistributedSettings = DistributedSettings()
    logging: LoggingSettings = LoggingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    run_dir: str = "runs/run"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self.model.adapter_path, self.lora)

    trainer: ClassVar[Trainer]
    # Settings of the number of steps, which may change when a run continues.
    length_settings: ClassVar[tuple[str, ...]] = ()

    def section(self, name: str) -> Any:
        """The settings of a section that not every run has."""
        return vars(self)[name]

    @property
    def settings(self) -> Any:
        """The settings of the trainer."""
        return self.section(self.trainer.name)


def _check_texts(config: RunConfig) -> None:
    """The `__post_init__` of trainers that may mix in texts: an InputError if there are none."""
    RunConfig.__post_init__(config)
    name, texts, coef = config.trainer.name, config.section("ptx"), config.settings.ptx_coef
    if coef and texts == DataSettings() and config.data.path != texts.path:
        raise InputError(
            f"{name}.ptx_coef is {coef}, but there are no texts to mix in: give --ptx.path a data "
            f"set of texts, or set {name}.ptx_coef to 0."
        )


def _check_samples(config: RunConfig) -> None:
    """The `__post_init__` of trainers that sample first: an InputError if that is of no use."""
    RunConfig.__post_init__(config)
    name, generation, data = config.trainer.name, config.section("generation"), config.data
    _check_temperature(f"{name}.num_samples", config.settings.num_samples, generation)
    if generation.max_new_tokens > data.max_response_length:
        raise InputError(
            f"generation.max_new_tokens = {generation.max_new_tokens} exceeds "
            f"data.max_response_length = {data.max_response_length}, so that long responses would "
            "be trained on without their end; lower it, or set that higher."
        )


def _check_temperature(key: str, num_samples: int, generation: GenerationSettings) -> None:
    """Raises an InputError where several responses to a prompt would all be equal."""
    if num_samples > 1 and generation.temperature == 0:
        raise InputError(
            f"generation.temperature is 0, so that the {num_samples} responses of {key} would all "
            "be equal; set it above 0."
        )


@functools.cache
def config_of(trainer: Trainer) -> type[RunConfig]:
    """The configuration of a trainer's command."""
    fields: list[tuple[str, Any, Any]] = [(trainer.name, trainer.settings, trainer.settings())]
    notes = []
    if trainer.online:
        fields += [("rewards", tuple[RewardSource, ...], ())]
        fields += [("evaluation", EvaluationSettings, EvaluationSettings())]
        notes += ["rewards: sources of scores, beside `model.reward_path` and added up."]
    elif trainer.trains == "policy":
        if trainer.samples_first:
            fields += [("rewards", tuple[RewardSource, ...], ())]
            notes += ["rewards: sources of scores, beside `model.reward_path` and added up."]
        fields += [("generation", GenerationSettings, GenerationSettings())]
    if trainer.mixes_texts:
        fields += [("ptx", DataSettings, DataSettings())]
        notes += [f"ptx: texts mixed into the updates, read if `{trainer.name}.ptx_coef` > 0."]
    fields += [("optimizer", OptimizerSettings, trainer.optimizer)]
    fields += [("run_dir", str, f"runs/{trainer.name}")]
    summary = trainer.summary[:1].upper() + trainer.summary[1:]
    attributes = "".join(f"\n  {note}" for note in notes)
    namespace: dict[str, Any] = {
        "__doc__": f"{summary}.\n\nAttributes:{attributes}\n",
        "trainer": trainer,
    }
    length = "total_episodes" if trainer.online else "num_epochs"
    namespace["length_settings"] = (f"{trainer.name}.{length}",)
    if trainer.mixes_texts:
        namespace["__post_init__"] = _check_texts
    if trainer.samples_first:
        namespace["__post_init__"] = _check_samples
    kind = dataclasses.make_dataclass(
        f"{trainer.label.replace(' ', '')}Config",
        fields,
        bases=(RunConfig,),
        frozen=True,
        namespace={**namespace, "__module__": __name__},
    )
    return cast(type[RunConfig], kind)


def trainer_named(name: str) -> Trainer:
    """The record in `TRAINERS` with this name."""
    (trainer,) = (each for each in training.TRAINERS if each.name == name)
    return trainer


# Their fields follow from the records, which type checkers do not see.
SFTConfig: Any = config_of(trainer_named("sft"))
RewardConfig: Any = config_of(trainer_named("reward"))
PPOConfig: Any = config_of(trainer_named("ppo"))


@dataclasses.dataclass(frozen=True)
class PipelineData:
    """The section `data` of `run_rlhf`: one part for each stage.

    Attributes:
      ptx: the texts of PPO-ptx, read if `ppo.ptx_coef` is above 0; by default those of `sft`.
    """

    sft: DataSettings = DataSettings()
    reward: DataSettings = DataSettings()
    ppo: DataSettings = DataSettings()
    ptx: DataSettings = DataSettings()

    @property
    def ptx_texts(self) -> DataSettings:
        """The texts of PPO-ptx: `ptx` where it was set, else `sft`."""
        return self.sft if self.ptx == DataSettings() else self.ptx


@dataclasses.dataclass(frozen=True)
class PipelineOptimizers:
    """The section `optimizer` of `run_rlhf`: one part for each stage."""

    sft: OptimizerSettings = trainer_named("sft").optimizer
    reward: OptimizerSettings = trainer_named("reward").optimizer
    ppo: OptimizerSettings = trainer_named("ppo").optimizer


@dataclasses.dataclass(frozen=True)
class RLHFConfig(RunConfig):
    """Supervised fine-tuning, a reward model and PPO in a row.

    Attributes:
      data, optimizer: one part for each stage.
      rewards: sources of PPO's scores, added up. With it no reward model is trained, unless one of
        them has neither path nor function.
    """

    data: PipelineData = PipelineData()  # type: ignore[assignment]
    optimizer: PipelineOptimizers = PipelineOptimizers()  # type: ignore[assignment]
    sft: SFTSettings = SFTSettings()
    reward: RewardSettings = RewardSettings()
    ppo: PPOSettings = PPOSettings()
    rewards: tuple[RewardSource, ...] = ()
    generation: GenerationSettings = GenerationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    run_dir: str = "runs/rlhf"

    length_settings: ClassVar[tuple[str, ...]] = ("ppo.total_episodes",)


@dataclasses.dataclass(frozen=True)
class SamplingConfig(CommandConfig):
    """Settings of the commands that sample responses of a model.

    Attributes:
      data: settings that are not given are those of the run whose model is opened.
    """

    # The length of prompts is bounded by the positions of the model, unless it is set.
    data: DataSettings = DataSettings(max_prompt_length=2**20)
    generation: GenerationSettings = GenerationSettings()

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the section `data` of the model's run."""
        return with_data_of_run(values, "path", quiet="prompt" in values or "message" in values)


@dataclasses.dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """Responses of a model to prompts, as JSON lines.

    Attributes:
      prompt: one prompt to answer; where given, no data set is read.
      message: likewise one message of a user, which the tokenizer's chat template renders.
      output: a JSONL file to write; null writes to standard output.
    """

    prompt: str | None = None
    message: str | None = None
    output: str | None = None


@dataclasses.dataclass(frozen=True)
class ScoredSamplingConfig(SamplingConfig):
    """Settings of the commands that score several responses to each prompt.

    Attributes:
      data: settings that are not given are those of the run whose model is opened; the training
        examples are the prompts.
      rewards: sources of scores, beside `model.reward_path` and added up.
      num_samples: responses that are sampled for each prompt.
      output: the JSONL file to write; the responses are in another one beside it.
    """

    rewards: tuple[RewardSource, ...] = ()
    num_samples: PositiveInt = 1
    output: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature("num_samples", self.num_samples, self.generation)


@dataclasses.dataclass(frozen=True)
class PairsConfig(ScoredSamplingConfig):
    """Preference pairs of a model's responses: the best and the worst of several by a score.

    Attributes:
      num_samples: responses that are sampled for each prompt, 2 or more.
      keep_truncated: also takes responses that reached `generation.max_new_tokens` without EOS.
    """

    num_samples: TwoOrMore = 4
    keep_truncated: bool = False
    output: str = "pairs.jsonl"


@dataclasses.dataclass(frozen=True)
class FilterConfig(ScoredSamplingConfig):
    """Prompts that a model solves in a part of its responses, as JSON lines.

    Attributes:
      pass_threshold: the score of a response that passes, or more.
      min_pass_rate, max_pass_rate: the shares of passing responses between which a prompt is kept,
        both included.
    """

    num_samples: PositiveInt = 8
    pass_threshold: float = 1.0
    min_pass_rate: Fraction = 0.2
    max_pass_rate: Fraction = 0.8
    output: str = "prompts.jsonl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_pass_rate > self.max_pass_rate:
            raise InputError(
                f"min_pass_rate = {self.min_pass_rate} is above max_pass_rate = "
                f"{self.max_pass_rate}; change one of them."
            )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(CommandConfig):
    """Evaluation of a language model, a policy or a reward model on held-out examples.

    Attributes:
      kind: "text": loss, perplexity and teacher-forced ROUGE of `model.path` on texts; "pairs":
        accuracy, calibration and length bias of the reward model `model.reward_path`; "policy":
        responses of `model.path`, against those of `model.reference_path` where given, by the
        score, the gold score, a judge and ROUGE, and the best of several. The KL is that of the
        unfiltered distributions, also where top-k, top-p or greedy decoding sampled.
      data: settings that are not given are those of the run whose model is opened.
      rewards: sources of scores, beside `model.reward_path` and added up; for "policy".
      run_dir: the folder that `evaluation.json` and the report are written to.
    """

    kind: Literal["text", "pairs", "policy"] = "policy"
    rewards: tuple[RewardSource, ...] = ()
    generation: GenerationSettings = GenerationSettings()
    evaluation: CommandEvaluationSettings = CommandEvaluationSettings()
    run_dir: str = "runs/evaluation"

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the section `data` of the run of the model that is evaluated."""
        name = "reward_path" if values.get("kind") == "pairs" else "path"
        return with_data_of_run(values, name)


def parse(kind: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The configuration of a command line: `--config FILE.yaml --section.key value ...`.

    `--print_config` prints it and exits. An InputError names the key and what is allowed.
    """
    flags = split_flags(sys.argv[1:] if argv is None else list(argv))
    config = _built(kind, read_values(kind, flags))
    if flags.print_config:
        sys.stdout.write(to_yaml(config))
        raise SystemExit(0)
    return config


def resolve(kind: type[Config], config: Config | str | os.PathLike | Mapping[str, Any]) -> Config:
    """A configuration from itself, a YAML file, or a nested dict; an InputError as by `parse`."""
    if isinstance(config, kind):
        return config
    if isinstance(config, (str, os.PathLike)):
        return parse(kind, ["--config", os.fspath(config)])
    return _built(kind, checked_section(config, "The configuration"))


def _built(kind: type[Config], values: Mapping[str, Any]) -> Config:
    if issubclass(kind, CommandConfig):
        values = kind.completed(values)
    return build(kind, values)
