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
      InputError: it cannot be read, or its ids are none of the vocabulary.
    """
    file = folder / GENERATION_CONFIG
    if not file.exists():
        return {}
    data = read_json(file)
    for name in TOKEN_IDS:
        for index in ids_of(data.get(name)):
            if type(index) is not int or not 0 <= index < config.vocab_size:
                raise InputError(
                    f"{file}: {name} is {data[name]!r}, but ids are integers from 0 to "
                    f"{config.vocab_size - 1}; correct it, or remove the key."
                )
    return data


def ids_of(value: Any) -> list[Any]:
    """The ids of a key that holds one, a list of them, or null."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


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
        ends = (None, config.eos_token_id, tokenizer.eos_token_id)
        if tokenizer.pad_token_id in ends:
            token = None
            if config.pad_token_id not in ends:
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
