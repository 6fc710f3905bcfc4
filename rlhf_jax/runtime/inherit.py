"""Settings of `generate` and `evaluate` from the run whose model they open."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from rlhf_jax.data.settings import DataSettings, TokenizerSettings
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.parsing import Values, merge, to_dict
from rlhf_jax.runtime.yaml_files import parsed_yaml

# How texts become tokens; the other settings say where the examples are, and how many.
OF_TEXTS = (
    "max_length", "max_prompt_length", "max_response_length", "completion_only", "assistant_turns",
    "packing", "prompt_tokens", "split_at", "prompt_suffix", "min_response_words",
)  # fmt: skip


def with_data_of_run(values: Mapping[str, Any], name: str, *, quiet: bool = False) -> Values:
    """The values over the section `data` of the run that exported a model, if there is one.

    That run's `config.yaml` stands beside the folder `hf/` that `model.NAME` is, or beside the
    folder `adapter/` that `model.adapter_path` is. With another
    `data.path` only the settings in `OF_TEXTS` are those of the run. `tokenizer` has the run's
    `chat_template_kwargs`, the one setting of it that `hf/` does not hold. Unless `quiet`, those
    that are not the defaults are printed to standard error.

    Raises:
      InputError: the run's `config.yaml` cannot be read.
    """
    from etils import epath  # here, so that --help does without it

    sections = {section: values.get(section, {}) for section in ("data", "tokenizer")}
    model = values.get("model")
    path = model.get(name) if isinstance(model, Mapping) else None
    if not isinstance(path, str) or not all(isinstance(x, Mapping) for x in sections.values()):
        return dict(values)
    folder, kind, described = epath.Path(path), "hf", "config.json"
    adapter = model.get("adapter_path") if isinstance(model, Mapping) else None
    if name == "path" and isinstance(adapter, str):
        folder, kind, described = epath.Path(adapter), "adapter", "adapter_config.json"
    file = folder.parent / "config.yaml"
    if folder.name != kind or not (folder / described).exists() or not file.exists():
        return dict(values)
    run, own = _sections_of(file), sections["data"]
    data = run["data"]
    if own.get("path", data.get("path")) != data.get("path"):
        run["data"] = {key: value for key, value in data.items() if key in OF_TEXTS}
    if not quiet:
        _print_differences(run, sections, file)
    return merge(values, merge(run, sections))


def _print_differences(run: Values, own: Values, file: Any) -> None:
    """Prints the settings that are taken from a run and differ from the defaults."""
    defaults = {"data": to_dict(DataSettings()), "tokenizer": to_dict(TokenizerSettings())}
    shown = [
        f"{section}.{key} {x!r}"
        for section in run
        for key, x in run[section].items()
        if key not in own[section] and x != defaults[section][key]
    ]
    if shown:
        print(f"settings of {file}: {', '.join(shown)}", file=sys.stderr)


def _sections_of(file: Any) -> Values:
    """The sections `data` and `tokenizer` of a run, without settings that are not inherited."""
    try:
        content = parsed_yaml(file.read_text())
        if "kind" in content:  # of an evaluation, not of a run
            return {"data": {}, "tokenizer": {}}
        names = {field.name for field in dataclasses.fields(DataSettings)}
        tokenizer = content.get("tokenizer", {})
        return {
            "data": {key: value for key, value in content["data"].items() if key in names},
            "tokenizer": {k: x for k, x in tokenizer.items() if k == "chat_template_kwargs"},
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{file}, which has the settings of the model's run, cannot be read ({reason}); "
            "mend it, or copy the model's folder elsewhere."
        ) from None
