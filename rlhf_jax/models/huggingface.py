"""GPT-2 folders of Hugging Face, read and written without PyTorch or transformers.

A folder holds `config.json` and the weights as `model.safetensors` (or several such files and their
index). Language models are in the format of `GPT2LMHeadModel`, reward models in that of
`GPT2ForSequenceClassification` with one label. Parameters are float32 in memory and in what is
written, whatever type they were stored in: they are the master copy that an optimizer updates.
"""

import copy
import dataclasses
import functools
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.models.interface import Params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

# Tensor name (without its `transformer.`) -> path in the parameters. Hugging Face's Conv1D kernels
# are [in, out] as ours, so nothing is transposed.
_TOP: dict[str, tuple[str, ...]] = {
    "wte.weight": ("wte", "embedding"),
    "wpe.weight": ("wpe", "embedding"),
    "ln_f.weight": ("ln_f", "scale"),
    "ln_f.bias": ("ln_f", "bias"),
}
_LAYER: dict[str, tuple[str, ...]] = {
    "ln_1.weight": ("ln_1", "scale"),
    "ln_1.bias": ("ln_1", "bias"),
    "attn.c_attn.weight": ("attn", "c_attn", "kernel"),
    "attn.c_attn.bias": ("attn", "c_attn", "bias"),
    "attn.c_proj.weight": ("attn", "c_proj", "kernel"),
    "attn.c_proj.bias": ("attn", "c_proj", "bias"),
    "ln_2.weight": ("ln_2", "scale"),
    "ln_2.bias": ("ln_2", "bias"),
    "mlp.c_fc.weight": ("mlp", "c_fc", "kernel"),
    "mlp.c_fc.bias": ("mlp", "c_fc", "bias"),
    "mlp.c_proj.weight": ("mlp", "c_proj", "kernel"),
    "mlp.c_proj.bias": ("mlp", "c_proj", "bias"),
}
_SCORE = "score.weight"
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that old checkpoints carry
_FLOATS = ("F64", "F32", "F16", "BF16")

# Variants of GPT-2 that `models/gpt2.py` does not compute: each key may be absent or as here.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_GPT2_EOS = 50256  # what transformers takes for BOS and EOS where a GPT-2 configuration is silent


class _Slot(NamedTuple):
    """Where a tensor belongs: a leaf of {"model": ..., "head": ...}, one layer of it or all."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


def load_pretrained(
    folder_or_hub_name: str | pathlib.Path, *, dtype: DTypeLike = jnp.float32
) -> tuple[GPT2, Params]:
    """A GPT-2 language model and its parameters.

    Args:
      folder_or_hub_name: a local folder, or a name on the hub such as "openai-community/gpt2".
      dtype: what the model computes in; the parameters are float32 in any case.

    Returns:
      (model, params), params on the default device, the vocabulary padded as in `models/gpt2.py`.

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
    model, params = _load(folder_or_hub_name, dtype, with_head=False)
    return model, params["model"]


def load_reward_model(
    folder_or_hub_name: str | pathlib.Path,
    *,
    dtype: DTypeLike = jnp.float32,
    label: int | None = None,
) -> tuple[GPT2, Params]:
    """A reward model: a GPT-2 and a linear head on the last real token.

    Args:
      folder_or_hub_name: a folder or hub name of a `GPT2ForSequenceClassification`.
      dtype: what the model computes in; the parameters are float32 in any case.
      label: whose logit is the score, from 0; None where there is one label only.

    Returns:
      (model, {"model": GPT-2 parameters, "head": {"kernel": f32[D]}}).

    Raises:
      InputError: the folder cannot be found, read, or represented, has more labels than one
        without saying which is meant, or not the one that is meant.
    """
    model, params = _load(folder_or_hub_name, dtype, with_head=True, label=label)
    return model, {"model": params["model"], "head": {"kernel": params["head"]["kernel"][0]}}


def save_pretrained(
    folder: str | pathlib.Path, model: GPT2, params: Params, tokenizer: Any = None
) -> None:
    """Writes a folder that opens as `GPT2LMHeadModel`, in float32.

    All files are written under temporary names first, so that a save that is cut short leaves no
    half file behind; weights that an earlier save left there are replaced.

    Args:
      folder: a local folder; made if need be.
      model, params: as from `load_pretrained`; the rows that pad the vocabulary are cut off. The
        parameters have to be addressable by this process.
      tokenizer: anything with `save_pretrained(folder)`.

    Raises:
      ValueError: the parameters are not those of the model.
      OSError: the folder cannot be written.
    """
    _check_params(model, params)
    tree = {"model": jax.device_get(params)}
    config = _config_json(model.config, "GPT2LMHeadModel")
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {name: value for name, value in ids.items() if value is not None}
    texts = {"config.json": config}
    if ids:
        texts["generation_config.json"] = {"_from_model_config": True, **ids}
    _save(folder, tree, _slots(model, with_head=False), texts, tokenizer)


