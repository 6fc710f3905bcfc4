"""Data settings of `generate` and `evaluate` from the run whose model they open."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.parsing import Values, merge, to_dict
from rlhf_jax.runtime.yaml_files import parsed_yaml

# How texts become tokens; the other settings say where the examples are, and how many.
OF_TEXTS = (
    "max_length", "max_prompt_length", "max_response_length", "completion_only", "packing",
    "prompt_tokens", "split_at", "prompt_suffix", "min_response_words",
)  # fmt: skip


def with_data_of_run(values: Mapping[str, Any], name: str, *, quiet: bool = False) -> Values:
    """The values over the section `data` of the run that exported a model, if there is one.

    That run's `config.yaml` stands beside the folder `hf/` that `model.NAME` is. With another
    `data.path` only the settings in `OF_TEXTS` are those of the run. Unless `quiet`, those that are
    not the defaults are printed to standard error.

    Raises:
      InputError: the run's `config.yaml` cannot be read.
    """
    from etils import epath  # here, so that --help does without it

    model, own = values.get("model"), values.get("data", {})
    path = model.get(name) if isinstance(model, Mapping) else None
    if not isinstance(path, str) or not isinstance(own, Mapping):
        return dict(values)
    folder = epath.Path(path)
    file = folder.parent / "config.yaml"
    if folder.name != "hf" or not (folder / "config.json").exists() or not file.exists():
        return dict(values)
    data = _data_of(file)
    if own.get("path", data.get("path")) != data.get("path"):
        data = {key: value for key, value in data.items() if key in OF_TEXTS}
    defaults = to_dict(DataSettings())
    shown = [f"{key} {x!r}" for key, x in data.items() if key not in own and x != defaults[key]]
    if shown and not quiet:
        print(f"data settings of {file}: {', '.join(shown)}", file=sys.stderr)
    return merge(values, {"data": merge(data, own)})


def _data_of(file: Any) -> Values:
    """The section `data` of a run; without settings that are not known any more."""
    try:
        content = parsed_yaml(file.read_text())
        if "kind" in content:  # of an evaluation, not of a run
            return {}
        names = {field.name for field in dataclasses.fields(DataSettings)}
        return {key: value for key, value in content["data"].items() if key in names}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{file}, which has the data settings of the model's run, cannot be read ({reason}); "
            "mend it, or copy the model's folder elsewhere."
        ) from None
