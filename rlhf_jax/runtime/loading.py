"""From settings to tokenizers and models, and whether they belong together."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from jax.sharding import Mesh

from rlhf_jax.data.settings import TokenizerSettings
from rlhf_jax.data.tokenizers import (
    load_tokenizer,
    train_tokenizer,
    use_chat_template,
    use_chat_template_kwargs,
)
from rlhf_jax.errors import InputError
from rlhf_jax.models.adapter_folders import adapters_in, with_settings
from rlhf_jax.models.adapter_settings import Base, LoraSettings
from rlhf_jax.models.adapters import (
    adapter_arrays,
    adapters_of,
    frozen_base,
    frozen_module,
    merged_trees,
    nested,
)
from rlhf_jax.models.cudnn_attention import check_device
from rlhf_jax.models.family import leaf_at
from rlhf_jax.models.huggingface import (
    check_pretrained,
    check_reward_model,
    fresh_model,
    load_pretrained,
    load_reward_model,
)
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.models.peft_config import CONFIG as ADAPTER_CONFIG
from rlhf_jax.models.reading import Convert
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.models.special_tokens import with_special_tokens
from rlhf_jax.runtime.program import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
    use_chat_template_kwargs(tokenizer, settings.chat_template_kwargs)
    return tokenizer


def load_model(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerFast,
    key: jax.Array,
    mesh: Mesh,
    lora: LoraSettings | None = None,
) -> tuple[Model, Params]:
    """The language model at `model.path`, or a fresh one for the tokenizer's vocabulary.

    Each parameter is initialised or read sharded over the mesh. With `lora`, for `add_adapters`,
    those read that will be frozen get the type of the base one by one, so that no more than one of
    them is float32 at a time. Raises an InputError if the folder cannot be read, the tokenizer has
    ids that the model lacks, or the model cannot be split over the mesh.
    """
    if settings.path is not None:
        adapter = settings.adapter_path
        with (
            local_folder(settings.path) as folder,
            contextlib.nullcontext() if adapter is None else local_folder(adapter) as local,
        ):
            options = {**_options(settings), "adapter_path": local}
            if lora is not None and lora.base != "float32":
                options["convert"] = _conversion(check_pretrained(folder), local, lora, mesh)
            model, params = load_pretrained(folder, mesh=mesh, **options)
        check_vocabulary(model, tokenizer, settings.path)
        return with_special_tokens(model, tokenizer, settings.path), params
    model = fresh_model(
        settings,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=_options(settings)["dtype"],
    )
    model.check_mesh(mesh)
    return model, Placement(mesh, model.partition_rules).initialise(model.init, key)


def _conversion(model: Any, adapter: str | None, lora: LoraSettings, mesh: Mesh) -> Convert:
    """Of the arrays of a model: to the type of the base, but for modules that are trained."""
    if adapter is not None:
        model = dataclasses.replace(model, adapters=adapters_in(adapter, model))
    adapters, place = with_settings(model, lora).adapters, Placement(mesh, model.partition_rules)

    def convert(path, array):
        module = {path[-1]: array}
        return module if adapters.is_saved(path) else _frozen(place, lora.base, path[:-1], module)

    return convert


def add_adapters(
    model: Any, params: Params, settings: LoraSettings, key: jax.Array, mesh: Mesh
) -> tuple[Model, Params]:
    """The model with adapters, fresh ones by the section `lora` or its own, on a frozen base.

    A base that is not of its type yet is converted one module at a time; arrays that this replaces
    are deleted. Without adapters the model is returned as it is.

    Raises:
      InputError: no layer has a module that the settings name.
    """
    is_fresh = adapters_of(model) is None
    model = with_settings(model, settings)
    if (adapters := adapters_of(model)) is None:
        return model, params
    place = Placement(mesh, model.partition_rules)
    base = frozen_base(adapters, params, functools.partial(_frozen, place, adapters.base))
    if not is_fresh:
        return model, base
    start = functools.partial(adapter_arrays, adapters)
    return model, merged_trees(base, place.initialise(start, base, key))


def _frozen(place: Placement, base: Base, path: tuple[str, ...], module: Params) -> Params:
    """A module in the type of the base."""
    convert = functools.partial(frozen_module, base=base)
    shapes = jax.eval_shape(convert, module)
    if {name: x.dtype for name, x in shapes.items()} == {n: x.dtype for n, x in module.items()}:
        return module
    shardings = leaf_at(place.shardings(nested(path, shapes)), path)
    converted = jax.jit(convert, out_shardings=shardings)(module)
    for name, array in module.items():
        if array.dtype != converted[name].dtype:
            array.delete()
    return converted


def load_reference(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerFast, mesh: Mesh
) -> tuple[Model, Params] | None:
    """The policy at `model.reference_path`, to compare with another one; None without a path.

    A folder in PEFT's format is an adapter of the base at `model.path`.

    Raises an InputError if the folder cannot be read, its tokenizer is another one, or the model
    cannot be split over the mesh.
    """
    path = settings.reference_path
    if path is None:
        return None
    if settings.path is not None and (epath.Path(path) / ADAPTER_CONFIG).exists():
        base = dataclasses.replace(settings, adapter_path=path)
        return load_model(base, tokenizer, jax.random.key(0), mesh)
    with local_folder(path) as folder:
        both = tokenizer, load_tokenizer(folder)
        if not (shares_tokens(*both) and shares_tokens(*both[::-1])):
            raise InputError(
                f"model.reference_path {path} has another tokenizer than the policy, whose tokens "
                "it would misread; give a model that has the same one."
            )
        model, params = load_pretrained(folder, dtype=compute_dtype(settings.dtype), mesh=mesh)
    check_vocabulary(model, tokenizer, path)
    return with_special_tokens(model, tokenizer, path), params


def load_scorer(
    path: str, settings: ModelSettings, tokenizer: PreTrainedTokenizerFast, mesh: Mesh
) -> tuple[Model, Params]:
    """The reward model at a path, to score tokens of this tokenizer; its place is the mesh.

    Raises an InputError if the folder cannot be read, its tokenizer is another one, or the model
    cannot be split over the mesh.
    """
    model, params, theirs = load_reward(path, settings, None, mesh)
    check_vocabulary(model, tokenizer, path)
    if not shares_tokens(tokenizer, theirs):
        raise InputError(
            f"The reward model in {path} has another tokenizer than tokenizer.path; leave that "
            "out, for a reward model is evaluated with its own."
        )
    return model, params


def load_reward(
    path: str, settings: ModelSettings, label: int | None, mesh: Mesh
) -> tuple[Model, Params, PreTrainedTokenizerFast]:
    """The reward model at a path, in its place on the mesh, and its own tokenizer."""
    with local_folder(path) as folder:
        model, params = load_reward_model(folder, label=label, mesh=mesh, **_options(settings))
        return model, params, load_tokenizer(folder)


def check_reward(
    path: str, settings: ModelSettings, label: int | None = None
) -> tuple[Model, PreTrainedTokenizerFast]:
    """As `load_reward`, without the parameters."""
    with local_folder(path) as folder:
        model = check_reward_model(folder, label=label, **_options(settings))
        return model, load_tokenizer(folder)


def _options(settings: ModelSettings) -> dict[str, Any]:
    """The keyword arguments of the functions that load a model."""
    if settings.attention == "cudnn":
        check_device("model.attention cudnn")
    dtype = compute_dtype(settings.dtype)
    return {"dtype": dtype, "remat": settings.remat, "attention": settings.attention}


def shares_tokens(ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> bool:
    """Whether their tokenizer has all our ids and merges; it may have more tokens, say a pad."""
    vocabulary = theirs.get_vocab()
    if any(vocabulary.get(token) != index for token, index in ours.get_vocab().items()):
        return False
    models = [json.loads(each.backend_tokenizer.to_str())["model"] for each in (ours, theirs)]
    return models[0].get("merges") == models[1].get("merges")


def check_vocabulary(model: Model, tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    """Raises an InputError if the tokenizer makes ids that the model does not have."""
    count = 1 + max(tokenizer.get_vocab().values())  # more than its length, where ids are left out
    if count > model.config.vocab_size:
        raise InputError(
            f"The tokenizer has {count} tokens, but the model in {path} has a vocab_size of "
            f"{model.config.vocab_size}; use the tokenizer that the model was made with."
        )


def find_token(tokenizer: PreTrainedTokenizerFast, token: int | str, name: str) -> int:
    """The id of a token that is given as its text or as its id; else an InputError."""
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
    """Raises an InputError if examples can be longer than the model has positions."""
    if needed > model.config.n_positions:
        raise InputError(
            f"{what} = {needed} exceeds the model's n_positions = {model.config.n_positions}; "
            "shorten it, or use a model with more positions."
        )


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
