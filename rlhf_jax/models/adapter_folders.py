"""Adapters of a model by settings, and saved in PEFT's format."""

import dataclasses
import logging
import pathlib
from typing import Any

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.models.adapter_settings import LoraSettings
from rlhf_jax.models.adapters import Adapters, adapters_of
from rlhf_jax.models.huggingface import language_model_slots
from rlhf_jax.models.interface import Params
from rlhf_jax.models.peft import write_adapter
from rlhf_jax.models.peft_config import (
    CONFIG,
    config_of_settings,
    read_adapter_config,
    resolve_adapters,
)
from rlhf_jax.parallel import hosts

logger = logging.getLogger("rlhf_jax.models")


def with_settings(model: Any, settings: LoraSettings) -> Any:
    """The model with fresh adapters by the section `lora`, or with its own on a base of that type.

    Parameters are as before. Without `r` a model without adapters is returned as it is.

    Raises:
      InputError: the settings name a layer or a module that the model does not have.
    """
    if (own := adapters_of(model)) is not None:
        if own.use_dora and settings.base == "int8":
            raise InputError(
                "lora.base is int8, whose kernels have no exact norms for the DoRA of the adapter; "
                "set it to bfloat16."
            )
        return dataclasses.replace(model, adapters=dataclasses.replace(own, base=settings.base))
    if settings.r is None:
        return model
    count = model.config.n_layer
    if outside := set(settings.layers_to_transform) - set(range(count)):
        raise InputError(
            f"lora.layers_to_transform names {min(outside)}, but the model has the layers 0 to "
            f"{count - 1}."
        )
    adapters = resolve_adapters(
        config_of_settings(settings),
        model,
        language_model_slots(model),
        "lora",
        is_pissa=settings.init == "pissa",
        base=settings.base,
        is_fresh=True,
    )
    return dataclasses.replace(model, adapters=adapters)


def adapters_in(folder: str | pathlib.Path, model: Any) -> Adapters:
    """The adapters of a model by the configuration in a folder; an InputError as `read_adapter`."""
    folder = pathlib.Path(folder).expanduser()
    config = read_adapter_config(folder)
    return resolve_adapters(config, model, language_model_slots(model), str(folder / CONFIG))


def save_adapter(
    folder: str | pathlib.Path,
    model: Any,
    params: Params,
    *,
    base_path: str | None = None,
) -> None:
    """Writes the adapters of a model in PEFT's format, for its base; all hosts have to call it.

    PiSSA's are written for the unchanged base, as PEFT converts them: of twice the rank. The bias
    of a reward head, which PEFT's `score` has not, is left out, of which a warning is logged.

    Args:
      folder: a local folder of the first host; created if it does not exist.
      model, params: as from `load_pretrained` with an adapter, or from training; or parameters
        {"model": ..., "head": ...} of a reward model.
      base_path: the folder or hub name of the base, which PEFT opens.

    Raises:
      ValueError: the model has no adapters.
      OSError: the folder cannot be written.
    """
    adapters = adapters_of(model)
    if adapters is None:
        raise ValueError("the model has no adapters.")
    slots = language_model_slots(model)
    kernels = [slot for slot in slots.values() if slot.path[-1] == "kernel"]
    config: dict[str, Any] = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_path}
    config["fan_in_fan_out"] = not kernels[0].transposed  # the base's are [in, out], as of Conv1D
    tensors = {}
    if "head" in params:
        kernel = np.asarray(hosts.to_host(params["head"]["kernel"]), np.float32)
        tensors = {"score.weight": kernel[None]}
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        if bias := float(params["head"].get("bias", 0.0)):
            logger.warning("The scores of %s are less by %.6g, the bias of the head.", folder, bias)
        params = params["model"]
    write_adapter(folder, adapters, slots, params, config, tensors)
