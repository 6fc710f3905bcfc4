"""Ids of special tokens: those of the tokenizer, in `config.json` and `generation_config.json`."""

import copy
import dataclasses
import logging
import pathlib
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.models.family import TOKEN_IDS
from rlhf_jax.models.folders import read_json
from rlhf_jax.models.interface import Model, ModelConfig

GENERATION_CONFIG = "generation_config.json"

logger = logging.getLogger("rlhf_jax.models")


def read_generation_config(folder: pathlib.Path, config: ModelConfig) -> dict[str, Any]:
    """The object in the `generation_config.json` of a folder; {} without the file.

    Raises:
      InputError: it cannot be read, or its ids are no integers.
    """
    file = folder / GENERATION_CONFIG
    return with_known_ids(read_json(file), config.vocab_size, file) if file.exists() else {}


def with_known_ids(data: dict[str, Any], vocab_size: Any, file: pathlib.Path) -> dict[str, Any]:
    """The object of a file without ids of special tokens that are not in the vocabulary.

    transformers writes such ids, its defaults, for small vocabularies, and -1 for none. They are
    logged as a warning.

    Raises:
      InputError: an id is no integer.
    """
    data = dict(data)
    for name in TOKEN_IDS:
        ids = ids_of(data.get(name))
        if not all(type(index) is int for index in ids):
            raise InputError(
                f"{file}: {name} must be an integer, a list of integers or null, but is "
                f"{data[name]!r}."
            )
        known = [i for i in ids if type(vocab_size) is not int or 0 <= i < vocab_size]
        if len(known) < len(ids):
            logger.warning("%s: %s %s is not in the vocabulary.", file, name, data[name])
            data[name] = known if isinstance(data[name], list) and known else None
    return data


def ids_of(value: Any) -> list[Any]:
    """The ids of a key that holds one, a list of them, or null."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def with_listed_eos(generation: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """A generation config with the eos_token_id of config.json if only that one lists several."""
    if not isinstance(data.get("eos_token_id"), list) or "eos_token_id" in generation:
        return generation
    if not generation:
        ids = {name: data[name] for name in TOKEN_IDS if data.get(name) is not None}
        return {"_from_model_config": True, **ids}
    return {**generation, "eos_token_id": data["eos_token_id"]}


def generation_config(model: Model) -> dict[str, Any]:
    """The object to write: that of the model, else one of its ids, perhaps {}."""
    if model.generation_config:
        return dict(model.generation_config)
    ids = {name: getattr(model.config, name) for name in TOKEN_IDS}
    ids = {name: index for name, index in ids.items() if index is not None}
    return {"_from_model_config": True, **ids} if ids else {}


def with_special_tokens(model: Model, tokenizer: Any, name: str) -> Model:
    """The model with the special tokens of its tokenizer; a difference is logged as a warning.

    Generation ends with the tokenizer's EOS, and with those in the model's
    `generation_config.json` that the tokenizer marks as special.

    Args:
      tokenizer: of transformers.
      name: of the model, for the warning.
    """
    ids = {key: getattr(tokenizer, key) for key in TOKEN_IDS}
    ids = {key: index for key, index in ids.items() if index is not None}
    added = tokenizer.added_tokens_decoder
    listed = ids_of(model.generation_config.get("eos_token_id"))
    others = [i for i in listed if i != ids["eos_token_id"] and i in added and added[i].special]
    eos = [ids["eos_token_id"], *others] if others else ids["eos_token_id"]
    differences = [
        f"{key} {own} and not {index}"
        for key, index in ids.items()
        if (own := getattr(model.config, key)) not in (None, index)
    ]
    if set(listed) - set(ids_of(eos)):
        differences.append(f"{GENERATION_CONFIG} eos_token_id {listed} and not {ids_of(eos)}")
    if differences:
        logger.warning(
            "The model in %s has other special tokens than its tokenizer, whose are used and "
            "exported: %s.",
            name,
            ", ".join(differences),
        )
    config: Any = dataclasses.replace(model.config, **ids)  # type: ignore[type-var]
    generation = {**model.generation_config, **ids, "eos_token_id": eos}
    generation = generation if model.generation_config else {}
    changes = {"config": config, "generation_config": generation}
    return dataclasses.replace(model, **changes)  # type: ignore[type-var]


def with_pad_token(config: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The configuration of a classifier, whose pad id is not EOS, and a tokenizer that has it.

    The pad token is the tokenizer's, else the one of the configuration, else a new one.
    """
    if tokenizer is None:
        pad = config.pad_token_id
        pad = config.vocab_size if pad in (None, config.eos_token_id) else pad
    else:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "right"
        excluded = (None, config.eos_token_id, tokenizer.eos_token_id)
        if tokenizer.pad_token_id in excluded:
            token = None
            if config.pad_token_id not in excluded:
                token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
            tokenizer.add_special_tokens({"pad_token": token or "<|pad|>"})
        pad = tokenizer.pad_token_id
    if pad > config.vocab_size:
        raise InputError(
            f"The pad token has the id {pad}, but the vocabulary of the model ends at "
            f"{config.vocab_size - 1}; use the tokenizer that the model was trained with."
        )
    vocab_size = max(config.vocab_size, pad + 1)
    return dataclasses.replace(config, vocab_size=vocab_size, pad_token_id=pad), tokenizer
