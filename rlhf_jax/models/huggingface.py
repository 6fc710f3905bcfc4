"""Model folders of Hugging Face, read and written without PyTorch or transformers.

A folder holds `config.json` and the weights as `model.safetensors` (or several such files and their
index). Its `model_type` determines the family, one of `FAMILIES`. Reward models are sequence
classifiers with one label, e.g. `GPT2ForSequenceClassification`. Parameters are float32 in memory,
whatever type they were stored in, since an optimizer updates them. They are written in the types
that they were stored in where those lose nothing (`models/stored_types.py`), else in float32.
"""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder_families, gpt2
from rlhf_jax.models.adapters import adapters_of
from rlhf_jax.models.family import SCORE, SCORE_BIAS, Family, Slot, param_shapes
from rlhf_jax.models.folders import find_folder, read_json
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.models.peft import read_adapter, read_reward_adapter
from rlhf_jax.models.reading import (
    Convert,
    check_sizes,
    find_tensors,
    read_params,
    read_score_bias,
)
from rlhf_jax.models.settings import Attention, ModelSettings, Remat
from rlhf_jax.models.special_tokens import (
    GENERATION_CONFIG,
    generation_config,
    read_generation_config,
    with_known_ids,
    with_listed_eos,
    with_pad_token,
)
from rlhf_jax.models.stored_types import written_types
from rlhf_jax.models.writing import check_params, config_object, save_model
from rlhf_jax.parallel.partition import tree_shardings

logger = logging.getLogger("rlhf_jax.models")

FAMILIES: tuple[Family, ...] = (gpt2.FAMILY, *decoder_families.FAMILIES)


