"""All three stages with one configuration: `run_rlhf`."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from rlhf_jax.data.datasets import load_examples
from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import check_pretrained, fresh_model
from rlhf_jax.models.interface import Model
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.distributed import join
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.runtime import loading as assemble
from rlhf_jax.runtime.config import (
    PPOConfig,
    RewardConfig,
    RLHFConfig,
    SFTConfig,
    claim_run_dir,
    resolve,
)
from rlhf_jax.runtime.evaluation import policies as judging
from rlhf_jax.runtime.report.page import format_table, write_report
from rlhf_jax.runtime.rewards.scorers import find_sources
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.run.metrics import disk_errors
from rlhf_jax.runtime.stages import ppo, reward
from rlhf_jax.runtime.stages.sft import first_tokenizer, train_sft


def run_rlhf(config: RLHFConfig | str | Mapping[str, Any]) -> loop.StageResult:
    """Supervised fine-tuning, then a reward model, then PPO, each from what the last one left.

    The run folders of the stages are `sft/`, `reward/` and `ppo/` inside that of the whole, and
    each continues where it was interrupted. The reward model starts from the fine-tuned model,
    unless `model.reward_path` names one that is trained already; then that stage is left out, as it
    is where `rewards` has other sources and none without path and function.

    Args:
      config: an `RLHFConfig`, a YAML file, or a nested dict.

    Returns:
      The run folder, and the last value of each metric, under `sft/...`, `reward/...`, `ppo/...`.

    Raises:
      InputError: one sentence about what is wrong with the configuration or the data.
    """
    config = resolve(RLHFConfig, config)
    join(config.distributed)
    with hosts.failing_together():
        return _run(config)


def _run(config: RLHFConfig) -> loop.StageResult:
    hosts.from_first(claim_run_dir, config)
    metrics: dict[str, float] = {}
    stages: list[tuple[str, Callable[..., loop.StageResult], Any]] = [
        ("sft", train_sft, sft_config(config))
    ]
    if trains_reward_model(config):
        stages.append(("reward", reward.train_reward, reward_config(config)))
    stages.append(("ppo", ppo.train_ppo, ppo_config(config)))
    for number, (name, train, stage_config) in enumerate(stages, start=1):
        if hosts.is_first():
            print(f"Stage {number} of {len(stages)}: {_TITLES[name]}", file=sys.stderr, flush=True)
        if number == 1 and not hosts.from_first(loop.is_finished, stage_config.run_dir):
            _check_ahead(config)
        result = train(stage_config)
        metrics |= {f"{name}/{key}": value for key, value in result.metrics.items()}
    hosts.from_first(_finish, config, metrics)
    return loop.StageResult(config.run_dir, metrics)


def _check_ahead(config: RLHFConfig) -> None:
    """Finds what is wrong with the later stages before hours are spent on the first."""
    if config.model.path is None:
        model = fresh_model(config.model, vocab_size=1)
    else:
        model = check_pretrained(config.model.path)
    mesh = make_mesh(config.mesh)
    for name in (config.evaluation.gold_fn, config.evaluation.judge_fn):
        if name is not None:
            assemble.load_function(name)
    if trains_reward_model(config):
        rows, _ = load_examples(config.data.reward, reward.kind_of(config.reward), quiet=True)
        if all("chosen" in row and row["chosen"] == row["rejected"] for row in rows):
            raise InputError(
                f"No pair is left of the {len(rows)} in {config.data.reward.path}: the two "
                "responses of each are equal."
            )
        reward.check_sizes(reward_config(config), model, mesh)
    if config.ppo.truncate_token is not None:
        ppo.step_settings(ppo_config(config), first_tokenizer(sft_config(config)))
    load_examples(config.data.ppo, ppo.kind_of(ppo_config(config)), quiet=True)
    if config.ppo.ptx_coef:
        load_examples(config.data.ptx_texts, "text", quiet=True)
    ppo.check_sizes(ppo_config(config), model, mesh)
    _check_rewards_ahead(config, model)


def _check_rewards_ahead(config: RLHFConfig, model: Model) -> None:
    """The same of what scores and values responses; `model` has the form of what is trained."""
    of_ppo, trained = ppo_config(config), _trained(config)
    paths = {
        each.source.path: each.source.label
        for each in find_sources(of_ppo.model.reward_path, config.rewards)
    }
    if (path := ppo.value_path(of_ppo)) is not None:
        paths.setdefault(path, ppo.value_label(of_ppo))
    for path, label in paths.items():
        if path == trained:
            ppo.check_scorer(of_ppo, model)
        elif path is not None:
            scorer, theirs = assemble.check_reward(path, config.model, label)
            if assemble.shares_tokens(first_tokenizer(sft_config(config)), theirs):
                ppo.check_scorer(of_ppo, scorer)


def trains_reward_model(config: RLHFConfig) -> bool:
    """Whether a reward model is trained: there is none yet, and PPO's rewards call for one."""
    called_for = not config.rewards or any(source.is_bare for source in config.rewards)
    return config.model.reward_path is None and called_for


def _trained(config: RLHFConfig) -> str:
    return f"{config.run_dir}/reward/hf"


_TITLES = {"sft": "supervised fine-tuning", "reward": "reward model", "ppo": "PPO"}


def sft_config(config: RLHFConfig) -> SFTConfig:
    """The part of the configuration that is the first stage's."""
    return SFTConfig(
        model=dataclasses.replace(config.model, reward_path=None),
        tokenizer=config.tokenizer,
        data=config.data.sft,
        optimizer=config.optimizer.sft,
        sft=config.sft,
        generation=config.generation,
        run_dir=f"{config.run_dir}/sft",
        **_shared(config),
    )


def reward_config(config: RLHFConfig) -> RewardConfig:
    """The part of the configuration that is the second stage's."""
    return RewardConfig(
        model=dataclasses.replace(config.model, path=f"{config.run_dir}/sft/hf"),
        data=config.data.reward,
        optimizer=config.optimizer.reward,
        reward=config.reward,
        run_dir=f"{config.run_dir}/reward",
        **_shared(config),
    )


def ppo_config(config: RLHFConfig) -> PPOConfig:
    """The part of the configuration that is the third stage's."""
    reward_path = _trained(config) if trains_reward_model(config) else config.model.reward_path
    model = dataclasses.replace(
        config.model, path=f"{config.run_dir}/sft/hf", reward_path=reward_path
    )
    return PPOConfig(
        model=model,
        data=config.data.ppo,
        ptx=config.data.ptx_texts,
        optimizer=config.optimizer.ppo,
        ppo=config.ppo,
        rewards=config.rewards,
        evaluation=config.evaluation,
        num_seeds=config.num_seeds,
        run_dir=f"{config.run_dir}/ppo",
        **_shared(config),
    )


def _shared(config: RLHFConfig) -> dict[str, Any]:
    names = ("mesh", "distributed", "logging", "checkpoint", "seed")
    return {name: getattr(config, name) for name in names}


def _finish(config: RLHFConfig, metrics: dict[str, float]) -> None:
    """Puts the report of all stages into the outer folder, and prints the table."""
    if (accuracy := metrics.get("reward/eval/accuracy")) is not None:
        print(f"Reward model: {accuracy:.1%} of the held-out pairs ranked as their label says")
    folder = epath.Path(config.run_dir)
    compared = judging.read_evaluation(f"{config.run_dir}/ppo")
    if compared is not None:
        judging.save_evaluation(config.run_dir, compared)
        print(format_table(compared["table"]))
    with disk_errors(folder):
        report = write_report(folder)
    print(f"Report: {report}")
