"""Configurations: frozen dataclasses composed of each room's settings, read from YAML and flags.

A value comes from the class, then from the file given by `--config`, then from `--section.key`.
jsonargparse does the reading and the type checks; what it says is put into one sentence here.
"""

import contextlib
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

import yaml
from etils import epath
from jsonargparse import ArgumentError, ArgumentParser

from rlhf_jax.data.datasets import Settings as DataSettings
from rlhf_jax.data.tokenizers import Settings as TokenizerSettings
from rlhf_jax.errors import InputError
from rlhf_jax.models.cudnn_attention import Attention, check_attention, check_dtype
from rlhf_jax.models.remat import Remat, check_remat
from rlhf_jax.parallel.distributed import Settings as DistributedSettings
from rlhf_jax.parallel.mesh import Settings as MeshSettings
from rlhf_jax.rollout.settings import GenerationSettings
from rlhf_jax.runtime.rewards.sources import RewardSource
from rlhf_jax.runtime.run.checkpoint import Settings as CheckpointSettings
from rlhf_jax.runtime.run.metrics import Settings as LoggingSettings
from rlhf_jax.runtime.run.metrics import disk_errors, replace_file
from rlhf_jax.runtime.run.records import config_in
from rlhf_jax.training import ppo_settings
from rlhf_jax.training.ppo_settings import Settings as PPOSettings
from rlhf_jax.training.reward_settings import Settings as RewardSettings
from rlhf_jax.training.settings import OptimizerSettings
from rlhf_jax.training.sft_settings import Settings as SFTSettings

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The section `model`: where the parameters come from, or the sizes of a fresh GPT-2.

    Attributes:
      path: a Hugging Face folder or hub name to start from; null makes a fresh model.
      reward_path: likewise for the reward model that scores responses; PPO and evaluation read it.
      reference_path: likewise for the policy that evaluation compares with.
      value_path: likewise for the reward model that PPO's value model starts from, with
        `ppo.value_model: reward`; null takes the one at `reward_path`.
      n_layer, n_head, n_embd, n_positions: of a fresh model.
      dropout: of a fresh model, in supervised fine-tuning alone.
      dtype: of products; "auto" is bfloat16 on accelerators and float32 on the CPU.
      remat: what the backward pass of training computes again instead of keeping it, to save
        memory: "dots", norms and activations; "full", all of each layer but its input; "none".
      attention: what computes it but for single tokens of decoding: "blocks", this library on any
        device, or "cudnn" on an NVIDIA GPU, in bfloat16 and without dropout of its weights.
    """

    path: str | None = None
    reward_path: str | None = None
    reference_path: str | None = None
    value_path: str | None = None
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    n_positions: int = 256
    dropout: float = 0.1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Remat = "dots"
    attention: Attention = "blocks"

    def __post_init__(self) -> None:
        check_remat("model.remat", self.remat)
        check_attention("model.attention", self.attention)
        if self.attention == "cudnn" and self.dtype != "auto":
            check_dtype(self.dtype)
        if not 0 <= self.dropout < 1:
            raise InputError(
                f"model.dropout must be at least 0 and below 1, but is {self.dropout}."
            )


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The section `evaluation`: how held-out responses are judged.

    Attributes:
      gold_fn: "module:function", a score that nothing is trained on:
        f(prompts, completions, **columns) -> list of numbers. Null: the score alone judges.
      judge_fn: "module:function", a judge of two policies: f(prompts, responses_a, responses_b,
        **columns) -> for each prompt a number from 0 (a is better) to 1 (b is better), 0.5 being a
        tie. It is asked in both orders, and the mean counts.
      batch_size: prompts at a time.
      num_samples: pairs of responses, before and after, that the report shows.
    """

    gold_fn: str | None = None
    judge_fn: str | None = None
    batch_size: int = 128
    num_samples: int = 12

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_samples < 0:
            raise InputError(
                "evaluation.batch_size must be at least 1 and evaluation.num_samples at least 0, "
                f"but are {self.batch_size} and {self.num_samples}."
            )


