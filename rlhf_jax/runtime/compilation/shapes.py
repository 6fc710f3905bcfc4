"""Sizes of models: fresh ones of a configuration, and known ones by name."""

import pathlib

from rlhf_jax.data.settings import TokenizerSettings
from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2Config
from rlhf_jax.models.huggingface import read_config
from rlhf_jax.models.settings import ModelSettings

# GPT-2's own sizes (Radford et al. 2019, table 2), and the same network at the sizes of larger
# models: those of OPT-6.7B (Zhang et al. 2022), and depth, width and heads of Llama 2 70B (Touvron
# et al. 2023) with a hidden layer that gives as many parameters.
SHAPES: dict[str, GPT2Config] = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "7b": GPT2Config(n_positions=2048, n_embd=4096, n_layer=32, n_head=32),
    "70b": GPT2Config(n_positions=2048, n_embd=8192, n_layer=80, n_head=64, n_inner=36864),
}


def fresh_shape(settings: ModelSettings, vocab_size: int) -> GPT2Config:
    """The sizes of a fresh model, as the section `model` gives them."""
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=settings.n_positions,
        n_embd=settings.n_embd,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
    )


def find_shape(
    name: str | None, settings: ModelSettings, tokenizer: TokenizerSettings
) -> GPT2Config:
    """The sizes of a model; no parameter is read.

    Args:
      name: one of `SHAPES`, a folder with a config.json, or such a file. None: `model.path` of the
        settings, which is the same, or where that is null too, a fresh model of the settings, with
        as many tokens as the tokenizer may have.

    Raises:
      InputError: there is no such model.
    """
    name = name or settings.path
    if name is None:
        return fresh_shape(settings, tokenizer.vocab_size)
    short = name.removeprefix("openai-community/")
    if short in SHAPES:
        return SHAPES[short]
    path = pathlib.Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"There is no model {name!r} here: --model is one of {', '.join(SHAPES)}, or a folder "
            "with a config.json."
        )
    return read_config(file)
