"""The reward-KL frontier of DPO, IPO, PPO and supervised fine-tuning on continuations of texts.

    python scripts/frontier.py --config configs/imdb/frontier.yaml

One language model is fine-tuned on texts and continues beginnings of texts; a gold score says how
good a continuation is. For each seed, continuations of that model are compared by the gold score.
DPO, IPO and supervised fine-tuning learn from these pairs; PPO learns from the gold score itself,
and from a reward model of the same pairs. At equal steps of each run the policy continues held-out
beginnings: a point is their mean gold score over the KL divergence from the fine-tuned model.

Figure 2 of Rafailov et al., Direct Preference Optimization (arXiv:2305.18290). Points are added to
`points.jsonl` of the run folder; the same command continues after the last complete curve.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import functional
from rlhf_jax.batches import PairBatch, PromptBatch, Rollout, Sequences
from rlhf_jax.data.batching import Batches
from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.prompts import encode_prompts
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import InputError
from rlhf_jax.models import load_pretrained
from rlhf_jax.rollout import end_scores, response_logprobs
from rlhf_jax.runtime import train_sft
from rlhf_jax.runtime.commands.terminal import run_command
from rlhf_jax.runtime.parsing import to_yaml
from rlhf_jax.runtime.rewards.functions import call_scores, load_function
from rlhf_jax.runtime.rewards.texts import decode
from rlhf_jax.training import ppo, reward
from rlhf_jax.training.epochs import apply_gradients
from rlhf_jax.training.online import sample_responses
from rlhf_jax.training.reward import sequences_of
from rlhf_jax.training.state import init_train_state, make_optimizer

# Where `scripts` and `configs` are found, also when this file is run from another folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from scripts import frontier_report as report  # noqa: E402
from scripts.frontier_report import METHODS, Curve, Point  # noqa: E402
from scripts.frontier_settings import Config, Settings  # noqa: E402

KINDS = ("sigmoid", "ipo")  # of `functional.dpo_loss`, those of DPO and IPO

# (step, full parameters) of a run at its evaluations.
Snapshots = Iterator[tuple[int, Any]]


class Experiment:
    """The parts that all runs share: model, beginnings, gold score and compiled programs."""

    def __init__(self, config: Config) -> None:
        folder = Path(config.run_dir) / "sft"
        self.config, self.gold_function = config, load_function(config.gold)
        if not (folder / "hf").exists():
            train_sft(dataclasses.replace(config.sft, run_dir=str(folder)))
        self.model, self.params = load_pretrained(folder / "hf")
        self.tokenizer = load_tokenizer(folder / "hf")
        examples = load_examples(config.data, "prompts")
        self.prompts, self.held_out = (
            encode_prompts(each, self.tokenizer, config.data) for each in examples
        )
        self.sample = jax.jit(functools.partial(_sample, self.model, config.ppo))
        self.score = jax.jit(functools.partial(end_scores, self.model))

    def gold(self, prompts: PromptBatch, rollout: Rollout) -> np.ndarray:
        """f32[B]: the gold score of each continuation."""
        texts = decode(self.tokenizer, prompts.prompts, prompts.prompt_mask)
        continuations = decode(self.tokenizer, rollout.tokens, rollout.mask)
        scores = call_scores(self.gold_function, texts, continuations, {})
        return np.asarray(scores, np.float32)

    def evaluate(self, params: Any, key: jax.Array) -> tuple[float, float]:
        """(KL in nats per continuation, mean gold score) on the held-out beginnings."""
        rollout, log_ratios = self.sample(params, self.params, self.held_out, key)
        return float(jnp.mean(log_ratios)), float(self.gold(self.held_out, rollout).mean())

    def copied_params(self) -> Any:
        """The fine-tuned parameters, for a state that its first step consumes."""
        return jax.tree.map(jnp.copy, self.params)

    @functools.cached_property
    def dpo_optimizer(self):
        """Of the methods on pairs."""
        steps = self.config.frontier.steps
        return make_optimizer(self.config.optimizer.dpo, steps, models=[self.model])

    @functools.cached_property
    def ppo_optimizer(self):
        """Of PPO."""
        updates = self.config.ppo.num_updates
        return make_optimizer(self.config.optimizer.ppo, updates, models=[self.model])

    @functools.cached_property
    def pair_step(self) -> Callable:
        """A step on pairs. The coefficient is an argument: one program serves all runs."""
        step = functools.partial(pair_step, self.model, self.dpo_optimizer)
        return jax.jit(step, donate_argnums=0)

    @functools.cached_property
    def ppo_steps(self) -> tuple[Callable, Callable]:
        """(sampling, update) of PPO. The KL coefficient is in its state: one program serves all."""
        settings = self.config.ppo
        update = ppo.make_update_step(self.model, settings, optimizer=self.ppo_optimizer)
        rollout = ppo.make_rollout_step(self.model, settings)
        return jax.jit(rollout), jax.jit(update, donate_argnums=0)

    @functools.cached_property
    def reward_step(self) -> tuple[Callable, Any]:
        """(step, optimizer) of the reward model."""
        steps = self.config.frontier.steps
        optimizer = make_optimizer(self.config.optimizer.reward, steps, models=[self.model])
        step = reward.make_step(self.model, self.config.reward, optimizer=optimizer)
        return jax.jit(step, donate_argnums=0), optimizer


def _sample(model, settings, params, reference, batch, key):
    """(Rollout, f32[B] log(policy / reference) of each continuation, in nats)."""
    rollout = sample_responses(model, params, batch, key, settings)
    sequences = Sequences(batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
    logprobs, _, _ = response_logprobs(
        model, reference, sequences, temperature=settings.temperature
    )
    log_ratios = jnp.where(rollout.mask, rollout.logprobs - logprobs, 0.0)
    return rollout, jnp.sum(log_ratios, axis=1)


class Continuations(NamedTuple):
    """Continuations of beginnings, arrays [B, ...].

    Attributes:
      tokens, mask: i32[B, T] and bool[B, T].
      logprobs: f32[B], sums over the tokens under the fine-tuned model, in nats.
      gold: f32[B], the gold scores.
    """

    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    gold: np.ndarray


def make_pairs(experiment: Experiment, seed: int) -> PairBatch:
    """Pairs of continuations that the fine-tuned model samples, for one seed.

    Its log-probabilities are those of the reference. 4 continuations of a beginning make up to 6
    pairs (appendix C.1 of the paper).
    """
    settings, prompts = experiment.config.frontier, experiment.prompts
    size, count = len(experiment.held_out.indices), settings.num_completions
    order = np.random.default_rng(seed).permutation(len(prompts.indices))[: settings.num_prompts]
    chosen = jax.tree.map(lambda x: x[order], prompts)
    batches = Batches(chosen, size, seed, shuffle=False)
    parts = [
        [_continuations(experiment, batches.at(part), seed, part * count + n) for n in range(count)]
        for part in range(batches.steps_per_epoch)
    ]
    # From [parts][K] batches to arrays [N, K, ...].
    of_part = [jax.tree.map(lambda *x: np.stack(x, axis=1), *each) for each in parts]
    joined = jax.tree.map(lambda *x: np.concatenate(x)[: len(order)], *of_part)
    return pairs_of(chosen, joined)


def _continuations(experiment, batch, seed, number):
    key = jax.random.fold_in(jax.random.key(seed), number)
    rollout, _ = jax.device_get(experiment.sample(experiment.params, experiment.params, batch, key))
    gold = experiment.gold(batch, rollout)
    return Continuations(rollout.tokens, rollout.mask, rollout.logprobs.sum(axis=1), gold)


def pairs_of(prompts: PromptBatch, continuations: Continuations) -> PairBatch:
    """All pairs of K continuations of each prompt, arrays [N, K, ...], with unequal gold scores."""
    gold = continuations.gold
    index, chosen, rejected = np.nonzero(gold[:, :, None] > gold[:, None, :])
    if not index.size:
        raise InputError("The gold scores of all continuations of each beginning are equal.")
    tokens, mask, logprobs = continuations[:3]
    responses = [each[index, side] for side in (chosen, rejected) for each in (tokens, mask)]
    references = logprobs[index, chosen], logprobs[index, rejected]
    margin, valid = np.zeros(index.size, np.float32), np.ones(index.size, bool)
    arrays: Any = (*responses, margin, valid, *references)
    return PairBatch(prompts.prompts[index], prompts.prompt_mask[index], *arrays)


def pair_step(model, optimizer, state, batch, weights, beta):
    """The state after a step on a `PairBatch`.

    Args:
      weights: f32[3], of the losses of DPO, IPO (of sums over tokens, as in its paper) and
        supervised fine-tuning on the chosen responses.
      beta: f32[], of the first two.
    """

    def loss_fn(params):
        sequences = sequences_of(batch)
        logprobs, _, _ = response_logprobs(model, params, sequences, temperature=1.0)
        logprobs = jnp.where(sequences.mask, logprobs, 0.0)
        sums, mask = jnp.sum(logprobs, axis=2), sequences.mask[:, 0]
        arrays = sums[:, 0], sums[:, 1], batch.ref_chosen, batch.ref_rejected
        kinds = [functional.dpo_loss(*arrays, beta=beta, kind=kind)[0] for kind in KINDS]
        likelihood = functional.masked_mean(logprobs[:, 0], mask)
        return jnp.dot(weights, jnp.stack([*kinds, -likelihood]))

    gradients = jax.grad(loss_fn)(state.params)
    params, opt_state, _ = apply_gradients(optimizer, state.params, state.opt_state, gradients)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state)


def train_on_pairs(experiment: Experiment, curve: Curve, pairs: PairBatch) -> Snapshots:
    """DPO, IPO, or supervised fine-tuning on the chosen continuations."""
    weights = np.asarray([curve.method == each for each in ("dpo", "ipo", "sft")], np.float32)
    # The likelihood has no coefficient, but the other losses are computed with one.
    beta = np.float32(curve.coefficient or 1.0)
    state = init_train_state(experiment.copied_params(), experiment.dpo_optimizer)
    settings = experiment.config.frontier
    batches = Batches(pairs, settings.batch_size, curve.seed)
    for index in range(settings.steps):
        state = experiment.pair_step(state, batches.at(index), weights, beta)
        yield index + 1, state.params


def train_reward_model(experiment: Experiment, pairs: PairBatch, seed: int) -> Any:
    """Parameters of a reward model of the pairs."""
    settings, key = experiment.config.reward, jax.random.key(seed)
    step, optimizer = experiment.reward_step
    state = reward.init_state(
        experiment.model, experiment.copied_params(), settings, key, optimizer=optimizer
    )
    batches = Batches(pairs._replace(ref_chosen=None, ref_rejected=None), settings.batch_size, seed)
    for index in range(experiment.config.frontier.steps):
        state, _ = step(state, batches.at(index), key)
    return reward.full_params(experiment.model, state)


def train_by_ppo(experiment: Experiment, curve: Curve, scorer: Any = None) -> Snapshots:
    """PPO on the gold score, or on the scores of a reward model."""
    settings = dataclasses.replace(experiment.config.ppo, kl_coef=curve.coefficient)
    model, key = experiment.model, jax.random.key(curve.seed)
    rollout_step, update_step = experiment.ppo_steps
    state = ppo.init_state(
        model, experiment.copied_params(), settings, key, optimizer=experiment.ppo_optimizer
    )
    batches = Batches(experiment.prompts, settings.batch_size, curve.seed)
    for index in range(settings.total_iterations):
        sample_key, update_key = jax.random.split(jax.random.fold_in(key, index))
        batch = batches.at(index)
        rollout = rollout_step(state, batch, sample_key)
        if scorer is None:
            scores = experiment.gold(batch, rollout)
        else:
            sequences = Sequences(batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
            scores = experiment.score(scorer, sequences)
        state, _, _ = update_step(state, batch, rollout, scores, update_key)
        yield index + 1, ppo.policy_params(model, state)


def points_of(experiment: Experiment, curve: Curve, snapshots: Snapshots, total: int) -> list:
    """The points of a run of `total` steps."""
    every = total // experiment.config.frontier.num_points
    points, start = [], time.perf_counter()
    for step, params in snapshots:
        if step % every:
            continue
        key = jax.random.fold_in(jax.random.key(curve.seed + 2**16), step)
        kl, gold = experiment.evaluate(params, key)
        seconds = round(time.perf_counter() - start, 1)
        points.append(Point(*curve, step, round(kl, 4), round(gold, 4), seconds))
        print(
            f"{METHODS[curve.method]} {curve.coefficient:g}, seed {curve.seed}, step {step}: "
            f"KL {kl:.2f}, gold score {gold:.3f}, {seconds:.0f} s",
            flush=True,
        )
    return points


def curves_of(settings: Settings, seed: int) -> list[Curve]:
    """The runs of one seed."""
    coefficients = {
        "start": (0.0,),
        "dpo": settings.dpo_beta,
        "ipo": settings.ipo_beta,
        "sft": (0.0,) if settings.sft else (),
        "ppo": settings.ppo_kl_coef,
        "ppo_reward": settings.ppo_reward_kl_coef,
    }
    return [Curve(name, each, seed) for name, values in coefficients.items() for each in values]


def run_curves(experiment: Experiment, curves: list[Curve], file: Path) -> None:
    """Runs the curves of one seed and adds their points to the file."""
    frontier, seed = experiment.config.frontier, curves[0].seed
    pairs = functools.cache(lambda: make_pairs(experiment, seed))
    scorer = functools.cache(lambda: train_reward_model(experiment, pairs(), seed))
    for curve in curves:
        if curve.method == "start":
            total, snapshots = frontier.num_points, iter([(0, experiment.params)])
        elif curve.method.startswith("ppo"):
            total = experiment.config.ppo.total_iterations
            reads_model = curve.method == "ppo_reward"
            snapshots = train_by_ppo(experiment, curve, scorer() if reads_model else None)
        else:
            total, snapshots = frontier.steps, train_on_pairs(experiment, curve, pairs())
        points = points_of(experiment, curve, snapshots, total)
        report.add_points(file, points)


def check_folder(config: Config) -> None:
    """Writes `config.yaml` to the run folder; an InputError if one of other settings is there."""
    file, text = Path(config.run_dir) / "config.yaml", to_yaml(config.without_runs())
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{config.run_dir} holds points of other settings, which are in its config.yaml; give "
            "another --run_dir. Only coefficients and seeds can be added."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def main(config: Config) -> None:
    """Runs what `points.jsonl` lacks, prints the tables and draws the plot."""
    check_folder(config)
    folder = Path(config.run_dir)
    file = folder / "points.jsonl"
    done = {Curve(*point[:3]) for point in report.read_points(file)}
    wanted = [curves_of(config.frontier, seed) for seed in config.frontier.seeds]
    missing = [[each for each in curves if each not in done] for curves in wanted]
    if any(missing):
        experiment = Experiment(config)
        for curves in filter(None, missing):
            run_curves(experiment, curves, file)
    every = {curve for curves in wanted for curve in curves}
    points = [point for point in report.read_points(file) if Curve(*point[:3]) in every]
    print(report.table_of_last_steps(points), end="\n\n")
    print(report.table_of_frontiers(points, config.frontier.kl_limits), end="\n\n")
    print(f"Plot: {report.draw(points, folder)}")


if __name__ == "__main__":
    sys.exit(run_command("scripts/frontier.py", Config, main, sys.argv[1:]))