def _check_num_seeds(count: int) -> None:
    if count < 1:
        raise InputError(f"num_seeds must be at least 1, but is {count}.")


@dataclasses.dataclass(frozen=True)
class CommandEvaluationSettings(EvaluationSettings):
    """The section `evaluation` of `evaluate.py`: what a run has, and what this command alone does.

    Attributes:
      gold_fn, judge_fn, batch_size, num_samples: as in a run.
      best_of: how many responses to choose the best from, say [1, 2, 4, 8, 16]: the mean score of
        what the score then chooses. The largest number is sampled for each prompt. Empty: none of
        it.
      rouge_rows: texts at most, the first ones, whose teacher-forced ROUGE is computed; 0: none.
    """

    best_of: tuple[int, ...] = ()
    rouge_rows: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(n < 1 for n in self.best_of):
            raise InputError(
                f"evaluation.best_of must hold numbers from 1 on, but is {list(self.best_of)}."
            )
        if self.rouge_rows < 0:
            raise InputError(f"evaluation.rouge_rows must be at least 0, but is {self.rouge_rows}.")


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """All settings of `train_sft.py`."""

    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=5e-4)
    sft: SFTSettings = SFTSettings()
    generation: GenerationSettings = GenerationSettings()
    mesh: MeshSettings = MeshSettings()
    distributed: DistributedSettings = DistributedSettings()
    logging: LoggingSettings = LoggingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    seed: int = 0
    run_dir: str = "runs/sft"


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """All settings of `train_reward.py`."""

    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    reward: RewardSettings = RewardSettings()
    mesh: MeshSettings = MeshSettings()
    distributed: DistributedSettings = DistributedSettings()
    logging: LoggingSettings = LoggingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    seed: int = 0
    run_dir: str = "runs/reward"


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """All settings of `train_ppo.py`.

    Attributes:
      rewards: a list of sources of scores, beside `model.reward_path` and added up.
      num_seeds: independent runs, with the seeds `seed`, `seed + 1`, ..., trained as one program;
        metrics are their means, and the report shows their spread.
      ptx: the texts of PPO-ptx, as for supervised fine-tuning; read if `ppo.ptx_coef` is above 0.
    """

    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings = DataSettings()
    ptx: DataSettings = DataSettings()
    optimizer: OptimizerSettings = ppo_settings.TRAINER.optimizer
    ppo: PPOSettings = PPOSettings()
    rewards: tuple[RewardSource, ...] = ()
    evaluation: EvaluationSettings = EvaluationSettings()
    mesh: MeshSettings = MeshSettings()
    distributed: DistributedSettings = DistributedSettings()
    logging: LoggingSettings = LoggingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    seed: int = 0
    num_seeds: int = 1
    run_dir: str = "runs/ppo"

    def __post_init__(self) -> None:
        _check_num_seeds(self.num_seeds)
        if self.ppo.ptx_coef and self.ptx == DataSettings() and self.data.path != self.ptx.path:
            raise InputError(
                f"ppo.ptx_coef is {self.ppo.ptx_coef}, but there are no texts to mix in: give "
                "--ptx.path a data set of texts, or set ppo.ptx_coef to 0."
            )


