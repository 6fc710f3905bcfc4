"""Tokenizers: loaded from a folder or the hub, or a byte-level BPE trained on texts."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.data.settings import TokenizerSettings
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
MODEL_INPUTS = ["input_ids", "attention_mask"]  # and no token types
logger = logging.getLogger("rlhf_jax.data")

VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "spiece.model")


def use_chat_template(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    """Sets the tokenizer's chat template: a Jinja text, or the content of a file.

    Raises:
      InputError: the file cannot be read, or the template is invalid.
    """
    import jinja2

    name, text = "tokenizer.chat_template", template
    if "{" not in template:
        name = f"{name} {template}"
        try:
            text = Path(template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name} cannot be read: {error}.") from error
    try:
        _parsed(text)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        raise InputError(f"{name} is no Jinja template: {error}.") from error
    tokenizer.chat_template = text


def use_chat_template_kwargs(tokenizer: PreTrainedTokenizerFast, kwargs: Mapping[str, Any]) -> None:
    """Sets further variables of the tokenizer's chat template.

    Those that the template never reads, and that have no effect, are logged in one warning.
    """
    from jinja2 import TemplateError
    from jinja2.meta import find_undeclared_variables

    tokenizer.chat_template_kwargs = dict(kwargs)  # type: ignore[attr-defined]
    template: Any = tokenizer.chat_template or ""
    texts = [*template.values()] if isinstance(template, dict) else [template]
    try:
        read: set[str] = set().union(*(find_undeclared_variables(_parsed(text)) for text in texts))
    except (TemplateError, RecursionError):
        return  # which is reported where it renders
    if unread := sorted(kwargs.keys() - read):
        logger.warning(
            "The chat template never reads %s of tokenizer.chat_template_kwargs, which has no "
            "effect.",
            ", ".join(unread),
        )


def _parsed(template: str) -> Any:
    """The syntax tree of a template."""
    import jinja2
    from jinja2.ext import loopcontrols

    # The extension of transformers, {% generation %}, marks text and adds none.
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
    return jinja2.Environment(extensions=[loopcontrols]).parse(plain)


@functools.cache
def _portable_class() -> type[PreTrainedTokenizerFast]:
    """The class of every tokenizer of this module, in a function because transformers loads slowly.

    Its name is the one written to `tokenizer_config.json`: transformers 5 would write
    "TokenizersBackend", which transformers 4 does not know.
    """
    import transformers

    class PreTrainedTokenizerFast(transformers.PreTrainedTokenizerFast):
        """A fast tokenizer whose saved folder opens with transformers 4 and 5.

        Attributes:
          source: settings of the `tokenizer_config.json` that it was loaded from.
          truncation, padding: of the `tokenizer.json` that it was loaded from.
          chat_template_kwargs: further variables of the chat template.
        """

        source: Mapping[str, Any] = {}
        truncation: Mapping[str, Any] | None = None
        padding: Mapping[str, Any] | None = None
        chat_template_kwargs: Mapping[str, Any] = {}

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            # Calls with other limits change both in the backend, which is saved.
            self.backend_tokenizer.no_truncation()
            self.backend_tokenizer.no_padding()
            if self.truncation is not None:
                self.backend_tokenizer.enable_truncation(**self.truncation)
            if self.padding is not None:
                self.backend_tokenizer.enable_padding(**self.padding)
            files = super().save_pretrained(save_directory, *args, **kwargs)
            _make_portable(Path(save_directory) / "tokenizer_config.json", self)
            return files

    return PreTrainedTokenizerFast


def _make_portable(file: Path, tokenizer: Any) -> None:
    """Rewrites a saved tokenizer's configuration for transformers 4, with the source's settings."""
    written = json.loads(file.read_text(encoding="utf-8"))
    config = {**tokenizer.source, **written, "tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    # Transformers 4 expects a dict under this name, and a list under the older one.
    if isinstance(written.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # Transformers 4 would add token_type_ids, which a decoder adds to its embeddings.
    config["model_input_names"] = tokenizer.model_input_names
    for side in ("padding_side", "truncation_side"):
        config[side] = getattr(tokenizer, side)
    clean_up = tokenizer.source.get("clean_up_tokenization_spaces", False)
    config["clean_up_tokenization_spaces"] = clean_up
    file.write_text(
        json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8"
    )


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of a local folder or of a model on the hub.

    Args:
      path: a folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`; or a hub name.

    Returns:
      A `PreTrainedTokenizerFast` that decodes its own encoding exactly (without a clean-up of
      spaces) and whose `save_pretrained` writes a folder for transformers 4 and 5.

    Raises:
      InputError: if there is no such folder, the hub cannot be reached, the files cannot be read,
        or the tokenizer has no fast version or no end-of-sequence token.
    """
    import transformers

    name = os.path.expanduser(os.fspath(path))
    _check_folder(name)
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # its type depends on the file that is broken
        raise InputError(_cannot_load(name, error)) from error
    if not isinstance(loaded, transformers.PreTrainedTokenizerFast):
        raise InputError(
            f"The tokenizer of {name} has no fast version (no tokenizer.json): give another one."
        )
    if loaded.eos_token is None:
        raise InputError(
            f"The tokenizer of {name} has no end-of-sequence token, which responses need to end: "
            "set eos_token in its tokenizer_config.json."
        )
    return _portable(loaded, _source(name))


