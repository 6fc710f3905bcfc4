"""`report.html`: the results of a run, or of several side by side, on one self-contained page.

The page is written from the files of the run folder alone (`metrics.jsonl`, `samples.jsonl`,
`config.yaml`, `evaluation.json`), so that it can be written again at any time, also for a run that
was interrupted. Missing files are named on the page. The page loads nothing: its
Content-Security-Policy forbids it, and forbids every script but its own, whatever a sampled text
contains.
"""

import base64
import contextlib
import hashlib
import importlib.metadata
import importlib.resources
import os
import platform
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe
from etils import epath

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.report.comparison import (
    differing_settings,
    headline_table,
    run_names,
    steps_of,
)
from rlhf_jax.runtime.report.header import Fact, facts_of_run, linked_files, utc
from rlhf_jax.runtime.report.plots import best_of_charts, pair_charts
from rlhf_jax.runtime.report.samples import evaluation_samples
from rlhf_jax.runtime.report.stages import compared_stages, read_log, stage_folders, stage_of
from rlhf_jax.runtime.report.tables import evaluation_table, read_evaluation
from rlhf_jax.runtime.report.values import file_text
from rlhf_jax.runtime.run.folder import disk_errors, replace_file

PACKAGES = (
    "rlhf-jax", "jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint",
    "numpy", "transformers", "tokenizers", "datasets",
)  # fmt: skip


def write_report(run_dir: str | os.PathLike[str], remedy: str = "") -> epath.Path:
    """Writes `run_dir/report.html` and returns its path.

    An error of the disk names `remedy`, see `disk_errors`.

    `run_dir` is the folder of one stage, or that of `run_rlhf` with the folders of its stages in
    it, named as their trainers, and optionally holds an `evaluation.json`; or it is that of
    `evaluate` and holds nothing else but a `config.yaml`:

        {"metrics": {name: number},
         "table": [{"metric": name, "before": number | null, "after": number | null,
                    "interval": [low, high] of "after", optional}],
         "samples": [{"prompt", "before", "after": text, "before_gold", "after_gold",
                      "before_score", "after_score", "kl": number}],
                     or of one policy [{"prompt", "response": text, "gold", "score": number}],
         "pairs": {"calibration", "lengths": [{name: number}]},      as from `pair_evaluation`
         "best_of": [{"n", "kl", "scores", "gold": number}]}

    Every part is optional; numbers that JSON lacks are the strings "NaN", "Infinity", "-Infinity".

    Raises:
      InputError: there is no such folder, or it cannot be written.
    """
    folder, notes = _run_folder(run_dir), list[str]()
    evaluation = read_evaluation(folder / "evaluation.json", notes)
    table = evaluation_table(evaluation)
    logs, stages = [read_log(*place, notes) for place in stage_folders(folder)], []
    for log in logs:
        key, own, own_table = "run", evaluation, []
        if log.folder != folder:
            key, own = log.trainer.name, read_evaluation(log.folder / "evaluation.json", notes)
            own_table = evaluation_table(own)
        stages.append(stage_of(log, key, own, own_table if own_table != table else [], notes))
    samples = evaluation.get("samples", [])
    of_two = len(table[0]) > 2 if table else not any("response" in entry for entry in samples)
    page = _render(
        title=folder.name,
        facts=facts_of_run(folder, logs),
        notes=notes,
        tiles=[tile for stage in stages for tile in stage.tiles],
        tradeoff=next((stage.tradeoff for stage in stages if stage.tradeoff), None),
        curves=(*best_of_charts(evaluation), *(() if stages else pair_charts(evaluation))),
        tables={"Before and after" if of_two else "Evaluation": table} if table else {},
        samples=evaluation_samples(samples),
        samples_title="Samples before and after" if of_two else "Samples",
        samples_total=len(samples),
        stages=stages,
        configs=_configs(folder, [log.folder for log in logs]),
    )
    with disk_errors(folder, remedy):
        return _write(folder / "report.html", page)


def write_comparison(
    run_dirs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> epath.Path:
    """Writes a page with the curves of several runs together, and returns its path.

    It has a table of their last headline metrics, and one of the settings that differ.

    Raises:
      InputError: a folder is missing or given twice, or the page cannot be written.
    """
    folders, path, notes = [_run_folder(each) for each in run_dirs], epath.Path(output), list[str]()
    names = run_names(folders)
    places = dict(zip(names, folders, strict=True))
    runs = {
        name: [read_log(*place, notes) for place in stage_folders(folder)]
        for name, folder in places.items()
    }
    facts = [
        Fact(name, steps_of(runs[name]), linked_files(folder, path.parent))
        for name, folder in places.items()
    ]
    settings = differing_settings(places, notes)
    page = _render(
        title=f"{len(folders)} runs",
        facts=[*facts, Fact("page written", utc())],
        notes=notes,
        tables={"Metrics": headline_table(runs), "Settings that differ": settings},
        stages=compared_stages(runs),
    )
    with disk_errors(path, "give --output a file that can be written"):
        return _write(path, page)


def _run_folder(run_dir: str | os.PathLike[str]) -> epath.Path:
    folder = epath.Path(run_dir)
    if not folder.is_dir():
        raise InputError(f"there is no run folder {run_dir}; give the --run_dir of a run")
    return folder


def _write(path: epath.Path, page: str) -> epath.Path:
    replace_file(path, page.encode("utf-8", "replace"))
    return path


def _render(**content: Any) -> str:
    """The page; parts that are not in `content` are left out."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["csp_hash"] = csp_hash
    source = importlib.resources.files("rlhf_jax.runtime.report")
    parts: dict[str, Any] = dict.fromkeys(("tiles", "curves", "samples"), ())
    parts |= {"tradeoff": None, "configs": None, "versions": _versions()}
    for name, file in (("script", "report.js"), ("style", "report.css")):
        parts[name] = markupsafe.Markup(source.joinpath(file).read_text("utf-8"))
    template = environment.from_string(source.joinpath("report.html.j2").read_text("utf-8"))
    return template.render(parts | content)


def _configs(folder: epath.Path, stages: Sequence[epath.Path]) -> list[tuple[str, str]]:
    """(name, text) of the run's `config.yaml`, or without one, of those of its stages."""
    folders = [folder] if (folder / "config.yaml").exists() else stages
    paths = [each / "config.yaml" for each in folders]
    return [(f"{path.parent.name}/{path.name}", file_text(path)) for path in paths if path.exists()]


def _versions() -> list[tuple[str, str]]:
    """Python, the platform, and the installed packages that a result may depend on."""
    versions = [("python", platform.python_version()), ("platform", platform.platform(terse=True))]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append((package, importlib.metadata.version(package)))
    return versions


def csp_hash(script: str) -> str:
    """The expression by which a Content-Security-Policy allows exactly this inline script."""
    digest = hashlib.sha256(str(script).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