@dataclasses.dataclass(frozen=True)
class StageData:
    """The section `data` of `run_rlhf.py`: one for each stage.

    Attributes:
      ptx: the texts of PPO-ptx, read if `ppo.ptx_coef` is above 0; left as it is by default, those
        of `sft`.
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
class StageOptimizers:
    """The section `optimizer` of `run_rlhf.py`: one for each stage."""

    sft: OptimizerSettings = OptimizerSettings(learning_rate=5e-4)
    reward: OptimizerSettings = OptimizerSettings()
    ppo: OptimizerSettings = ppo_settings.TRAINER.optimizer


@dataclasses.dataclass(frozen=True)
class RLHFConfig:
    """All settings of `run_rlhf.py`; `data` and `optimizer` hold one part for each stage.

    Attributes:
      rewards: a list of sources of PPO's scores, added up. With it no reward model is trained,
        unless one of them has neither path nor function.
      num_seeds: of PPO, as in `train_ppo.py`; the stages before it run once, with `seed`.
    """

    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: StageData = StageData()
    optimizer: StageOptimizers = StageOptimizers()
    sft: SFTSettings = SFTSettings()
    reward: RewardSettings = RewardSettings()
    ppo: PPOSettings = PPOSettings()
    rewards: tuple[RewardSource, ...] = ()
    generation: GenerationSettings = GenerationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    mesh: MeshSettings = MeshSettings()
    distributed: DistributedSettings = DistributedSettings()
    logging: LoggingSettings = LoggingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    seed: int = 0
    num_seeds: int = 1
    run_dir: str = "runs/rlhf"

    def __post_init__(self) -> None:
        _check_num_seeds(self.num_seeds)


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """All settings of `generate.py`.

    Attributes:
      prompt: one prompt to answer; where given, `data` is not read.
      output: a JSONL file to write; null writes to standard output.
    """

    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings = DataSettings()
    generation: GenerationSettings = GenerationSettings()
    mesh: MeshSettings = MeshSettings()
    prompt: str | None = None
    output: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """All settings of `evaluate.py`.

    Attributes:
      kind: "text": loss, perplexity and teacher-forced ROUGE of `model.path` on texts; "pairs":
        accuracy, calibration and length bias of the reward model `model.reward_path`; "policy":
        responses of `model.path`, against those of `model.reference_path` where given, by the
        score, the gold score, a judge and ROUGE, and the best of several. The KL is that of the
        unfiltered distributions, also where top-k, top-p or greedy decoding sampled.
      rewards: a list of sources of scores, beside `model.reward_path` and added up; for "policy".
    """

    kind: Literal["text", "pairs", "policy"] = "policy"
    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings = DataSettings()
    rewards: tuple[RewardSource, ...] = ()
    generation: GenerationSettings = GenerationSettings()
    evaluation: CommandEvaluationSettings = CommandEvaluationSettings()
    mesh: MeshSettings = MeshSettings()
    seed: int = 0
    run_dir: str = "runs/evaluation"


def parse(kind: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The configuration of a command line: `--config FILE.yaml --section.key value ...`.

    `--help` and `--print_config` print and exit.

    Raises:
      InputError: one sentence that names the key and what is allowed.
    """
    return _parse(kind, sys.argv[1:] if argv is None else list(argv))


def resolve(kind: type[Config], config: Config | str | os.PathLike | Mapping[str, Any]) -> Config:
    """A configuration from itself, a YAML file, or a nested dict of the same form.

    Raises:
      InputError: as `parse` does.
    """
    if isinstance(config, kind):
        return config
    if isinstance(config, (str, os.PathLike)):
        return _parse(kind, ["--config", os.fspath(config)])
    values = cast(Mapping[str, Any], config)
    _check_sections(kind, values, "The configuration")
    parser = _parser(kind)
    with _one_sentence(kind):
        return _build(kind, parser, parser.parse_object(dict(values)))


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts and lists, ready for YAML and JSON."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """The text of `config.yaml`; feeding it back gives an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


# What may differ when a run goes on: how it is watched and judged, and how often it is saved.
_FREE_TO_CHANGE = (
    "logging.",
    "checkpoint.",
    "evaluation.",
    "run_dir",
    "mesh.",
    "distributed.",
    "model.remat",
    "model.attention",
)


