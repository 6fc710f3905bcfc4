"""All three stages with one configuration: `rlhf run`."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.settings import TokenizerSettings
from rlhf_jax.errors import InputError
from rlhf_jax.models.adapter_folders import with_settings
from rlhf_jax.models.adapter_settings import LoraSettings
from rlhf_jax.models.huggingface import check_pretrained, fresh_model
from rlhf_jax.models.interface import Model
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.distributed import join
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.runtime.commands.main import train
from rlhf_jax.runtime.config import (
    PPOConfig,
    RewardConfig,
    RLHFConfig,
    RunConfig,
    SFTConfig,
    resolve,
)
from rlhf_jax.runtime.evaluation.policies import read_evaluation, save_evaluation
from rlhf_jax.runtime.loading import check_reward, choose_tokenizer, shares_tokens
from rlhf_jax.runtime.report.page import write_report
from rlhf_jax.runtime.report.tables import format_table
from rlhf_jax.runtime.rewards.functions import load_function
from rlhf_jax.runtime.rewards.scorers import find_sources
from rlhf_jax.runtime.run.folder import claim_run_dir, is_finished, write_config
from rlhf_jax.runtime.run.lock import locked
from rlhf_jax.runtime.run.progress import preparing
from rlhf_jax.runtime.run.stage import StageResult
from rlhf_jax.runtime.stages import shared
from rlhf_jax.runtime.stages.checks import check_run, check_scorer
from rlhf_jax.runtime.stages.online import step_settings
from rlhf_jax.runtime.stages.values import value_label, value_path


def run_rlhf(config: RLHFConfig | str | Mapping[str, Any]) -> StageResult:
    """Supervised fine-tuning, a reward model, then PPO, each from the export of the one before.

    The run folders of the stages are `sft/`, `reward/` and `ppo/` inside that of the pipeline, and
    each continues where it was interrupted. The reward model starts from the fine-tuned model,
    unless `model.reward_path` names one that is trained already; then that stage is left out, as it
    is where `rewards` has other sources and none without path and function.

    Args:
      config: an `RLHFConfig`, a YAML file, or a nested dict.

    Returns:
      `StageResult`: the run folder, and the last value of each metric, under `sft/...`,
      `reward/...`, `ppo/...`.

    Raises:
      InputError: one sentence about a mistake in the configuration or the data.
    """
    config = resolve(RLHFConfig, config)
    join(config.distributed)
    with hosts.failing_together(), locked(config.run_dir):
        return _run(config)


def _run(config: RLHFConfig) -> StageResult:
    hosts.from_first(claim_run_dir, config)
    metrics: dict[str, float] = {}
    stages = stage_configs(config)
    if not hosts.from_first(is_finished, stages[0]):
        shown = config.logging.progress and hosts.is_first()
        with preparing("run", "checking the data and the models of all stages", shown=shown):
            _check_ahead(config, stages)
    for number, stage in enumerate(stages, start=1):
        trainer = stage.trainer
        if hosts.is_first():
            title = trainer.title if trainer.title.isupper() else trainer.title.lower()
            print(f"Stage {number} of {len(stages)}: {title}", file=sys.stderr, flush=True)
        result = train(trainer, stage)
        metrics |= {f"{trainer.name}/{key}": value for key, value in result.metrics.items()}
    hosts.from_first(_finish, config, metrics)
    return StageResult(config.run_dir, metrics)


def _check_ahead(config: RLHFConfig, stages: list[RunConfig]) -> None:
    """Checks the later stages, before hours are spent on the first."""
    sft, ppo = stages[0], stages[-1]
    path = config.model.path
    model = fresh_model(config.model, vocab_size=50257) if path is None else check_pretrained(path)
    mesh = make_mesh(config.mesh)
    for name in (config.evaluation.gold_fn, config.evaluation.judge_fn):
        if name is not None:
            load_function(name)

    def tokenizer():
        examples, _ = load_examples(sft.data, "text", quiet=True)
        return choose_tokenizer(sft.tokenizer, path, lambda: map(shared.text_of, examples))

    for stage in stages[1:]:
        examples, _ = load_examples(stage.data, stage.trainer.reads(stage.settings), quiet=True)
        if all("chosen" in each and each["chosen"] == each["rejected"] for each in examples):
            raise InputError(
                f"No pair is left of the {len(examples)} in {stage.data.path}: the two responses "
                "of each are equal."
            )
    if config.ppo.ptx_coef:
        load_examples(config.data.ptx_texts, "text", quiet=True)
    for stage in stages[1:]:
        check_run(stage, with_settings(model, stage.lora), mesh)
    if config.ppo.truncate_token is not None:
        step_settings(ppo, tokenizer())
    _check_rewards_ahead(config, ppo, model, tokenizer)


def _check_rewards_ahead(config: RLHFConfig, ppo: RunConfig, model: Model, tokenizer: Any) -> None:
    """The same of reward models; `model` has the architecture of the one that is trained."""
    paths = {
        each.source.path: each.source.label
        for each in find_sources(ppo.model.reward_path, config.rewards)
    }
    if (path := value_path(ppo)) is not None:
        paths.setdefault(path, value_label(ppo))
    for path, label in paths.items():
        if path == _trained(config):
            check_scorer(ppo, model)
        elif path is not None:
            scorer, theirs = check_reward(path, config.model, label)
            if shares_tokens(tokenizer(), theirs):
                check_scorer(ppo, scorer)


def trains_reward_model(config: RLHFConfig) -> bool:
    """Whether a reward model is trained: none is named, and the rewards of PPO need one."""
    needed = not config.rewards or any(source.is_bare for source in config.rewards)
    return config.model.reward_path is None and needed


def _trained(config: RLHFConfig) -> str:
    return f"{config.run_dir}/reward/hf"


def stage_configs(config: RLHFConfig) -> list[RunConfig]:
    """The configurations of the stages, in order; later ones start from the fine-tuned model."""

    # Adapters that were read are merged into the fine-tuned model.
    later_lora = config.lora if config.model.adapter_path is None else LoraSettings()

    def shared_by(stage):
        names = ("mesh", "distributed", "logging", "checkpoint", "seed")
        return {
            **{name: vars(config)[name] for name in names},
            "lora": config.lora if stage == "sft" else later_lora,
            "data": vars(config.data)[stage],
            "optimizer": vars(config.optimizer)[stage],
            "run_dir": f"{config.run_dir}/{stage}",
        }

    sft = SFTConfig(
        model=dataclasses.replace(config.model, reward_path=None),
        tokenizer=config.tokenizer,
        sft=config.sft,
        generation=config.generation,
        **shared_by("sft"),
    )
    tuned = dataclasses.replace(config.model, path=f"{sft.run_dir}/hf", adapter_path=None)
    # Which the tuned model's folder does not hold, unlike its tokenizer.
    variables = config.tokenizer.chat_template_kwargs
    tokenizer = TokenizerSettings(chat_template_kwargs=variables)
    trains_reward = trains_reward_model(config)
    reward_path = _trained(config) if trains_reward else config.model.reward_path
    ppo = PPOConfig(
        model=dataclasses.replace(tuned, reward_path=reward_path),
        tokenizer=tokenizer,
        ptx=config.data.ptx_texts,
        ppo=config.ppo,
        rewards=config.rewards,
        evaluation=config.evaluation,
        **shared_by("ppo"),
    )
    if not trains_reward:
        return [sft, ppo]
    parts = {"model": tuned, "tokenizer": tokenizer, "reward": config.reward}
    return [sft, RewardConfig(**parts, **shared_by("reward")), ppo]


def _finish(config: RLHFConfig, metrics: dict[str, float]) -> None:
    """Writes configuration and report into the outer folder, and prints the table."""
    if (accuracy := metrics.get("reward/eval/accuracy")) is not None:
        print(f"Reward model: {accuracy:.1%} of the held-out pairs ranked as their label says")
    write_config(config)
    compared = read_evaluation(f"{config.run_dir}/ppo")
    if compared is not None:
        save_evaluation(config.run_dir, compared)
        print(format_table(compared["table"]))
    print(f"Report: {write_report(config.run_dir)}")
