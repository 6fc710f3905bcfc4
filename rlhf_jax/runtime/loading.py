"""From a configuration to the things that a stage works with: tokenizer, model, mesh, state."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from rlhf_jax.data.batching import Batches
from rlhf_jax.data.tokenizers import Settings as TokenizerSettings
from rlhf_jax.data.tokenizers import load_tokenizer, train_tokenizer, use_chat_template
from rlhf_jax.errors import InputError
from rlhf_jax.models.cudnn_attention import check_device
from rlhf_jax.models.huggingface import (
    check_reward_model,
    fresh_model,
    load_pretrained,
    load_reward_model,
)
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.partition import Rules, tree_shardings
from rlhf_jax.runtime.run.checksums import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ScoreFunction = Callable[..., list[float]]


def compute_dtype(name: str) -> str:
    """The dtype of products: "auto" is bfloat16 on accelerators and float32 on the CPU."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def choose_tokenizer(
    settings: TokenizerSettings, model_path: str | None, texts: Callable[[], Iterable[str]]
) -> PreTrainedTokenizerFast:
    """The tokenizer at `tokenizer.path`, else that of the model, else one trained on `texts`."""
    path = settings.path or model_path
    if path is not None:
        with local_folder(path) as folder:
            tokenizer = load_tokenizer(folder)
    else:
        tokenizer = train_tokenizer(texts(), settings.vocab_size)
    if settings.chat_template is not None:
        use_chat_template(tokenizer, settings.chat_template)
    return tokenizer


