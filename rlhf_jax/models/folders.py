"""Model folders on disk: found or downloaded, and written so that a cut leaves no half file."""

import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.models.reading import INDEX, WEIGHTS
from rlhf_jax.models.writing import write_json


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
    files = ["config.json", "model*.safetensors", INDEX]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:  # no network, no such model, no access
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"There is no folder {name}, and no such model could be fetched from the hub "
            f"({type(error).__name__}: {reason}); check the name and the network."
        ) from error


def write_folder(
    folder: str | pathlib.Path,
    texts: Mapping[str, Any],
    tokenizer: Any,
    write_weights: Callable[[pathlib.Path], None],
) -> None:
    """Writes JSON files, a tokenizer and the weights, and moves them into the folder.

    Args:
      texts: name of a JSON file -> its object.
      tokenizer: anything with `save_pretrained(folder)`, or None.
      write_weights: writes the weights to a temporary folder.

    Raises:
      InputError: the folder is not local.
      OSError: it cannot be written.
    """
    if "://" in str(folder):
        raise InputError(f"Models are saved to local folders, but {folder} is an address.")
    folder = pathlib.Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        temporary = pathlib.Path(name)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        for file, data in texts.items():
            write_json(temporary / file, data)
        write_weights(temporary)
        _publish(temporary, folder)


def _publish(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    """Moves files from one folder into the other, and deletes weights of an earlier save.

    Weights come last, their index after them: a save that is cut short leaves the old weights
    complete, or none that can be loaded.
    """
    files = [path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()]
    written = {file.name for file in files} - {INDEX}
    for pattern in (INDEX, WEIGHTS, "model-*-of-*.safetensors", "generation_config.json"):
        for path in folder.glob(pattern):
            if path.name not in written:
                path.unlink()
    for file in sorted(files, key=lambda f: (f.name == INDEX, f.suffix == ".safetensors", f)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (temporary / file).replace(folder / file)
