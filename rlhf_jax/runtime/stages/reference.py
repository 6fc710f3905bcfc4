"""Log-probabilities of a reference for all examples of a run, computed once and kept with it."""

import hashlib
import io
from collections.abc import Callable, Mapping
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np
from etils import epath

from rlhf_jax.data.batching import eval_batches
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Params
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.loading import compute_dtype
from rlhf_jax.runtime.program import Placement
from rlhf_jax.runtime.run.folder import disk_errors, replace_file
from rlhf_jax.runtime.run.progress import show_phase
from rlhf_jax.runtime.run.records import fingerprint

FILE = "reference.npz"

Fields = dict[str, Any]  # f32[N] each, by the name of the batch's field


def with_reference(
    batches: Mapping[str, Any],
    params: Params,
    config: RunConfig,
    place: Placement,
    step: Callable[[Params, Any], Fields],
) -> dict[str, Any]:
    """The batches with the results of `step`, from the file of the run where there is one.

    Args:
      batches: name -> all examples as NumPy arrays [N, ...].
      params: full parameters of the reference.
      place: of parameters and batches.
      step: pure (params, batch) -> fields of the batch, f32[B] each.

    Raises:
      InputError: the file cannot be read or written, or is of other examples, another reference or
        other settings.
    """
    if not batches:
        return {}
    file = epath.Path(config.run_dir) / FILE
    dtype = compute_dtype(config.model.dtype)
    terms = f"{config.trainer.name} {config.settings.reference_terms} {dtype}"
    mark = f"{_digest(batches)}-{int(fingerprint(params)):08x}-{terms}"
    if not hosts.from_first(file.exists):
        if hosts.is_first():
            show_phase(config.trainer.name, "computing log-probabilities of the reference")
        evaluate = place.scores(step, params)
        size = config.settings.eval_batch_size
        fields = {
            name: _fields(lambda part: evaluate(params, place.put(part)), batch, size)
            for name, batch in batches.items()
        }
        hosts.from_first(_write, str(file), mark, fields)
        return _attached(batches, fields)
    return _attached(batches, _read(file, mark))


def _fields(evaluate: Callable[[Any], Fields], batch: Any, size: int) -> Fields:
    parts = hosts.to_host([evaluate(part) for part in eval_batches(batch, size)])
    names, number = parts[0], len(batch[0])
    return {name: np.concatenate([part[name] for part in parts])[:number] for name in names}


def _attached(batches: Mapping[str, Any], fields: Mapping[str, Fields]) -> dict[str, Any]:
    return {name: batch._replace(**fields[name]) for name, batch in batches.items()}


def _write(file: str, mark: str, fields: Mapping[str, Fields]) -> None:
    arrays = {f"{name}/{field}": x for name, each in fields.items() for field, x in each.items()}
    content = io.BytesIO()
    np.savez(content, mark=np.asarray(mark), **arrays)
    with disk_errors(epath.Path(file).parent):
        replace_file(file, content.getvalue())


def _read(file: epath.Path, mark: str) -> dict[str, Fields]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}.") from error
    try:
        with np.load(io.BytesIO(data)) as content:
            arrays = dict(content)
        stored = str(arrays.pop("mark"))
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        EOFError,
        BadZipFile,
    ) as error:
        raise InputError(f"{file} is damaged; delete it to compute it anew.") from error
    if stored != mark:
        kinds = ("other examples", "another reference", "other settings")
        parts = zip(kinds, stored.split("-", 2), mark.split("-", 2), strict=False)
        other = next((kind for kind, old, new in parts if old != new), kinds[0])
        raise InputError(
            f"{file} holds log-probabilities of {other}: put back what the run began with, or "
            "choose another --run_dir."
        )
    fields: dict[str, Fields] = {}
    for key, array in arrays.items():
        name, field = key.split("/")
        fields.setdefault(name, {})[field] = array
    return fields


def _digest(batches: Mapping[str, Any]) -> str:
    """A checksum of the arrays of batches."""
    digest = hashlib.sha256()
    for name, batch in batches.items():
        digest.update(name.encode())
        for array in jax.tree.leaves(batch):
            digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