def claim_run_dir(config: Any) -> None:
    """Makes the run folder and writes `config.yaml`, or checks that it is there and the same.

    Raises:
      InputError: the folder cannot be written, or was made with another configuration.
    """
    try:
        folder = epath.Path(config.run_dir)
        folder.exists()
    except ImportError as error:
        raise InputError(
            f"--run_dir {config.run_dir} needs a package that opens such addresses ({error}); "
            "install it, or give a local folder."
        ) from error
    # Which processes there are is no part of a run: who repeats it has others.
    config = dataclasses.replace(config, distributed=DistributedSettings())
    file = folder / "config.yaml"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        there = yaml.safe_load(file.read_text()) if file.exists() else None
        there = config_in(folder / "checkpoints") if there is None else there
        if there is not None and _holds_work(folder):
            check_same(config, there)
        replace_file(file, to_yaml(config).encode())


def _holds_work(folder: epath.Path) -> bool:
    """Whether a run has come to anything: else its configuration may still be put right."""
    return any(
        _holds_work(path) if path.is_dir() else path.name != "config.yaml"
        for path in folder.iterdir()
    )


def check_same(config: Any, there: Any) -> None:
    """Raises an InputError unless a run with one configuration may go on with another.

    Args:
      there: that of the run, as from `to_dict`.
    """
    # What a folder of an earlier version does not name was as it still is by default.
    old = _flat(to_dict(type(config)())) | _flat(there)
    new = _flat(to_dict(config))
    for key in sorted({*old, *new}):
        if key.startswith(_FREE_TO_CHANGE) or old.get(key) == new.get(key):
            continue
        raise InputError(
            f"The run folder {config.run_dir} was made with another configuration: {key} is "
            f"{old.get(key)!r} there and {new.get(key)!r} here; choose another --run_dir, or give "
            "the same configuration to continue that run."
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items())
    return {key: value for part in parts for key, value in part.items()}


def _parser(kind: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=_summary(kind))
    parser.add_argument("--config", action="config", help="A YAML file of settings.")
    parser.add_class_arguments(kind, as_group=False)
    return parser


def _summary(kind: type) -> str:
    return (kind.__doc__ or "").split("\n")[0]


def _parse(kind: type[Config], argv: list[str]) -> Config:
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        if flag == "--config" or flag.startswith("--config="):
            _check_file(kind, flag.partition("=")[2] or value)
    parser = _parser(kind)
    with _one_sentence(kind):
        return _build(kind, parser, parser.parse_args(argv))


def _check_file(kind: type, path: str) -> None:
    """Raises an InputError unless a file is YAML of the form that a configuration has."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        return  # a pipe can be read once only
    _check_sections(kind, read_content(path), path)


def read_content(path: str) -> Any:
    """What a YAML file holds.

    Raises:
      InputError: it cannot be read, or is no YAML.
    """
    try:
        return yaml.safe_load(epath.Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"The configuration {path} cannot be read ({reason}); give --config a YAML file."
        ) from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not valid YAML: {reason}.") from None


def _check_sections(kind: Any, content: Any, name: str) -> None:
    if not isinstance(content, dict):
        raise InputError(
            f"{name} holds no keys, but {str(content)[:40]!r}; write one `key: value` to a line."
        )
    sources = content.get("rewards")
    if isinstance(sources, (list, tuple)) and {} in sources:
        raise InputError(
            "rewards: a source has at least one key; {weight: 1.0} stands for the reward model of "
            "model.reward_path, or the one that is trained."
        )
    for field in dataclasses.fields(kind):
        if field.name in content and dataclasses.is_dataclass(field.type):
            _check_sections(field.type, content[field.name], f"The section {field.name!r}")


def _check_null(kind: Any, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raises an InputError where null is given for a key that needs a value."""
    for name, annotation in get_type_hints(kind).items():
        if dataclasses.is_dataclass(annotation):
            _check_null(annotation, values[name], f"{prefix}{name}.")
        elif values[name] is None and type(None) not in get_args(annotation):
            text = getattr(annotation, "__name__", str(annotation))
            raise InputError(f"{prefix}{name} must be {_type_name(text)}, but is null.")


def _build(kind, parser, namespace):
    _check_null(kind, namespace)
    made = parser.instantiate(namespace)
    return kind(**{field.name: made[field.name] for field in dataclasses.fields(kind)})


