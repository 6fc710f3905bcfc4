"""Several runs side by side: their names, their results, and the settings that differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.parsing import flat
from rlhf_jax.runtime.report.stages import Log, tiles
from rlhf_jax.runtime.report.tables import Cells
from rlhf_jax.runtime.report.values import text
from rlhf_jax.runtime.yaml_files import parsed_yaml


def run_names(folders: Sequence[epath.Path]) -> list[str]:
    """The last parts of the paths of the folders, as many as make them different: "ppo/kl02".

    Raises:
      InputError: a folder is given twice.

    >>> run_names([epath.Path("a/x/run"), epath.Path("a/y/run")])
    ['x/run', 'y/run']
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError("one of the run folders is given twice; give each once")


def steps_of(logs: Sequence[Log]) -> str:
    """Steps and time of the stages of a run."""
    several = len(logs) > 1
    return ", ".join(
        f"{log.trainer.label} {log.summary}" if several else log.summary for log in logs
    )


def headline_table(runs: Mapping[str, Sequence[Log]]) -> Cells:
    """The last headline metrics of each run; a missing one is "–"."""
    values = [
        {tile.label: tile.value for log in logs for tile in tiles(log)} for logs in runs.values()
    ]
    labels = dict.fromkeys(label for each in values for label in each)
    lines = [(label, *(each.get(label, "–") for each in values)) for label in labels]
    return [("metric", *runs), *lines]


def differing_settings(folders: Mapping[str, epath.Path], notes: list[str]) -> Cells:
    """The settings of which not all runs have the same value; a missing one is "–"."""
    settings = [flat(_config(folder, notes)) for folder in folders.values()]
    keys = dict.fromkeys(key for each in settings for key in each if key != "run_dir")
    lines = [(key, *(text(each[key]) if key in each else "–" for each in settings)) for key in keys]
    return [("setting", *folders), *(line for line in lines if len(set(line[1:])) > 1)]


def _config(folder: epath.Path, notes: list[str]) -> Any:
    file = folder / "config.yaml"
    try:
        return parsed_yaml(file.read_text())
    except (OSError, ValueError) as error:
        notes.append(f"{folder.name}/config.yaml cannot be read: {' '.join(str(error).split())}.")
        return {}
