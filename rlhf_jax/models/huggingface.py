"""GPT-2 folders of Hugging Face, read and written without PyTorch or transformers.

A folder holds `config.json` and the weights as `model.safetensors` (or several such files and their
index). Language models are in the format of `GPT2LMHeadModel`, reward models in that of
`GPT2ForSequenceClassification` with one label. Parameters are float32 in memory and in what is
written, whatever type they were stored in: they are the master copy that an optimizer updates.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.models.gpt2_tensors import param_shapes, slots_of
from rlhf_jax.models.interface import Params
from rlhf_jax.models.reading import INDEX, WEIGHTS, find_tensors, read_json, read_params
from rlhf_jax.models.writing import (
    brought_tensors,
    files_of,
    write_json,
    write_on_first_host,
    write_weights,
)

# From a tree of `jax.ShapeDtypeStruct` to the tree of where these arrays are to be.
Place = Callable[[Any], Any]

# Variants of GPT-2 that `models/gpt2.py` does not compute: each key may be absent or as here.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_GPT2_EOS = 50256  # what transformers takes for BOS and EOS where a GPT-2 configuration is silent


def load_pretrained(
    folder_or_hub_name: str | pathlib.Path,
    *,
    dtype: DTypeLike = jnp.float32,
    place: Place | None = None,
) -> tuple[GPT2, Params]:
    """A GPT-2 language model and its parameters.

    Args:
      folder_or_hub_name: a local folder, or a name on the hub such as "openai-community/gpt2".
      dtype: what the model computes in; the parameters are float32 in any case.
      place: from a tree of `jax.ShapeDtypeStruct` to a tree of shardings, where the parameters are
        to be; by default on the default device. Each host reads what its devices are to hold, a
        part of one array at a time, and never has the model whole.

    Returns:
      (model, params), the vocabulary padded as in `models/gpt2.py`.

    Raises:
      InputError: the folder cannot be found, read, or represented.

    >>> model = GPT2(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    >>> params = model.init(jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(folder, model, params)
    ...     same_model, same_params = load_pretrained(folder)
    >>> same_model == model, bool(jax.tree.all(jax.tree.map(jnp.array_equal, params, same_params)))
    (True, True)
    """
    model, params = _load(folder_or_hub_name, dtype, place, with_head=False)
    return model, params["model"]


def load_reward_model(
    folder_or_hub_name: str | pathlib.Path,
    *,
    dtype: DTypeLike = jnp.float32,
    label: int | None = None,
    place: Place | None = None,
) -> tuple[GPT2, Params]:
    """A reward model: a GPT-2 and a linear head on the last real token.

    Args:
      folder_or_hub_name: a folder or hub name of a `GPT2ForSequenceClassification`.
      dtype: what the model computes in; the parameters are float32 in any case.
      label: whose logit is the score, from 0; None where there is one label only.
      place: as in `load_pretrained`, of the tree that is returned.

    Returns:
      (model, {"model": GPT-2 parameters, "head": {"kernel": f32[D]}}).

    Raises:
      InputError: the folder cannot be found, read, or represented, has more labels than one
        without saying which is meant, or not the one that is meant.
    """
    return _load(folder_or_hub_name, dtype, place, with_head=True, label=label)


def check_pretrained(
    folder_or_hub_name: str | pathlib.Path, *, dtype: DTypeLike = jnp.float32
) -> GPT2:
    """The model that `load_pretrained` gives, without its parameters.

    Raises:
      InputError: as there.
    """
    return _check(folder_or_hub_name, dtype, with_head=False)


def check_reward_model(
    folder_or_hub_name: str | pathlib.Path,
    *,
    dtype: DTypeLike = jnp.float32,
    label: int | None = None,
) -> GPT2:
    """The model that `load_reward_model` gives, without its parameters.

    Raises:
      InputError: as there.
    """
    return _check(folder_or_hub_name, dtype, with_head=True, label=label)


def save_pretrained(
    folder: str | pathlib.Path, model: GPT2, params: Params, tokenizer: Any = None
) -> None:
    """Writes a folder that opens as `GPT2LMHeadModel`, in float32.

    All files are written under temporary names first, so that a save that is cut short leaves no
    half file behind; weights that an earlier save left there are replaced.

    The parameters may be spread over devices and hosts: one tensor at a time is brought to the
    first host, which alone writes. All hosts have to call this.

    Args:
      folder: a local folder of the first host; made if need be.
      model, params: as from `load_pretrained`; the rows that pad the vocabulary are cut off.
      tokenizer: anything with `save_pretrained(folder)`.

    Raises:
      ValueError: the parameters are not those of the model.
      OSError: the folder cannot be written.
    """
    _check_params(model, params)
    config = _config_json(model.config, "GPT2LMHeadModel")
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {name: value for name, value in ids.items() if value is not None}
    texts = {"config.json": config}
    if ids:
        texts["generation_config.json"] = {"_from_model_config": True, **ids}
    _save(folder, model, model, {"model": params}, texts, tokenizer)


def save_reward_model(
    folder: str | pathlib.Path, model: GPT2, params: Params, tokenizer: Any = None
) -> None:
    """Writes a folder that opens as `GPT2ForSequenceClassification` with one label, in float32.

    transformers scores the last token that is not the pad token, and so reads the token before EOS
    where the two are one. The folder therefore declares a pad token other than EOS: the model's,
    else the tokenizer's, else a new one, for which the token embedding gets one more row of zeros
    and `vocab_size` grows by one. The tokenizer is written with that pad token, padding on the
    right (transformers does not shift the positions of this model under left padding).

    As in `save_pretrained` one tensor at a time is brought to the first host.

    Args:
      folder: a local folder of the first host; made if need be.
      model: the GPT-2 under the head.
      params: {"model": GPT-2 parameters, "head": {"kernel": [D]}}.
      tokenizer: a transformers tokenizer, which is not changed.

    Raises:
      InputError: the tokenizer pads with another token than the model, or has too many tokens.
      ValueError: the parameters are not those of the model, or the head has a bias.
      OSError: the folder cannot be written.
    """
    _check_params(model, params["model"])
    if set(params["head"]) != {"kernel"}:
        raise ValueError(f"a reward head is {{'kernel': [D]}}, but has {sorted(params['head'])}.")
    config, tokenizer = _with_pad_token(model.config, tokenizer)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    texts = {"config.json": {**_config_json(config, "GPT2ForSequenceClassification"), **labels}}
    _save(folder, model, GPT2(config), params, texts, tokenizer)


# Reading


def _load(name, dtype, place, *, with_head, label=None) -> tuple[GPT2, Params]:
    """The model, and {"model": ..., "head": {"kernel": [D]}} (the head only `with_head`)."""
    folder, model = _open(name, dtype)
    shapes = {"model": param_shapes(model)}
    if with_head:
        shapes["head"] = {"kernel": jax.ShapeDtypeStruct((model.config.n_embd,), jnp.float32)}
    # A language model is placed by itself, as it is returned.
    whole = shapes if with_head else shapes["model"]
    places = None if place is None else place(whole)
    if places is not None and not with_head:
        places = {"model": places}
    return model, read_params(folder, slots_of(model, with_head=with_head), shapes, places, label)


def _check(name, dtype, *, with_head, label=None) -> GPT2:
    """The model, if all tensors are there."""
    folder, model = _open(name, dtype)
    with contextlib.ExitStack() as files:
        find_tensors(folder, slots_of(model, with_head=with_head), label, files)
    return model


def _open(name, dtype) -> tuple[pathlib.Path, GPT2]:
    """The local folder, and the model that its config.json describes."""
    dtype = jnp.dtype(dtype).name
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype must be float32, bfloat16 or float16, but is {dtype}.")
    folder = _find_folder(name)
    return folder, GPT2(read_config(folder / "config.json"), dtype=dtype)


def _find_folder(name: str | pathlib.Path) -> pathlib.Path:
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{name} is a file; give the folder of the model, or its name on the hub.")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name)):
        raise InputError(f"There is no folder {name}; give one, or the name of a model on the hub.")
    return _download(str(name))


def _download(name: str) -> pathlib.Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"There is no folder {name}, and fetching it from the hub needs huggingface_hub: "
            "pip install huggingface_hub, or give a local folder."
        ) from error
    files = ["config.json", "model*.safetensors", INDEX]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:  # no network, no such model, no access
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"There is no folder {name}, and no such model could be fetched from the hub "
            f"({type(error).__name__}: {reason}); check the name and the network."
        ) from error


def read_config(path: pathlib.Path) -> GPT2Config:
    """The sizes that a config.json gives.

    Raises:
      InputError: the file cannot be read, or is that of another model.
    """
    data = read_json(path)
    for key, allowed in {"model_type": "gpt2", **_FIXED}.items():
        given = data.get(key, allowed if key in _FIXED else None)
        if given != allowed:
            raise InputError(
                f"{path}: {key} is {given!r}, but only {allowed!r} is supported; "
                "choose another model."
            )
    known = {field.name: field for field in dataclasses.fields(GPT2Config)}
    values = {name: _typed(path, known[name], data[name]) for name in known if name in data}
    if values.get("vocab_size", known["vocab_size"].default) > _GPT2_EOS:
        values = {"bos_token_id": _GPT2_EOS, "eos_token_id": _GPT2_EOS, **values}
    try:
        return GPT2Config(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _typed(path: pathlib.Path, field: dataclasses.Field, value: Any) -> Any:
    """A value of config.json as its field has it: an integer, a float, a string, or null."""
    kind = int if field.default is None else type(field.default)
    if value is None and field.default is None:
        return None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        names = {int: "an integer", float: "a number", str: "a string"}
        allowed = names[kind] + (" or null" if field.default is None else "")
        raise InputError(f"{path}: {field.name} must be {allowed}, but is {json.dumps(value)}.")
    return value


# Writing


def _save(folder, model, written, params, texts, tokenizer) -> None:
    """Brings the parameters of `model`, and writes them as those of `written`, on the first host.

    The two differ at most in their vocabulary.
    """
    slots = slots_of(written, with_head="head" in params)
    files = files_of(slots)
    names = [name for part in files.values() for name in part]
    tensors = brought_tensors(params, slots, names, model.config.vocab_size)
    write = functools.partial(_write_folder, folder, slots, files, texts, tokenizer)
    write_on_first_host(write, tensors, str(folder))


def _write_folder(folder, slots, files, texts, tokenizer, tensors) -> None:
    """Writes the JSON `texts`, the tokenizer and the weights, and moves them into place."""
    if "://" in str(folder):
        raise InputError(f"Models are saved to local folders, but {folder} is an address.")
    folder = pathlib.Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        temporary = pathlib.Path(name)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        for file, data in texts.items():
            write_json(temporary / file, data)
        write_weights(temporary, slots, files, tensors)
        _publish(temporary, folder)


def _config_json(config: GPT2Config, architecture: str) -> dict[str, Any]:
    return {
        **dataclasses.asdict(config),
        **_FIXED,
        "architectures": [architecture],
        "model_type": "gpt2",
        "dtype": "float32",  # transformers 5 reads this one
        "torch_dtype": "float32",  # and transformers 4 this one
        "use_cache": True,
    }


def _publish(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    """Moves files from one folder into the other; weights of an earlier save do not stay.

    Weights come last, their index after them: what was cut short has its old weights whole, or
    none that can be found.
    """
    files = [path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()]
    written = {file.name for file in files} - {INDEX}
    for pattern in (INDEX, WEIGHTS, "model-*-of-*.safetensors", "generation_config.json"):
        for path in folder.glob(pattern):
            if path.name not in written:
                path.unlink()
    for file in sorted(files, key=lambda f: (f.name == INDEX, f.suffix == ".safetensors", f)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (temporary / file).replace(folder / file)


def _with_pad_token(config: GPT2Config, tokenizer: Any) -> tuple[GPT2Config, Any]:
    """The configuration with a pad id that is not EOS, and a tokenizer that knows it."""
    unusable, pad = {None, config.eos_token_id}, config.pad_token_id
    if tokenizer is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token_id in {*unusable, tokenizer.eos_token_id}:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if pad in unusable:
        pad = config.vocab_size if tokenizer is None else tokenizer.pad_token_id
    assert pad is not None
    if pad > config.vocab_size:
        raise InputError(
            f"The pad token has the id {pad}, but the vocabulary of the model ends at "
            f"{config.vocab_size - 1}; use the tokenizer that the model was trained with."
        )
    if tokenizer is not None and tokenizer.pad_token_id != pad:
        raise InputError(
            f"The tokenizer pads with id {tokenizer.pad_token_id}, but the model declares "
            f"pad_token_id {pad}; make them the same."
        )
    vocab_size = max(config.vocab_size, pad + 1)
    return dataclasses.replace(config, vocab_size=vocab_size, pad_token_id=pad), tokenizer


def _check_params(model: GPT2, params: Params) -> None:
    expected = _shapes_by_path(param_shapes(model))
    given = _shapes_by_path(params)
    for path in sorted(expected.keys() | given.keys()):
        if expected.get(path) != given.get(path):
            raise ValueError(
                f"params{path} must have shape {expected.get(path)}, but has {given.get(path)}."
            )


def _shapes_by_path(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
