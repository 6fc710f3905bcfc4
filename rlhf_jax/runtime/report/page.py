"""`report.html`: the results of a run on one self-contained page.

The page is written from the files of the run folder alone (`metrics.jsonl`, `samples.jsonl`,
`config.yaml`, `evaluation.json`), so that it can be written again at any time, also for a run that
was interrupted. Missing files are named on the page. The page loads nothing: its
Content-Security-Policy forbids it, and forbids every script but its own, whatever a sampled text
contains.
"""

import base64
import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.resources
import os
import platform
from collections.abc import Sequence

import jinja2
from etils import epath

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.report import content
from rlhf_jax.runtime.report.plots import best_of_charts, pair_charts
from rlhf_jax.runtime.run.folder import disk_errors, replace_file

PACKAGES = (
    "rlhf-jax", "jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint",
    "numpy", "transformers", "tokenizers", "datasets",
)  # fmt: skip


def write_report(run_dir: str | os.PathLike[str]) -> epath.Path:
    """Writes `run_dir/report.html` and returns its path.

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
    folder = epath.Path(run_dir)
    if not folder.is_dir():
        raise InputError(f"there is no run folder {run_dir}; give the --run_dir of a run")
    notes: list[str] = []
    places = content.stage_folders(folder)
    evaluations = {
        each: content.read_evaluation(each / "evaluation.json", notes)
        for each in (folder, *(place for _, place in places))
    }
    stages = [content.read_stage(*place, evaluations[place[1]], notes) for place in places]
    evaluation = evaluations[folder]
    table, samples = evaluation.get("table", []), evaluation.get("samples", [])
    page = _template().render(
        title=folder.name,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        notes=notes,
        tiles=[tile for stage in stages for tile in stage.tiles],
        tradeoff=next((stage.tradeoff for stage in stages if stage.tradeoff), None),
        curves=(*best_of_charts(evaluation), *(() if stages else pair_charts(evaluation))),
        table=content.table_cells(table) if table else [],
        table_title="Evaluation" if content.is_of_one(table) else "Before and after",
        metrics=content.metric_cells(evaluation),
        samples=[content.evaluation_sample(entry) for entry in samples[: content.MAX_SAMPLES]],
        samples_title="Samples before and after" if content.are_of_two(samples) else "Samples",
        samples_total=len(samples),
        stages=stages,
        configs=_configs(folder, [place for _, place in places]),
        versions=_versions(),
    )
    path = folder / "report.html"
    with disk_errors(folder):
        replace_file(path, page.encode("utf-8", "replace"))
    return path


def _configs(folder: epath.Path, stages: Sequence[epath.Path]) -> list[tuple[str, str]]:
    """(name, text) of the run's `config.yaml`, or without one, of those of its stages."""
    folders = [folder] if (folder / "config.yaml").exists() else stages
    paths = [each / "config.yaml" for each in folders]
    return [
        (f"{path.parent.name}/{path.name}", path.read_text()) for path in paths if path.exists()
    ]


def _versions() -> list[tuple[str, str]]:
    """Python, the platform, and the installed packages that a result may depend on."""
    versions = [("python", platform.python_version()), ("platform", platform.platform(terse=True))]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append((package, importlib.metadata.version(package)))
    return versions


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["csp_hash"] = csp_hash
    source = importlib.resources.files("rlhf_jax.runtime.report").joinpath("report.html.j2")
    return environment.from_string(source.read_text("utf-8"))


def csp_hash(script: str) -> str:
    """The expression by which a Content-Security-Policy allows exactly this inline script."""
    digest = hashlib.sha256(str(script).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