# Settings of classes and files that are not exported, or that are written anew.
_NOT_KEPT = {
    "added_tokens_decoder",
    "additional_special_tokens",
    "auto_map",
    "chat_template",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_class",
    "tokenizer_file",
}


def _source(name: str) -> dict[str, Any]:
    """The settings in the `tokenizer_config.json` of a folder or hub name; {} without the file."""
    from transformers.utils import cached_file

    file = cached_file(
        name,
        "tokenizer_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return {}
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    return {key: value for key, value in settings.items() if key not in _NOT_KEPT}


def _portable(loaded: PreTrainedTokenizerFast, source: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The same tokenizer as an object of the portable class."""
    named: dict[str, Any] = {
        key: value for key, value in loaded.special_tokens_map.items() if value
    }
    # Transformers 4 lists the further special tokens in the map, 5 in an attribute of their own.
    extra = named.pop("additional_special_tokens", None)
    extra = extra or getattr(loaded, "extra_special_tokens", None)
    if extra:
        named["additional_special_tokens"] = list(extra)
    backend = loaded.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    tokenizer = _portable_class()(
        tokenizer_object=backend,
        model_max_length=loaded.model_max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=source.get("model_input_names", MODEL_INPUTS),
        padding_side=loaded.padding_side,
        truncation_side=loaded.truncation_side,
        split_special_tokens=loaded.split_special_tokens,
        **named,
    )
    tokenizer.chat_template = loaded.chat_template
    tokenizer.source, tokenizer.truncation, tokenizer.padding = source, truncation, padding
    return tokenizer


def _check_folder(name: str) -> None:
    """Raises unless `name` is a folder with a tokenizer, or could be a name on the hub."""
    if os.path.isdir(name):
        # transformers 5 returns an empty tokenizer for a model's folder without one.
        if not any(os.path.exists(os.path.join(name, file)) for file in VOCABULARIES):
            raise InputError(_cannot_load(name, FileNotFoundError("none of them is there")))
        return
    if os.path.exists(name):
        raise InputError(f"tokenizer.path {name} is a file: give the folder that holds it.")
    if name.startswith((".", "/")) or name.count("/") > 1:
        raise InputError(
            f"There is no folder {name}: give a folder with tokenizer.json, or a hub name."
        )


def _cannot_load(name: str, error: Exception) -> str:
    """The error message for a tokenizer that transformers could not load."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
    if os.path.isdir(name):
        return (
            f"The folder {name} holds no tokenizer that can be read (tokenizer.json, or vocab.json "
            f"and merges.txt): {reason}."
        )
    return (
        f"The tokenizer {name} is neither a local folder nor reachable on the hub: if this machine "
        f"is offline, give a local folder ({reason})."
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`; the same texts give the same tokenizer.

    Ids 0 to 255 are the bytes, then the merges; the last two are "<|pad|>" and "<|endoftext|>"
    (end and beginning of sequence), the latter last as in GPT-2. Any UTF-8 text round-trips, since
    every byte has an entry and nothing is normalized.

    Args:
      texts: the training texts.
      vocab_size: maximum number of entries, special tokens included.

    Raises:
      InputError: if `vocab_size` is below 258.

    Sennrich et al., Neural Machine Translation of Rare Words with Subword Units
    (arXiv:1508.07909), on bytes as in GPT-2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    size = TokenizerSettings(vocab_size=vocab_size).vocab_size
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([PAD_TOKEN, EOS_TOKEN])
    return _portable_class()(
        tokenizer_object=backend,
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
        model_input_names=MODEL_INPUTS,
    )
