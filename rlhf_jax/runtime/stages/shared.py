"""Parts of the stages: keys, models, batches on the mesh, saved states, the export."""

import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from rlhf_jax import training
from rlhf_jax.batches import ScoredRollout
from rlhf_jax.data.batching import Batches
from rlhf_jax.data.chat import contents
from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.formats import Kind
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError
from rlhf_jax.models.adapter_folders import save_adapter
from rlhf_jax.models.adapters import adapters_of
from rlhf_jax.models.interface import Model
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.evaluation.policies import Comparison, EvaluatedResponses
from rlhf_jax.runtime.evaluation.responses import token_entries
from rlhf_jax.runtime.loading import add_adapters, choose_tokenizer, load_model
from rlhf_jax.runtime.program import Placement
from rlhf_jax.runtime.rewards.texts import decode
from rlhf_jax.runtime.run.folder import disk_errors, is_remote
from rlhf_jax.runtime.run.progress import show_note
from rlhf_jax.runtime.run.records import digest, fingerprint
from rlhf_jax.runtime.stages import memory
from rlhf_jax.runtime.stages.checks import check_run


def stage_keys(seed: int, trainer: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys of a trainer: for a fresh model, for the steps, for held-out responses.

    They derive from the seed and the place of the trainer in `TRAINERS`: no two trainers share one.
    """
    place = [each.name for each in training.TRAINERS].index(trainer)
    first, second, third = jax.random.split(jax.random.fold_in(jax.random.key(seed), place), 3)
    return first, second, third


def batch_at(batches: Batches, step: int, sharding: NamedSharding) -> Any:
    """The batch of a step: NumPy arrays, or with several hosts arrays that span them."""
    if not hosts.several():
        return batches.at(step)
    return hosts.spanning_batch(
        functools.partial(batches.slice_at, step), batches.batch_size, sharding
    )


class BaseStage:
    """The parts that the stages of offline and online trainers share; see `run.stage.Stage`."""

    _place: Placement

    def __init__(self, config: RunConfig) -> None:
        self.config, self.trainer, self.steps = config, config.trainer, config.trainer.steps
        self.name, self.losses = self.trainer.name, self.trainer.losses
        self.scores: Mapping[str, str] = self.trainer.score_labels
        self.flops_per_step, self.schedule = 0.0, str(config.optimizer.schedule)
        self.fingerprints: dict[str, dict[str, Any]] = {}
        self._has_shown_memory = False

    def load_examples(
        self, data: DataSettings, kind: Kind
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The training and the held-out examples, of which the fingerprint is kept."""
        train, held_out = load_examples(data, kind)
        self.fingerprints |= examples_fingerprint(data, kind, train, held_out)
        return train, held_out

    def load_policy(self, texts: Callable[[], Iterable[str]]) -> None:
        """Tokenizer, which may be trained on texts, mesh, keys and model; checks the sizes."""
        config = self.config
        self.tokenizer = choose_tokenizer(config.tokenizer, config.model.path, texts)
        content = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template]
        self.fingerprints["The tokenizer"] = {
            "the number of tokens": len(self.tokenizer),
            "its SHA-256": digest(content),
        }
        model_key, self.key, self.eval_key = stage_keys(config.seed, self.name)
        self.mesh = make_mesh(config.mesh)
        model, params = load_model(config.model, self.tokenizer, model_key, self.mesh, config.lora)
        key = jax.random.fold_in(model_key, 1)
        self.model, self.params = add_adapters(model, params, config.lora, key, self.mesh)
        check_run(config, self.model, self.mesh)

    def show_memory(self, state: Any, programs: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
        """Prints the memory that is needed, once, before the first step; warns if it is too much.

        Args:
          programs: as for `memory.estimate`.
        """
        if self._has_shown_memory:
            return
        self._has_shown_memory = True
        estimate = memory.estimate(self._place, state, programs)
        if hosts.is_first():
            if self.config.logging.progress:
                on_cpu = self.mesh.devices.flat[0].platform == "cpu"
                show_note(memory.as_line(self.name, estimate, 1 if on_cpu else self.mesh.size))
            memory.check(self.name, estimate)

    def frozen_paths(self) -> list[str | None]:
        """The folders that the frozen parts of the state were read from."""
        return [self.config.model.path]

    def saved(self, state: Any) -> dict[str, Any]:
        """The part of a state that a checkpoint holds: all but `frozen`, of which a checksum.

        Fields that are None or empty are left out, so that checkpoints of states without them stay
        readable.
        """
        parts = state._asdict()
        if parts["frozen"] is not None:
            parts["frozen"] = {"fingerprint": fingerprint(state.frozen)}
        return {
            name: part for name, part in parts.items() if part is not None and not _is_empty(part)
        }

    def resumed(self, state: Any, saved: dict[str, Any]) -> Any:
        """The saved parts beside the frozen ones; an InputError if those have changed."""
        frozen = state.frozen
        if frozen is not None and saved["frozen"]["fingerprint"] != fingerprint(frozen):
            names = " or ".join(map(str, self.frozen_paths()))
            raise InputError(
                f"The model in {names} is not the one that the run in {self.config.run_dir} began "
                "with; put it back, or choose another --run_dir."
            )
        return state._replace(**{**saved, "frozen": frozen})


class ComparingStage(BaseStage):
    """A stage whose evaluation compares responses of the policy with those of the initial one."""

    held_out: Any
    _comparison: Callable[[Any], Comparison]
    _before: EvaluatedResponses | None = None
    _compared: tuple[int, Comparison] | None = None

    def _compare(self, state: Any) -> Comparison:
        """`_comparison`, computed once a step."""
        step = int(state.step)
        if self._compared is None or self._compared[0] != step:
            self._compared = (step, self._comparison(state))
        return self._compared[1]

    def evaluate(self, state: Any) -> dict[str, float]:
        """Metrics of the responses to held-out prompts; {} without these."""
        if self.held_out is None:
            return {}
        return {f"eval/{name}": value for name, value in self._compare(state).metrics.items()}


def _is_empty(part: Any) -> bool:
    return isinstance(part, dict) and not part


def data_fingerprints(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The fingerprints of the examples that a stage of this configuration would read."""
    kinds = [(config.data, config.trainer.kind_in_data(config.settings))]
    if config.trainer.mixes_texts and config.settings.ptx_coef:
        kinds.append((config.section("ptx"), "text"))
    fingerprints: dict[str, dict[str, Any]] = {}
    for data, kind in kinds:
        fingerprints |= examples_fingerprint(data, kind, *load_examples(data, kind, quiet=True))
    return fingerprints


def examples_fingerprint(
    data: DataSettings, kind: Kind, train: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Numbers and a checksum of examples, under a name for messages."""
    return {
        f"The {kind.removesuffix('s')}s in {data.path}": {
            "the number of training examples": len(train),
            "the number of held-out examples": len(held_out),
            "the SHA-256 of the examples": digest([*train, None, *held_out]),
        }
    }


def export_model(
    config: RunConfig, save: Callable[..., None], model: Model, params: Any, tokenizer: Any
) -> None:
    """Writes `hf/`, and `adapter/` in PEFT's format where there are adapters; all hosts call this.

    Args:
      save: `save_pretrained` or `save_reward_model`, which merge adapters into the base.
    """
    export(config.run_dir, save, model, params, tokenizer)
    if adapters_of(model) is not None:
        save_own = functools.partial(save_adapter, base_path=config.model.path)
        export(config.run_dir, save_own, model, params, name="adapter")


def export(run_dir: str, save: Callable[..., None], *args: Any, name: str = "hf") -> None:
    """Calls save(folder, *args) for a folder of a run; all hosts call this.

    safetensors writes local files only: for an address such as gs:// the files are written to a
    temporary folder and copied by the first host.
    """
    target = epath.Path(run_dir) / name
    if not is_remote(target) or not hosts.is_first():
        with disk_errors(run_dir):
            save(str(target), *args)
        return
    with disk_errors(run_dir), tempfile.TemporaryDirectory() as folder:
        save(folder, *args)
        target.mkdir(parents=True, exist_ok=True)
        # The configuration last: where it is, the weights are complete.
        for file in sorted(epath.Path(folder).iterdir(), key=lambda f: f.name == "config.json"):
            file.copy(target / file.name, overwrite=True)


def text_of(example: Mapping[str, Any]) -> str:
    """All text of an example, for training a tokenizer."""
    if "messages" in example:
        return contents(example["messages"])
    names = ("text", "prompt", "completion", "chosen", "rejected")
    parts = [*(example.get(name) for name in names), *example.get("responses", ())]
    return "".join(contents(part) for part in parts)


def flat(tree: Any, axes: int) -> Any:
    """Arrays with their first `axes` axes as one."""
    return jax.tree.map(lambda x: np.reshape(x, (-1, *x.shape[axes:])), tree)


def one_each(rollout: ScoredRollout, indices: Any) -> tuple[ScoredRollout, Any]:
    """K responses to each of B prompts, and their examples, as those of B * K prompts."""
    if rollout.tokens.ndim == 2:
        return rollout, indices
    count = rollout.tokens.shape[1]
    repeated: Any = (np.repeat(x, count, axis=0) for x in (*rollout[:2], indices))
    prompts, mask, indices = repeated
    return ScoredRollout(prompts, mask, *flat(rollout[2:], 2)), indices


def rollout_samples(
    tokenizer: Any, output: tuple[ScoredRollout, Any], count: int, group: int
) -> list[dict[str, Any]]:
    """The first responses of an iteration, with score, and KL in nats; several are labelled.

    Args:
      output: NumPy arrays, of `step`.
      count: their number, rounded down to whole groups if it is more than one.
      group: responses to a prompt.
    """
    if count > group:
        count -= count % group  # all responses to a prompt
    rollout, _ = one_each(*output)
    prompts = decode(tokenizer, rollout.prompts[:count], rollout.prompt_mask[:count])
    texts = decode(tokenizer, rollout.tokens[:count], rollout.mask[:count])
    kl, sums = None, list[dict[str, Any]]([{}]) * len(rollout.scores)
    if rollout.ref_logprobs is not None:
        kl = rollout.logprobs - rollout.ref_logprobs
        sums = [{"kl": nats} for nats in kl.sum(axis=1)]
    measures = {"kl": kl, "value": rollout.values, "advantage": rollout.advantages}
    tokens = token_entries(tokenizer, rollout.tokens, rollout.mask, measures, count)
    columns = zip(prompts, texts, rollout.scores, sums, tokens, strict=False)
    return [
        {
            "prompt": prompt,
            "response": text,
            **({"label": f"response {place % group + 1}"} if group > 1 else {}),
            "score": score,
            **nats,
            "tokens": tokens,
        }
        for place, (prompt, text, score, nats, tokens) in enumerate(columns)
    ]
