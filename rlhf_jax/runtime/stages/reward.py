"""The stage of the reward model: `train_reward`."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.batching import Batches, eval_batches
from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.encoding import warn
from rlhf_jax.data.formats import Kind
from rlhf_jax.data.pairs import encode_pairs
from rlhf_jax.data.rankings import encode_rankings
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.huggingface import save_reward_model
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.distributed import join
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import batch_sharding, check_batch_size, check_heads
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.runtime import loading as assemble
from rlhf_jax.runtime.config import RewardConfig, resolve
from rlhf_jax.runtime.evaluation.normalization import Normalizer
from rlhf_jax.runtime.evaluation.pairs import pair_evaluation, score_pairs
from rlhf_jax.runtime.evaluation.policies import save_evaluation
from rlhf_jax.runtime.evaluation.responses import decode
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages.sft import text_of
from rlhf_jax.runtime.stages.supervised import SupervisedStage, check_micro_batches
from rlhf_jax.training import reward
from rlhf_jax.training.trainable import check_num_layers


def train_reward(config: RewardConfig | str | Mapping[str, Any]) -> loop.StageResult:
    """Trains a reward model on compared responses; see `reward.Settings` for its objectives.

    Args:
      config: a `RewardConfig`, a YAML file, or a nested dict.

    Returns:
      The run folder, and the last value of each metric.

    Raises:
      InputError: one sentence about what is wrong with the configuration or the data.
    """
    config = resolve(RewardConfig, config)
    join(config.distributed)
    return loop.run(lambda: RewardStage(config), config)


def check_sizes(config: RewardConfig, model: GPT2, mesh: Mesh) -> None:
    """Raises an InputError if rows exceed the model's positions, or batches miss the mesh.

    Likewise if more layers are to be trained than there are.
    """
    check_num_layers(model, config.reward.num_layers_unfrozen, "reward")
    assemble.check_positions(
        model,
        config.data.max_prompt_length + config.data.max_response_length,
        "data.max_prompt_length + data.max_response_length",
    )
    check_heads(mesh, model.config.n_head)
    check_micro_batches(mesh, "reward", config.reward)
    check_batch_size(mesh, "reward.eval_batch_size", config.reward.eval_batch_size)


def kind_of(settings: reward.Settings) -> Kind:
    """What an objective reads: rows of "pairs", or whole "rankings"."""
    return "rankings" if settings.objective == "ranking" else "pairs"


class RewardStage(SupervisedStage):
    """What the loop needs of reward-model training; see `loop.Stage`."""

    name = "reward"

    def __init__(self, config: RewardConfig) -> None:
        self.config, data = config, config.data
        kind = kind_of(config.reward)
        train, held_out = load_examples(data, kind)
        if config.reward.objective != "last_token":
            unused = (
                f"rows have a margin, which reward.objective {config.reward.objective} ignores."
            )
            warn(sum(row["margin"] != 0 for row in train), len(train), unused)
        self.tokenizer = assemble.choose_tokenizer(
            config.tokenizer, config.model.path, lambda: (text_of(row) for row in train)
        )
        trunk_key, self.init_key, self.key = assemble.stage_keys(config.seed, "reward", 3)
        self.mesh = make_mesh(config.mesh)
        self.model, self.params = assemble.load_model(
            config.model, self.tokenizer, trunk_key, self.mesh
        )
        check_sizes(config, self.model, self.mesh)
        encode = encode_rankings if kind == "rankings" else encode_pairs
        rows = encode(train, self.tokenizer, data)
        self.batches = Batches(
            rows, config.reward.batch_size, config.seed, buckets=data.length_buckets
        )
        self.held_out = encode(held_out, self.tokenizer, data) if held_out else None
        self.total_steps = math.ceil(config.reward.num_epochs * self.batches.steps_per_epoch)
        self.compile_step(reward, config.reward, unembeds=False)
        self.normalize = Normalizer(self.model, self.mesh, rows, config.reward, config.seed)

    def init_state(self):
        """The state before the first step, normalized where that is asked for."""
        state = super().init_state()
        if not self.config.reward.normalize_before:
            return state
        return state._replace(params=self.normalize(state.params, state.frozen))

    def _at_end(self, state):
        """What is written and judged: after the last step, the normalized model if asked for.

        Checkpoints hold the model as it was trained, so that it is normalized once however often
        the run is continued.
        """
        return state if int(state.step) < self.total_steps else self._exported(state)

    def _exported(self, state):
        """The model that is written, of whatever step."""
        if not self.config.reward.normalize_after:
            return state
        return state._replace(params=self.normalize(state.params, state.frozen))

    def whole(self, state):
        """The reward model, frozen layers included."""
        return reward.full_params(self.model, state)

    def evaluate(self, state):
        """Loss, accuracy and mean difference of scores on the held-out pairs."""
        state = self._at_end(state)
        return self.held_out_means(state, self.config.reward.eval_batch_size)

    def samples(self, state, output, count):
        """Held-out pairs or rankings with the scores of all their responses."""
        if self.held_out is None or count == 0:
            return []
        state = self._at_end(state)
        rows = jax.tree.map(lambda array: np.asarray(array[:count]), self.held_out)
        sequences = jax.tree.map(np.asarray, reward.sequences_of(rows))
        responses, masks = sequences.tokens, sequences.mask
        scorer, params = jax.jit(end_scores, static_argnums=0), self.whole(state)
        scores = hosts.to_host(scorer(self.model, params, sequences))
        prompts = decode(self.tokenizer, rows.prompts, rows.prompt_mask)
        places = range(responses.shape[1])
        texts = [decode(self.tokenizer, responses[:, k], masks[:, k]) for k in places]
        ranked = self.config.reward.objective == "ranking"
        labels = [f"place {k + 1}" for k in places] if ranked else ["chosen", "rejected"]
        return [
            {"prompt": prompt, "response": texts[k][row], "label": labels[k], "score": score}
            for row, prompt in enumerate(prompts)
            for k in places
            if masks[row, k].any()
            for score in [float(scores[row, k])]
        ]

    def finish(self, state):
        """Writes `hf/`, which transformers opens as a sequence classifier with one label.

        And `evaluation.json`, with what the held-out pairs say of the scores.
        """
        state = self._exported(state)
        if self.held_out is not None:
            step, place = jax.jit(reward.make_score_step(self.model)), batch_sharding(self.mesh)
            params = self.whole(state)
            pairs = score_pairs(
                lambda batch: hosts.to_host(step(params, hosts.put(batch, place))),
                eval_batches(self.held_out, self.config.reward.eval_batch_size),
            )
            # The table is for a terminal: on the page of the run the charts say the same.
            save_evaluation(self.config.run_dir, {**pair_evaluation(pairs), "table": []})
        parts = (self.model, self.whole(state), self.tokenizer)
        assemble.export(self.config.run_dir, save_reward_model, *parts)
