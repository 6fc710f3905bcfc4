"""Models by name or by configuration, without parameters."""

from rlhf_jax.data.tokenizers import Settings as TokenizerSettings
from rlhf_jax.models.huggingface import described_model, fresh_model
from rlhf_jax.models.interface import Model
from rlhf_jax.models.settings import ModelSettings


def find_model(
    name: str | None, settings: ModelSettings, tokenizer: TokenizerSettings, dtype: str
) -> Model:
    """A model of a configuration; no parameters are read.

    Args:
      name: one of `named_sizes`, a folder with a config.json, or such a file. None: `model.path` of
        the settings, which is the same, or if that is null too, a fresh model of the settings with
        the vocabulary size of the tokenizer settings.

    Raises:
      InputError: there is no such model.
    """
    name = name or settings.path
    if name is None:
        return fresh_model(settings, vocab_size=tokenizer.vocab_size, dtype=dtype)
    name = name.removeprefix("openai-community/")
    return described_model(name, dtype=dtype, remat=settings.remat)