def fresh_model(
    settings: ModelSettings,
    *,
    vocab_size: int,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    dtype: DTypeLike = jnp.float32,
    model_type: str | None = None,
) -> Model:
    """A model of the sizes and, unless `model_type` is given, the family in the settings.

    It has no parameters.

    Raises:
      InputError: no family has this `model_type`, or no model of it these sizes.

    >>> settings = ModelSettings(n_positions=8, n_embd=8, n_layer=2, n_head=2)
    >>> fresh_model(settings, vocab_size=10).config.n_layer
    2
    """
    family = _family_of_type(model_type or settings.family)
    config = dataclasses.replace(
        family.fresh_config(settings, vocab_size),
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    return family.model(config, jnp.dtype(dtype).name, settings.remat, settings.attention)


def named_sizes() -> list[str]:
    """The names that `described_model` knows, such as "gpt2-xl" and "Qwen/Qwen3-8B"."""
    return [name for family in FAMILIES for name in family.sizes]


def described_model(
    name_or_path: str | pathlib.Path, *, dtype: DTypeLike = jnp.float32, remat: Remat = "dots"
) -> Model:
    """The model with one of the `named_sizes`, or of a config.json, without parameters.

    Args:
      name_or_path: a name, a folder with a config.json, or such a file. No weights are read.

    Raises:
      InputError: it is none of these.
    """
    dtype = jnp.dtype(dtype).name
    for family in FAMILIES:
        if name_or_path in family.sizes:
            return family.model(family.sizes[str(name_or_path)], dtype, remat)
    path = pathlib.Path(name_or_path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"There is no model {str(name_or_path)!r} here: give one of "
            f"{', '.join(named_sizes())}, or a folder with a config.json."
        )
    family, config, _ = _read_config(file)
    return family.model(config, dtype, remat)


def language_model_slots(model: Model) -> dict[str, Slot]:
    """Every tensor of the folder of a language model, by its full name."""
    family = _family_of(model)
    return {family.full_name(name): slot for name, slot in family.slots(model).items()}


def load_pretrained(
    folder_or_hub_name: str | pathlib.Path,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    remat: Remat = "dots",
    attention: Attention = "blocks",
    adapter_path: str | pathlib.Path | None = None,
    convert: Convert | None = None,
) -> tuple[Model, Params]:
    """A language model and its parameters.

    Args:
      folder_or_hub_name: a local folder, or a name on the hub such as "openai-community/gpt2".
      dtype: the compute dtype of the model; the parameters are float32 in any case.
      mesh: shards the parameters by the rules of the model; by default they are on the default
        device. Each host reads the parts that its devices will hold, one at a time.
      remat, attention: of the model, as in `models/settings.py`.
      adapter_path: a local folder in PEFT's format, whose adapters the parameters hold as well.
      convert: of each array, as soon as it is read: convert(path, array) -> {name: array}, which
        takes its place in its module.

    Returns:
      (model, params), the vocabulary padded as in `models/embedding.py`.

    Raises:
      InputError: the folder cannot be found, read, or represented, or the mesh does not divide
        the model.

    >>> import tempfile
    >>> settings = ModelSettings(n_positions=8, n_embd=8, n_layer=2, n_head=2)
    >>> model = fresh_model(settings, vocab_size=10)
    >>> params = model.init(jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(folder, model, params)
    ...     same_model, same_params = load_pretrained(folder)
    >>> same_model == model, bool(jax.tree.all(jax.tree.map(jnp.array_equal, params, same_params)))
    (True, True)
    """
    opened = _open(folder_or_hub_name, dtype, remat, attention)
    model, params = _load(opened, {"model": param_shapes(opened.model)}, mesh, None, convert)
    if adapter_path is None:
        return model, params["model"]
    parts = model, language_model_slots(model), params["model"]
    return read_adapter(adapter_path, folder_or_hub_name, *parts, mesh)


def load_reward_model(
    folder_or_hub_name: str | pathlib.Path,
    *,
    dtype: DTypeLike = jnp.float32,
    label: int | None = None,
    mesh: Mesh | None = None,
    remat: Remat = "dots",
    attention: Attention = "blocks",
    adapter_path: str | pathlib.Path | None = None,
) -> tuple[Model, Params]:
    """A reward model: a language model with a linear head on the last real token.

    Args:
      folder_or_hub_name: a folder or hub name of a sequence classifier, or with `adapter_path` of
        any model.
      label: whose logit is the score, from 0; None if there is one label only.
      dtype, mesh, remat, attention: as in `load_pretrained`.
      adapter_path: a local folder in PEFT's format for sequence classifiers, with the head.

    Returns:
      (model, {"model": parameters, "head": {"kernel": f32[D]}}). The head has a "bias", f32[], too
      where `save_reward_model` wrote one. The parameters have no unembedding of their own.

    Raises:
      InputError: as `load_pretrained`, or the folder has several labels and none is chosen, or not
        the chosen one.
    """
    opened, shapes = _open(folder_or_hub_name, dtype, remat, attention), {}
    if adapter_path is None or SCORE in opened.model.stored_types:
        opened = opened._replace(model=_tied(opened.model))
        shapes["head"] = {"kernel": jax.ShapeDtypeStruct((opened.model.config.n_embd,), "float32")}
    model, params = _load(opened, {**shapes, "model": param_shapes(opened.model)}, mesh, label)
    if shapes and (bias := read_score_bias(opened.folder)) is not None:
        bias = bias if mesh is None else jax.device_put(bias, NamedSharding(mesh, PartitionSpec()))
        params["head"]["bias"] = bias
    model, params["model"] = _tied(model), model.without_unembedding(params["model"])
    if adapter_path is None:
        return model, params
    parts = model, language_model_slots(model), params
    return read_reward_adapter(adapter_path, folder_or_hub_name, *parts, mesh)


def check_pretrained(
    folder_or_hub_name: str | pathlib.Path,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "dots",
    attention: Attention = "blocks",
) -> Model:
    """The model of `load_pretrained`, without its parameters; raises as that does."""
    return _check(_open(folder_or_hub_name, dtype, remat, attention), with_head=False)


def check_reward_model(
    folder_or_hub_name: str | pathlib.Path,
    *,
    dtype: DTypeLike = jnp.float32,
    label: int | None = None,
    remat: Remat = "dots",
    attention: Attention = "blocks",
) -> Model:
    """The model of `load_reward_model`, without its parameters; raises as that does."""
    opened = _open(folder_or_hub_name, dtype, remat, attention)
    opened = opened._replace(model=_tied(opened.model))
    read_score_bias(opened.folder)
    return _check(opened, with_head=True, label=label)


def save_pretrained(
    folder: str | pathlib.Path, model: Model, params: Params, tokenizer: Any = None
) -> None:
    """Writes a folder in Hugging Face's format, e.g. of `GPT2LMHeadModel`.

    Its tensors have the types of the folder that the model was read from if the parameters are
    exact in them, as those that were not trained are; otherwise, and for fresh models, float32.

    An interrupted save leaves no incomplete file behind; weights of an earlier save are replaced.
    The parameters may be sharded: one tensor at a time is gathered to the first host, which alone
    writes, but all hosts have to call this function.

    Args:
      folder: a local folder of the first host; created if it does not exist.
      model, params: as from `load_pretrained`; the padding of the vocabulary is not written.
      tokenizer: anything with `save_pretrained(folder)`.

    Raises:
      ValueError: the parameters are not those of the model.
      OSError: the folder cannot be written.
    """
    check_params(param_shapes(model), params)
    family = _family_of(model)
    slots = _slots(family, model, with_head=False)
    types = written_types(_stored(model), slots, {"model": params})
    texts = {
        "config.json": config_object(family, model.config, family.language_model, types),
        GENERATION_CONFIG: generation_config(model),
    }
    save_model(folder, family, slots, slots, {"model": params}, types, texts, tokenizer)


def save_reward_model(
    folder: str | pathlib.Path, model: Model, params: Params, tokenizer: Any = None
) -> None:
    """Writes a folder of a sequence classifier with one label, in the types of `save_pretrained`.

    transformers scores the last token that is not the pad token, the one before EOS if EOS is the
    pad token. The folder therefore declares another one: the tokenizer's, else the model's, else a
    new one, for which `vocab_size` and the token embedding grow by one vector of zeros. The
    tokenizer is written with that pad token, padding on the right (transformers does not shift the
    positions of this model under left padding).

    A bias of the head is `score_bias` in config.json. transformers does not read it: its scores
    differ by this constant, of which a warning is logged.

    Args:
      folder: as of `save_pretrained`.
      model: the language model under the head.
      params: {"model": parameters, "head": {"kernel": [D], perhaps "bias": []}}.
      tokenizer: a transformers tokenizer, which is not changed.

    Raises:
      InputError: the tokenizer has more tokens than the model.
      ValueError: the parameters are not those of the model.
      OSError: the folder cannot be written.
    """
    model, params = _tied(model), {**params, "model": model.without_unembedding(params["model"])}
    check_params(param_shapes(model), params["model"])
    if not {"kernel"} <= set(params["head"]) <= {"kernel", "bias"}:
        raise ValueError(
            f"a reward head is {{'kernel': [D], perhaps 'bias': []}}, but has "
            f"{sorted(params['head'])}."
        )
    family = _family_of(model)
    config, tokenizer = with_pad_token(model.config, tokenizer)
    own, slots = (_slots(family, m, with_head=True) for m in (model, family.model(config)))
    types = written_types(_stored(model), own, params)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    json_object = {**config_object(family, config, family.classifier, types), **labels}
    if "bias" in params["head"]:
        json_object[SCORE_BIAS] = bias = float(params["head"]["bias"])
        if bias:
            message = "transformers does not read %s in %s: its scores are less by %.6g."
            logger.warning(message, SCORE_BIAS, folder, bias)
    texts = {"config.json": json_object}
    save_model(folder, family, slots, own, params, types, texts, tokenizer)


def _stored(model: Model) -> Mapping[str, str]:
    """The types of the tensors in files; {} where the written ones are sums with adapters."""
    return model.stored_types if adapters_of(model) is None else {}


class _Opened(NamedTuple):
    folder: pathlib.Path
    family: Family
    model: Model


def _open(name, dtype, remat, attention) -> _Opened:
    """The local folder, and the model that its config.json describes."""
    dtype = jnp.dtype(dtype).name
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype must be float32, bfloat16 or float16, but is {dtype}.")
    folder = find_folder(name)
    family, config, data = _read_config(folder / "config.json")
    types = check_sizes(folder, family, config)
    generation = with_listed_eos(read_generation_config(folder, config), data)
    model = family.model(config, dtype, remat, attention, generation, types)
    return _Opened(folder, family, model)


def _tied(model: Model) -> Model:
    """The architecture without an unembedding of its own."""
    config: Any = dataclasses.replace(model.config, tie_word_embeddings=True)  # type: ignore[type-var]
    return dataclasses.replace(model, config=config)  # type: ignore[type-var]


def _load(opened: _Opened, shapes: Params, mesh, label, convert=None) -> tuple[Model, Params]:
    folder, family, model = opened
    shardings = None
    if mesh is not None:
        model.check_mesh(mesh)
        shardings = tree_shardings(mesh, shapes, model.partition_rules)
    slots = _slots(family, model, with_head="head" in shapes)
    return model, read_params(folder, family, slots, shapes, shardings, label, convert)


def _check(opened: _Opened, *, with_head: bool, label: int | None = None) -> Model:
    folder, family, model = opened
    with contextlib.ExitStack() as files:
        find_tensors(folder, family, _slots(family, model, with_head=with_head), label, files)
    return model


def _slots(family: Family, model: Model, *, with_head: bool) -> dict[str, Slot]:
    """Every tensor of a folder by its name without the prefix, for {"model": ..., "head": ...}."""
    slots = family.slots(model)
    slots = {name: slot._replace(path=("model", *slot.path)) for name, slot in slots.items()}
    if with_head:
        slots[SCORE] = Slot(("head", "kernel"), None, (1, model.config.n_embd))
    return slots


def _read_config(path: pathlib.Path) -> tuple[Family, Any, dict[str, Any]]:
    """The family and the configuration that a config.json describes, and its object."""
    data = read_json(path)
    data = with_known_ids(data, data.get("vocab_size"), path)
    try:
        family = _family_of_type(data.get("model_type"))
        return family, family.read_config(data), data
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _family_of_type(model_type: Any) -> Family:
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(repr(family.model_type) for family in FAMILIES)
    raise InputError(
        f"model_type is {model_type!r}, but only {known} is supported; choose another model."
    )


def _family_of(model: Model) -> Family:
    """The family of a model, by the class of its configuration and its model_type."""
    for family in FAMILIES:
        model_type = getattr(model.config, "model_type", family.model_type)
        if type(model.config) is family.config and model_type == family.model_type:
            return family
    raise ValueError(f"no family in FAMILIES has the configuration {type(model.config).__name__}.")
