"""The stage of every offline trainer: examples through one compiled step."""

import dataclasses
import math
from typing import Any

import jax
from etils import epath

from rlhf_jax.data.batching import Batches, eval_batches
from rlhf_jax.data.kinds import encode_examples
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime import program
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.evaluation.teacher_forced import sum_metrics
from rlhf_jax.runtime.loading import load_reference
from rlhf_jax.runtime.report.page import write_report
from rlhf_jax.runtime.stages import shared
from rlhf_jax.runtime.stages.checks import check_judged, check_lengths
from rlhf_jax.runtime.stages.products import PolicyProduct, RewardModelProduct
from rlhf_jax.runtime.stages.reference import with_reference
from rlhf_jax.training.flops import offline_flops, target_share
from rlhf_jax.training.state import make_optimizer


class OfflineStage(shared.BaseStage):
    """Training on examples that are there before it begins; see `run.stage.Stage`."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        settings, data = config.settings, config.data
        kind = self.trainer.reads(settings)
        train, held_out = self._load()
        train_batch = encode_examples(kind, train, self.tokenizer, data)
        self.batches = Batches(
            train_batch, settings.batch_size, config.seed, buckets=data.length_buckets
        )
        self.held_out = None
        if held_out:
            held_out_kind = self.trainer.kind_in_data(settings)
            self.held_out = encode_examples(held_out_kind, held_out, self.tokenizer, data)
        if self.trainer.trains == "policy":
            check_judged(kind, train_batch, self.held_out)
        self.total_steps = math.ceil(settings.num_epochs * self.batches.steps_per_epoch)
        self._compile()
        product = RewardModelProduct if self.trainer.trains == "reward_model" else PolicyProduct
        self.product = product(
            config,
            self.model,
            self.tokenizer,
            self.mesh,
            train,
            held_out,
            train_batch,
            self.held_out,
        )

    def _load(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Tokenizer, model, and the training and held-out examples."""
        kind = self.trainer.reads(self.config.settings)
        train, held_out = self.load_examples(self.config.data, kind)
        self.load_policy(lambda: map(shared.text_of, train))
        return train, held_out

    def _compile(self) -> None:
        steps, settings = self.steps, self.config.settings
        optimizer = make_optimizer(self.config.optimizer, self.total_steps, models=[self.model])

        def init(params):
            return steps.init_state(self.model, params, settings, self.key, optimizer=optimizer)

        place = program.Placement(self.mesh, self.model.partition_rules)
        self.batch_sharding = place.batch
        self._init, self._place = init, place
        step = steps.make_step(self.model, settings, optimizer=optimizer)
        shapes = jax.eval_shape(init, self.params)
        self._step = place.step(step, shapes)
        full = jax.eval_shape(self.full_params, shapes)
        self._evaluate = place.evaluation(steps.make_eval_step(self.model, settings), full)
        trains_policy = self.trainer.trains == "policy"
        share = target_share(self.batches.examples) if trains_policy else 0.0
        self.flops_per_token = offline_flops(self.model, shapes, target_share=share)

    def full_params(self, state: Any) -> Any:
        """The parameters of the full model, or reward model."""
        return self.steps.full_params(self.model, state)

    def init_state(self) -> Any:
        """The state before the first step, sharded; the loaded parameters are freed."""
        if self.trainer.has_reference and self.config.settings.has_reference:
            self._compute_reference()
        state = self._place.initialise(self._init, self.params)
        self.params = None
        return self.product.prepare(state)

    def _compute_reference(self) -> None:
        """Adds the log-probabilities of the reference to the examples that need them."""
        batches = {"eval": self.held_out} if self.held_out is not None else {}
        if self.config.settings.precompute_ref:
            batches["train"] = self.batches.examples
        model, params, place = self.model, self.params, self._place
        if (other := load_reference(self.config.model, self.tokenizer, self.mesh)) is not None:
            model, params = other
            check_lengths(self.trainer.reads(self.config.settings), self.config.data, model)
            place = program.Placement(self.mesh, model.partition_rules)
        step = self.steps.make_reference_step(model, self.config.settings)
        batches = with_reference(batches, params, self.config, place, step)
        self.held_out = batches.get("eval")
        if "train" in batches:
            self.batches = dataclasses.replace(self.batches, examples=batches["train"])

    def step(self, state: Any, index: int) -> Any:
        """One optimizer step on batch number `index`."""
        key = jax.random.fold_in(self.key, index)
        batch = shared.batch_at(self.batches, index, self.batch_sharding)
        self.show_memory(state, [(self._step, (state, batch, key))])
        return *self._step(state, batch, key), None

    def observe(self, output: Any) -> dict[str, float]:
        """{}: all metrics are computed on the devices."""
        return {}

    def evaluate(self, state: Any) -> dict[str, float]:
        """Metrics on the held-out examples, means over all their tokens or pairs; {} without."""
        if self.held_out is None:
            return {}
        params = self.full_params(state)
        batches = eval_batches(self.held_out, self.config.settings.eval_batch_size)
        sums = sum_metrics(self._evaluate(params, self._place.put(batch)) for batch in batches)
        count = sums.pop("count")
        means = {f"eval/{name}": value / count for name, value in sums.items()}
        return means | self.product.metrics(params, means)

    def samples(self, state: Any, output: Any, count: int) -> list[dict[str, Any]]:
        """Entries of `samples.jsonl`."""
        return self.product.samples(self.full_params(state), self.eval_key, count)

    def finish(self, state: Any) -> epath.Path:
        """Writes `hf/`, `evaluation.json` of a reward model, and the report."""
        self.product.finish(self.full_params(self.product.exported(state)))
        return hosts.from_first(write_report, epath.Path(self.config.run_dir))
