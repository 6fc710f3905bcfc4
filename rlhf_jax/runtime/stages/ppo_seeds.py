"""PPO with several seeds at once: independent runs as one compiled program."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.models.huggingface import save_pretrained
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime import loading as assemble
from rlhf_jax.runtime.evaluation.policies import (
    Comparison,
    evaluation_of,
    save_evaluation,
    table_of,
)
from rlhf_jax.runtime.report.page import write_report
from rlhf_jax.runtime.report.seed_metrics import with_means
from rlhf_jax.runtime.stages.ppo import PPOStage
from rlhf_jax.training.ppo import PPOState, policy_params


class SeedsStage(PPOStage):
    """`num_seeds` runs that differ in their seeds alone, from `seed` on; see `loop.Stage`.

    The arrays of the state have a leading axis [N] of seeds, but for the frozen ones, which all
    runs share; so have batches, rollouts and metrics. Run i does what a run by itself does with the
    seed `seed + i`, but for rounding.
    """

    def _load(self) -> None:
        super()._load()
        self.seeds = tuple(range(self.config.seed, self.config.seed + self.config.num_seeds))
        # The batches of all seeds are one array, and so keep their full width.
        self.seed_batches = [
            dataclasses.replace(self.batches, seed=seed, buckets=1) for seed in self.seeds
        ]
        self.seed_texts = []
        if (texts := self.texts) is not None:
            self.seed_texts = [
                dataclasses.replace(texts, seed=texts.seed + place, buckets=1)
                for place in range(len(self.seeds))
            ]
        keys = [assemble.stage_keys(seed, "ppo", 3) for seed in self.seeds]
        self.seed_keys = jnp.stack([key for _, key, _ in keys])
        self.seed_eval_keys = [key for _, _, key in keys]
        self._seeds_compared: tuple[int, list[Comparison]] | None = None

    def _init(self, params, reward_params, value_params):
        state = super()._init(params, reward_params, value_params)
        many = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(self.seeds), *x.shape)), state)
        return many._replace(frozen=state.frozen)

    def _places(self, shape):
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shape)
        state, rows, whole = super()._places(one._replace(frozen=shape.frozen))
        many = jax.tree.map(_behind_seeds, state)
        return many._replace(frozen=state.frozen), _behind_seeds(rows), whole

    def _of_runs(self, function, num_arguments, *, returns_state):
        # All but the frozen parts have the axis of seeds.
        axes: Any = PPOState(**dict.fromkeys(PPOState._fields, cast(Any, 0)))._replace(frozen=None)
        return jax.vmap(
            function,
            in_axes=(axes, *(0 for _ in range(num_arguments - 1))),
            out_axes=(axes, 0, 0) if returns_state else 0,
        )

    def _batch(self, index):
        batches = [batches.at(index) for batches in self.seed_batches]
        if self.seed_texts:
            texts = [texts.at(index) for texts in self.seed_texts]
            batches = [b._replace(texts=t) for b, t in zip(batches, texts, strict=True)]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
        return hosts.from_host(stacked, self.rows_place)

    def _key(self, index):
        return jax.vmap(lambda key: jax.random.fold_in(key, index))(self.seed_keys)

    def _split(self, key):
        return jnp.moveaxis(jax.vmap(jax.random.split)(key), 0, 1)

    def _score(self, state, batch, responses):
        if hosts.several():
            batch, responses = hosts.to_host((batch, responses))
        flat = [jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), x) for x in (batch, responses)]
        return jax.tree.map(lambda x: x.reshape(len(self.seeds), -1), super()._score(state, *flat))

    def step(self, state, index):
        """One iteration of every run; its metrics are means, its output holds those of each."""
        state, metrics, (rollout, indices) = super().step(state, index)
        means = {name: jnp.mean(x) for name, x in metrics.items() if name != "perf/tokens"}
        means["perf/tokens"] = jnp.sum(metrics.pop("perf/tokens"))
        return state, means, (rollout, indices, metrics)

    def observe(self, output):
        """The metrics of each seed, and the gold score of the sampled responses if there is one."""
        rollout, indices, metrics = output
        values = hosts.to_host(metrics)
        found = [
            super(SeedsStage, self).observe((_run(rollout, place), indices[place]))
            for place in range(len(self.seeds))
        ]
        values |= {name: [values[name] for values in found] for name in found[0]}
        return with_means(self.seeds, values)

    def evaluate(self, state):
        """The evaluation of each run on held-out prompts, and the means."""
        if self.held_out is None:
            return {}
        compared = [comparison.metrics for comparison in self._compare_all(state)]
        values = {f"eval/{name}": [c[name] for c in compared] for name in compared[0]}
        return with_means(self.seeds, values)

    def _compare_all(self, state) -> list[Comparison]:
        """The comparison of each run at this state, made once."""
        step = int(state.step[0])
        if self._seeds_compared is None or self._seeds_compared[0] != step:
            found = [
                self._judge_both(_run_of(state, place), key, place)
                for place, key in enumerate(self.seed_eval_keys)
            ]
            self._seeds_compared = (step, found)
        return self._seeds_compared[1]

    def samples(self, state, output, count):
        """Responses of the first seed."""
        if output is None:
            return []
        return super().samples(state, (_run(output[0], 0),), count)

    def finish(self, state):
        """Writes `hf/` with the first seed's policy, `seed_N/hf/` with the others', and
        `evaluation.json` with the means of all and samples of the first.
        """
        for place, seed in enumerate(self.seeds):
            params = policy_params(self.model, _run_of(state, place))
            folder = f"{self.config.run_dir}/seed_{seed}" if place else self.config.run_dir
            assemble.export(folder, save_pretrained, self.model, params, self.tokenizer)
        if self.held_out is not None:
            self._save_comparison(state)
        return hosts.from_first(write_report, self.config.run_dir)

    def _save_comparison(self, state):
        compared = self._compare_all(state)
        first = evaluation_of(compared[0], self.config.evaluation.num_samples)
        values = {name: [c.metrics[name] for c in compared] for name in compared[0].metrics}
        metrics = with_means(self.seeds, values)
        metrics["num_prompts"] = first["metrics"]["num_prompts"]
        table = _mean_table([table_of(comparison) for comparison in compared])
        save_evaluation(self.config.run_dir, {**first, "metrics": metrics, "table": table})


def _mean_table(tables: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One table of means; the names of its rows say how far the seeds lie apart at the end."""
    rows = []
    for same in zip(*tables, strict=True):
        after = [row["after"] for row in same]
        before = [row["before"] for row in same if row["before"] is not None]
        name = f"{same[0]['metric']}, mean of {len(same)} seeds ± {np.std(after, ddof=1):.2g}"
        means = {"before": float(np.mean(before)) if before else None}
        rows.append({"metric": name, **means, "after": float(np.mean(after))})
    return rows


def _run(tree: Any, place: int) -> Any:
    """What one run has of arrays of all runs."""
    return jax.tree.map(lambda x: x[place], tree)


def _run_of(state: PPOState, place: int) -> PPOState:
    """The state of one run, with the frozen parts that all share."""
    return _run(state._replace(frozen=None), place)._replace(frozen=state.frozen)


def _behind_seeds(sharding: NamedSharding) -> NamedSharding:
    """The same with an axis of seeds before it, which is not split."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
