"""Model folders on disk, local or downloaded, and the files that they have to hold."""

import json
import pathlib
import re
from typing import Any

from rlhf_jax.errors import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def find_folder(name: str | pathlib.Path) -> pathlib.Path:
    """A local folder as it is, or the folder to which a model of the hub is downloaded.

    Raises:
      InputError: there is neither.
    """
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{name} is a file; give the folder of the model, or its name on the hub.")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name)):
        raise InputError(f"There is no folder {name}; give one, or the name of a model on the hub.")
    return _download(str(name))


def _download(name: str) -> pathlib.Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"There is no folder {name}, and fetching it from the hub needs huggingface_hub: "
            "pip install huggingface_hub, or give a local folder."
        ) from error
    files = ["config.json", "generation_config.json", "model*.safetensors", INDEX]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:  # no network, no such model, no access
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"There is no folder {name}, and no such model could be fetched from the hub "
            f"({type(error).__name__}: {reason}); check the name and the network."
        ) from error


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a folder: one, or those that its index names.

    Raises:
      InputError: there are none, or some of them are missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{folder / INDEX} has no weight_map; save or download it again.")
        files = [folder / name for name in sorted({str(name) for name in weight_map.values()})]
        for file in files:
            if file.parent != folder or file.suffix != ".safetensors":
                raise InputError(
                    f"{folder / INDEX} names {str(file)!r}, but weights are safetensors files in "
                    "the folder itself; download it again."
                )
            if not file.is_file():
                raise InputError(
                    f"{folder} lacks {file.name}, which its {INDEX} names; download it again."
                )
        return files
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{folder} holds its weights as pytorch_model.bin only, which needs PyTorch to be "
            "read; convert it where torch and transformers are installed: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)."
        )
    raise InputError(
        f"{folder} holds neither {WEIGHTS} nor {INDEX}; save the model as safetensors."
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file of a model's folder.

    Raises:
      InputError: there is no such file, or no object in it.
    """
    if not path.is_file():
        raise InputError(f"{path.parent} holds no {path.name}; give the folder of a saved model.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); save or download it again.") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object; save or download it again.")
    return data