def save_reward_model(
    folder: str | pathlib.Path, model: GPT2, params: Params, tokenizer: Any = None
) -> None:
    """Writes a folder that opens as `GPT2ForSequenceClassification` with one label, in float32.

    transformers scores the last token that is not the pad token, and so reads the token before EOS
    where the two are one. The folder therefore declares a pad token other than EOS: the model's,
    else the tokenizer's, else a new one, for which the token embedding gets one more row of zeros
    and `vocab_size` grows by one. The tokenizer is written with that pad token, padding on the
    right (transformers does not shift the positions of this model under left padding).

    Args:
      folder: a local folder; made if need be.
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
    tree = jax.device_get({"model": params["model"], "head": params["head"]})
    tree["head"] = {"kernel": tree["head"]["kernel"][None]}
    rows = tree["model"]["wte"]["embedding"][: model.config.vocab_size]
    rows = np.pad(rows, ((0, config.vocab_size - model.config.vocab_size), (0, 0)))
    tree["model"] = {**tree["model"], "wte": {"embedding": rows}}
    slots = _slots(GPT2(config), with_head=True)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    texts = {"config.json": {**_config_json(config, "GPT2ForSequenceClassification"), **labels}}
    _save(folder, tree, slots, texts, tokenizer)


# Reading


def _load(name, dtype, *, with_head, label=None) -> tuple[GPT2, Params]:
    """The model, and {"model": ..., "head": {"kernel": [1, D]}} (the head only `with_head`)."""
    dtype = jnp.dtype(dtype).name
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype must be float32, bfloat16 or float16, but is {dtype}.")
    folder = _find_folder(name)
    model = GPT2(read_config(folder / "config.json"), dtype=dtype)
    shapes = {"model": _shapes(model)}
    if with_head:
        shapes["head"] = {"kernel": jax.ShapeDtypeStruct((1, model.config.n_embd), jnp.float32)}
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    _read_tensors(folder, tree, _slots(model, with_head=with_head), label)
    # A copy, because JAX on a CPU would otherwise keep NumPy's memory and could not donate it.
    return model, jax.tree.map(jnp.array, tree)


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


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path.parent} holds no {path.name}; give the folder of a saved model.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); save or download it again.") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object; save or download it again.")
    return data


def read_config(path: pathlib.Path) -> GPT2Config:
    """The sizes that a config.json gives.

    Raises:
      InputError: the file cannot be read, or is that of another model.
    """
    data = _read_json(path)
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


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{folder / INDEX} has no weight_map; save or download it again.")
        files = [folder / name for name in sorted({str(name) for name in weight_map.values()})]
        for file in files:
            if not file.is_file():
                raise InputError(
                    f"{folder} lacks {file.name}, which its {INDEX} names; download it again."
                )
        return files
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{folder} holds its weights as pytorch_model.bin only, which needs PyTorch to be "
            "read; convert it where torch and transformers are installed: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)."
        )
    raise InputError(
        f"{folder} holds neither {WEIGHTS} nor {INDEX}; save the model as safetensors."
    )


def _read_tensors(
    folder: pathlib.Path, tree: Params, slots: dict[str, _Slot], label: int | None
) -> None:
    """Fills the preallocated `tree`, one tensor at a time, and sees that each one came once."""
    missing, lm_head = set(slots), None
    for file in _weight_files(folder):
        for name, tensor in _tensors(file, slots, label):
            if name == "lm_head.weight":
                lm_head = tensor
                continue
            if name not in missing:
                raise InputError(f"{folder} holds the tensor {name!r} twice; save it again.")
            missing.remove(name)
            _view(tree, slots[name])[...] = tensor
    if _SCORE in missing:
        raise InputError(
            f"{folder} has no tensor {_SCORE!r}, so it is no reward model; "
            "train one, or load it as a language model."
        )
    if missing:
        raise InputError(
            f"{folder} lacks the tensor {min(missing)!r} ({len(missing)} missing in all) of the "
            "model that its config.json describes; save or download it again."
        )
    if lm_head is not None and not np.array_equal(lm_head, _view(tree, slots["wte.weight"])):
        raise InputError(
            f"{folder}: the tensor 'lm_head.weight' differs from 'wte.weight', "
            "but only tied embeddings are supported; choose another model."
        )


def _tensors(
    file: pathlib.Path, slots: dict[str, _Slot], label: int | None
) -> Iterator[tuple[str, np.ndarray]]:
    """(name without `transformer.`, tensor as stored) of one file, names and shapes checked.

    Of a head with several labels there comes the row of this one.
    """
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118, the file is no mapping
                short = name.removeprefix("transformer.")
                if short.endswith(_BUFFERS):
                    continue
                head = tensors.get_slice(name)
                shape = tuple(head.get_shape())
                if short == _SCORE and label is not None and short in slots:
                    shape = _shape_of_label(file, name, shape, label)
                _check_tensor(file, name, shape, head.get_dtype(), slots)
                tensor = tensors.get_tensor(name)
                if label is not None and shape != tensor.shape:
                    tensor = tensor[label : label + 1]
                yield short, tensor
    except SafetensorError as error:
        raise InputError(f"{file} cannot be read ({error}); save or download it again.") from error


def _shape_of_label(file, name, shape, label) -> tuple[int, ...]:
    """The shape of one row of a head with several labels."""
    if not shape or label >= shape[0]:
        raise InputError(
            f"{file}: the tensor {name!r} has shape {list(shape)}, so there is no label {label}; "
            "the first one is 0."
        )
    return (1, *shape[1:])


def _check_tensor(file, name, shape, dtype, slots) -> None:
    short = name.removeprefix("transformer.")
    slot = slots.get("wte.weight" if short == "lm_head.weight" else short)
    if slot is None and short == _SCORE:
        raise InputError(
            f"{file} is a reward model, for it holds {name!r}: load it with load_reward_model."
        )
    if slot is None:
        raise InputError(
            f"{file}: the tensor {name!r} {list(shape)} is no part of the GPT-2 that config.json "
            "describes; check n_layer, or choose another model."
        )
    if short == _SCORE and shape[:1] != (1,):
        raise InputError(
            f"{file}: the tensor {name!r} has shape {list(shape)}, but a reward model has one "
            f"label, {list(slot.shape)}; of a classifier choose the label that is the score "
            "(`label` of a source in `rewards`)."
        )
    if shape != slot.shape:
        raise InputError(
            f"{file}: the tensor {name!r} has shape {list(shape)}, "
            f"but config.json asks for {list(slot.shape)}."
        )
    if dtype not in _FLOATS:
        raise InputError(
            f"{file}: the tensor {name!r} is stored as {dtype}, but only {', '.join(_FLOATS)} can "
            "be read; save the model unquantized."
        )


# Writing


def _save(folder, tree, slots, texts, tokenizer) -> None:
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
            _write_json(temporary / file, data)
        _write_weights(temporary, tree, slots)
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


def _write_json(path: pathlib.Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(folder: pathlib.Path, tree: Params, slots: dict[str, _Slot]) -> None:
    """One file, or several of at most `MAX_SHARD_BYTES` and their index."""
    shards: list[list[str]] = [[]]
    sizes = {name: 4 * int(np.prod(slot.shape)) for name, slot in slots.items()}
    room = MAX_SHARD_BYTES
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {_full_name(n): file for file, names in zip(files, shards) for n in names}
        metadata = {"total_size": sum(sizes.values())}
        _write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
    for file, names in zip(files, shards):
        tensors = {
            _full_name(n): np.ascontiguousarray(_view(tree, slots[n]), dtype=np.float32)
            for n in names
        }
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"{file} could not be written: {error}") from error
        # safetensors lets nobody but the owner read its files, whatever the umask says.
        shutil.copymode(folder / "config.json", folder / file)


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
    expected = _shapes_by_path(_shapes(model))
    given = _shapes_by_path(params)
    for path in sorted(expected.keys() | given.keys()):
        if expected.get(path) != given.get(path):
            raise ValueError(
                f"params{path} must have shape {expected.get(path)}, but has {given.get(path)}."
            )


def _shapes_by_path(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}


# Both ways


def _slots(model: GPT2, *, with_head: bool) -> dict[str, _Slot]:
    """Every tensor of the folder by its name without `transformer.`, in the order written."""
    config = model.config
    params, width = _shapes(model), config.n_embd
    slots: dict[str, _Slot] = {}
    for name, path in _TOP.items():
        slots[name] = _Slot(("model", *path), None, _leaf(params, path).shape)
    slots["wte.weight"] = slots["wte.weight"]._replace(shape=(config.vocab_size, width))
    for layer in range(config.n_layer):
        for name, path in _LAYER.items():
            shape = _leaf(params["layers"], path).shape[1:]
            if path[1] == "c_attn":  # [D, 3, D] and [3, D] here
                shape = (*shape[:-2], 3 * width)
            slots[f"h.{layer}.{name}"] = _Slot(("model", "layers", *path), layer, shape)
    if with_head:
        slots[_SCORE] = _Slot(("head", "kernel"), None, (1, width))
    return slots


@functools.cache
def _shapes(model: GPT2) -> Params:
    """Shapes and dtypes of the parameters; traced once for each model, and only to be read."""
    return jax.eval_shape(model.init, jax.random.key(0))


def _leaf(tree: Params, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


def _view(tree: Params, slot: _Slot) -> np.ndarray:
    """The part of the NumPy tree that is this tensor: without the rows that pad the vocabulary."""
    leaf = _leaf(tree, slot.path)
    if slot.layer is None:
        return leaf[: slot.shape[0]]
    return leaf[slot.layer].reshape(slot.shape)


def _full_name(name: str) -> str:
    return name if name == _SCORE else f"transformer.{name}"