def load_model(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerFast,
    key: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[Model, Params]:
    """The language model at `model.path`, or a fresh one for the tokenizer's vocabulary.

    Args:
      mesh: where each parameter is born in its place; by default all are on one device.

    Raises:
      InputError: the folder cannot be read, the tokenizer has ids that the model lacks, or the
        model cannot be split over the mesh.
    """
    dtype = _checked_dtype(settings)
    if settings.path is not None:
        with local_folder(settings.path) as folder:
            model, params = load_pretrained(
                folder,
                dtype=dtype,
                mesh=mesh,
                remat=settings.remat,
                attention=settings.attention,
            )
        check_vocabulary(model, tokenizer, settings.path)
        return model, params
    model = fresh_model(
        settings,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    if mesh is not None:
        model.check_mesh(mesh)
        return model, init_sharded(mesh, model.partition_rules, model.init, key)
    return model, jax.jit(model.init)(key)


def load_scorer(
    path: str,
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerFast,
    mesh: Mesh | None = None,
) -> tuple[Model, Params]:
    """The reward model at a path, to score tokens of this tokenizer; its place is the mesh.

    Raises:
      InputError: the folder cannot be read, or its tokenizer is another one.
    """
    model, params, theirs = load_reward(path, settings, mesh=mesh)
    check_vocabulary(model, tokenizer, path)
    if not shares_tokens(tokenizer, theirs):
        raise InputError(
            f"The reward model in {path} has another tokenizer than tokenizer.path; leave that "
            "out, for a reward model is evaluated with its own."
        )
    return model, params


def load_reward(
    path: str, settings: ModelSettings, label: int | None = None, mesh: Mesh | None = None
) -> tuple[Model, Params, PreTrainedTokenizerFast]:
    """The reward model at a path, in its place on the mesh, and its own tokenizer.

    Raises:
      InputError: the folder cannot be read.
    """
    with local_folder(path) as folder:
        dtype = _checked_dtype(settings)
        model, params = load_reward_model(
            folder,
            dtype=dtype,
            label=label,
            mesh=mesh,
            remat=settings.remat,
            attention=settings.attention,
        )
        return model, params, load_tokenizer(folder)


def check_reward(
    path: str, settings: ModelSettings, label: int | None = None
) -> tuple[Model, PreTrainedTokenizerFast]:
    """As `load_reward`, without the parameters."""
    with local_folder(path) as folder:
        dtype = _checked_dtype(settings)
        model = check_reward_model(
            folder, dtype=dtype, label=label, remat=settings.remat, attention=settings.attention
        )
        return model, load_tokenizer(folder)


def _checked_dtype(settings: ModelSettings) -> str:
    """The dtype of products, where the devices have what the settings ask for."""
    if settings.attention == "cudnn":
        check_device("model.attention cudnn")
    return compute_dtype(settings.dtype)


def shares_tokens(ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> bool:
    """Whether our tokens mean the same to them, and texts are cut into tokens by the same merges.

    They may have more tokens, say one for padding.
    """
    vocabulary = theirs.get_vocab()
    if any(vocabulary.get(token) != index for token, index in ours.get_vocab().items()):
        return False
    models = [json.loads(each.backend_tokenizer.to_str())["model"] for each in (ours, theirs)]
    return models[0].get("merges") == models[1].get("merges")


def check_vocabulary(model: Model, tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    """Raises an InputError if the tokenizer makes ids that the model does not have."""
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model in {path} has a vocab_size "
            f"of {model.config.vocab_size}; use the tokenizer that the model was made with."
        )


def find_token(tokenizer: PreTrainedTokenizerFast, token: int | str, name: str) -> int:
    """The id of a token that is given as its text or as its id.

    Raises:
      InputError: there is no such id, or the text is not exactly one token.
    """
    if isinstance(token, int):
        if token >= len(tokenizer):
            raise InputError(
                f"{name} = {token} is no id of the tokenizer, which has {len(tokenizer)} tokens; "
                "give a smaller one, or the token's text."
            )
        return token
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise InputError(
            f"{name} = {token!r} is {len(ids)} tokens of this tokenizer; give a text that is one "
            "token, or its id."
        )
    return ids[0]


def check_positions(model: Model, needed: int, what: str) -> None:
    """Raises an InputError if rows can be longer than the model has positions."""
    if needed > model.config.n_positions:
        raise InputError(
            f"{what} = {needed} exceeds the model's n_positions = {model.config.n_positions}; "
            "shorten it, or use a model with more positions."
        )


def init_sharded(mesh: Mesh, rules: Rules, init: Callable[..., Any], *args: Any) -> Any:
    """init(*args) under jit, each array initialised with its sharding."""
    shardings = tree_shardings(mesh, jax.eval_shape(init, *args), rules)
    return jax.jit(init, out_shardings=shardings)(*args)


def batch_at(batches: Batches, step: int, rows: NamedSharding) -> Any:
    """The batch of a step: NumPy arrays, or arrays that span the hosts where there are several.

    Each of these reads only the rows that its devices hold.
    """
    if not hosts.several():
        return batches.at(step)
    return hosts.spanning_batch(functools.partial(batches.rows_at, step), batches.batch_size, rows)


def load_function(name: str) -> ScoreFunction:
    """The function that "module:function" names.

    Raises:
      InputError: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{name!r} names no function ({error}); write it as module:function, importable from "
            "here."
        ) from error
    if not callable(function):
        raise InputError(f"{name!r} is not a function; write it as module:function.")
    return function


def check_call(function: ScoreFunction, columns: Iterable[str]) -> None:
    """Raises an InputError if a function cannot be called as function(prompts, completions, ...).

    Args:
      columns: names of the other columns of the data, which are given by keyword.
    """
    name = getattr(function, "__name__", "the score function")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # that of some functions in C cannot be known
    try:
        signature.bind([], [], **dict.fromkeys(columns, []))
    except TypeError as error:
        raise InputError(
            f"{name} cannot be called as {name}(prompts, completions, **columns) with the other "
            f"columns of the data by name ({error}): let it take **columns, and call no column "
            "prompts or completions."
        ) from None


def call_scores(
    function: ScoreFunction, prompts: list[str], completions: list[str], columns: dict[str, list]
) -> list[float]:
    """function(prompts, completions, **columns), checked: one finite number for each completion.

    With several hosts the first one asks and tells the others. What the function raises goes on as
    it is, with a note that names the function.

    Raises:
      InputError: it gave something else.
    """
    return hosts.from_first(_call_scores, function, prompts, completions, columns)


def _call_scores(
    function: ScoreFunction, prompts: list[str], completions: list[str], columns: dict[str, list]
) -> list[float]:
    name = getattr(function, "__name__", "the score function")
    try:
        given = function(prompts, completions, **columns)
    except Exception as error:
        error.add_note(f"This was raised by {name}, which was to score {len(completions)} texts.")
        raise
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise InputError(
            f"{name} gave {str(given)[:80]}; it has to give a list of numbers, one for each "
            "completion."
        )
    values = list(given)
    if len(values) != len(completions):
        raise InputError(
            f"{name} gave {len(values)} scores for {len(completions)} completions; it has to give "
            "one for each."
        )
    return [
        _finite_number(name, index, value, completion)
        for index, (value, completion) in enumerate(zip(values, completions, strict=True))
    ]


def _finite_number(name: str, index: int, value: Any, completion: str) -> float:
    """A score of a function as a float."""
    try:
        if isinstance(value, (str, bytes)) or np.ndim(value) > 0:
            raise TypeError
        score = float(value)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} gave {repr(value)[:80]} at index {index}; it has to give a number for each "
            "completion."
        ) from None
    if not math.isfinite(score):
        raise InputError(
            f"{name} gave the score {score} for the completion {completion[:80]!r} at index "
            f"{index}; it has to give a finite number."
        )
    return score


@contextlib.contextmanager
def local_folder(path: str) -> Iterator[str]:
    """The path itself; for an address such as gs://, a temporary copy of the files there."""
    if "://" not in path:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in epath.Path(path).iterdir():
            file.copy(epath.Path(folder) / file.name)
        yield folder


def stage_keys(seed: int, stage: str, count: int) -> list[jax.Array]:
    """Keys of a stage ("sft", "reward" or "ppo"), which no other stage of this seed shares."""
    number = ("sft", "reward", "ppo").index(stage)
    return list(jax.random.split(jax.random.fold_in(jax.random.key(seed), number), count))


def saved_parts(state: Any) -> dict[str, Any]:
    """What a checkpoint holds of a state with the field `frozen`: all else, and its checksum.

    A dict without what the settings have no use for, so that fields that are added to the state
    leave the checkpoints of earlier versions readable.
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
      InputError: the frozen parts are not what they were.
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
    """Calls save(folder, *args) for `hf/` of a run folder.

    safetensors writes to local files alone, so for an address such as gs:// the files are made in a
    temporary folder and copied. All hosts have to call this; the first one writes.
    """
    target = epath.Path(run_dir) / "hf"
    if "://" not in str(run_dir) or not hosts.is_first():
        save(str(target), *args)
        return
    with tempfile.TemporaryDirectory() as folder:
        save(folder, *args)
        target.mkdir(parents=True, exist_ok=True)
        # The configuration comes last: who finds it finds the weights as well.
        for file in sorted(epath.Path(folder).iterdir(), key=lambda f: f.name == "config.json"):
            file.copy(target / file.name, overwrite=True)