@contextlib.contextmanager
def _one_sentence(kind: type):
    """Turns what jsonargparse says of a wrong key, type or file into one InputError."""
    try:
        yield
    except (ArgumentError, TypeError) as error:
        raise InputError(_sentence(kind, str(error))) from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(_sentence(kind, str(error))) from None


def _sentence(kind: type, text: str) -> str:
    text = " ".join(text.split())
    # The innermost complaint is about the key; what wraps it retells the way there.
    if found := re.search(r"Parser key ['\"](\w+)['\"]: Problem with given class_path", text):
        return _wrong_element(found[1], text)
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text):
        return _unknown(kind, f"{found[1]}.{found[2]}")
    if found := re.search(r"(?:unrecognized arguments: --|Option ')([\w.]+)", text):
        return _unknown(kind, found[1])
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        return f"{found[1]!r} is no option; settings are given as --section.key value."
    if found := re.search(r"Parser key ['\"]([\w.]+)['\"]: (.*)", text):
        return f"{found[1]} {_wrong_type(found[2], found[1])}"
    return text


def _wrong_element(key: str, text: str) -> str:
    """What is wrong with one element of a list of sources."""
    if "Not a valid subclass" in text:
        return (
            f"{key}: a source is no text and not empty, but keys and values such as path: folder."
        )
    if found := re.search(r"Option '([\w.]+)'", text):
        fields = [field.name for field in dataclasses.fields(RewardSource)]
        near = difflib.get_close_matches(found[1], fields, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"Unknown key {found[1]!r}{hint} in {key}; each has {', '.join(fields)}."
    if found := re.search(r"class_path.*Parser key ['\"]([\w.]+)['\"]: (.*)", text):
        return f"{key}: {found[1]} {_wrong_type(found[2])}"
    return text


_LISTS = {
    "rewards": "[{function: module:function}]",
    "best_of": "[1, 2, 4]",
    "prompt_tokens": "[2, 8]",
    "local_device_ids": "[0, 1]",
    "workloads": "[sft_mid, generate_mid]",
}


def _wrong_type(reason: str, key: str = "") -> str:
    """What a value must be, for a list with an example, and what it is."""
    if found := re.search(r"^Expected an? (.*?)\. Got value: (.*)$", reason):
        given = "null" if found[2] == "None" else repr(found[2])
        kinds = _type_name(found[1])
    elif found := re.search(r"Subtypes: \[(.*)\] Errors: .* Given value: (.*)$", reason):
        given = repr(found[2])
        kinds = " or ".join(_type_name(kind) for kind in found[1].split(", "))
    else:
        return f"is wrong: {reason}"
    example = _LISTS.get(key.rpartition(".")[2])
    if kinds.startswith("list") and example is not None:
        kinds = f"a list such as {example}{' or null' if kinds.endswith('null') else ''}"
    return f"must be {kinds}, but is {given}."


def _type_name(text: str) -> str:
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "").replace("tuple", "list")
    return text.replace("Literal[", "one of [").replace("NoneType", "null")


def _unknown(kind: type, key: str) -> str:
    """Names the section's keys, and the nearest one."""
    section, _, name = key.rpartition(".")
    while section and _section_fields(kind, section) is None:  # the section is unknown itself
        key = section
        section, _, name = key.rpartition(".")
    fields = _section_fields(kind, section)
    near = difflib.get_close_matches(name, fields or [], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    where = f"the section {section!r} has" if section else "there are"
    return f"Unknown key {key!r}{hint}; {where} {', '.join(fields or [])}."


def _section_fields(kind: Any, section: str) -> list[str] | None:
    for part in section.split(".") if section else []:
        kinds = {f.name: f.type for f in dataclasses.fields(kind)}
        kind = kinds.get(part)
        if not dataclasses.is_dataclass(kind):
            return None
    return [field.name for field in dataclasses.fields(kind)]
