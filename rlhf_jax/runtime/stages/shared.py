"""Parts of the stages: keys, batches on the mesh, what a checkpoint holds, the export."""

import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding

from rlhf_jax import training
from rlhf_jax.data.batching import Batches
from rlhf_jax.data.chat import contents
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.run.checksums import fingerprint
from rlhf_jax.runtime.run.folder import is_remote


def stage_keys(seed: int, trainer: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys of a trainer: for a fresh model, for the steps, for held-out responses.

    They derive from the seed and the place of the trainer in `TRAINERS`, so that no two trainers
    share one.
    """
    place = [each.name for each in training.TRAINERS].index(trainer)
    first, second, third = jax.random.split(jax.random.fold_in(jax.random.key(seed), place), 3)
    return first, second, third


def batch_at(batches: Batches, step: int, sharding: NamedSharding) -> Any:
    """The batch of a step: NumPy arrays, or with several hosts arrays that span them.

    Each host then reads only the part of the batch that its devices hold.
    """
    if not hosts.several():
        return batches.at(step)
    return hosts.spanning_batch(
        functools.partial(batches.slice_at, step), batches.batch_size, sharding
    )


def saved_parts(state: Any) -> dict[str, Any]:
    """What a checkpoint holds of a state with the field `frozen`: its checksum, and all else.

    Fields that are None are left out, so that a field added to the state later leaves older
    checkpoints readable.
    """
    parts = state._asdict()
    if parts["frozen"] is not None:
        parts["frozen"] = {"fingerprint": fingerprint(state.frozen)}
    return {name: part for name, part in parts.items() if part is not None}


def resumed_state(
    state: Any, saved: dict[str, Any], run_dir: str, paths: Iterable[str | None]
) -> Any:
    """The saved parts beside the frozen ones.

    Args:
      paths: where the frozen parts were read from.

    Raises:
      InputError: the frozen parts have changed since the run began.
    """
    frozen = state.frozen
    if frozen is not None and saved["frozen"]["fingerprint"] != fingerprint(frozen):
        names = " or ".join(str(path) for path in paths)
        raise InputError(
            f"The model in {names} is not the one that the run in {run_dir} began with; put it "
            "back, or choose another --run_dir."
        )
    return state._replace(**{**saved, "frozen": frozen})


def export(run_dir: str, save: Callable[..., None], *args: Any) -> None:
    """Calls save(folder, *args) for the folder `hf/` of a run; all hosts call this.

    safetensors writes local files only: for an address such as gs:// the files are written to a
    temporary folder and copied by the first host.
    """
    target = epath.Path(run_dir) / "hf"
    if not is_remote(target) or not hosts.is_first():
        save(str(target), *args)
        return
    with tempfile.TemporaryDirectory() as folder:
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
