"""The header of the report: command, seed, version and time of a run, and links to its files."""

import datetime
import os
import re
import urllib.parse
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from rlhf_jax.runtime.report.stages import Log
from rlhf_jax.runtime.report.values import file_text
from rlhf_jax.runtime.run.folder import is_remote

FILES = (
    "report.html", "config.yaml", "metrics.jsonl", "samples.jsonl", "evaluation.json", "hf",
    "adapter", "checkpoints", "tensorboard",
)  # fmt: skip


class Fact(NamedTuple):
    """A line of the header: its name, its text, and links to files as (name, address)."""

    name: str
    text: str
    links: Sequence[tuple[str, str]] = ()


def facts_of_run(folder: epath.Path, logs: Sequence[Log]) -> list[Fact]:
    """Command, seed, version and start of a run, the length of its stages, and their files."""
    text = file_text(folder / "config.yaml")
    first = re.match(r"# rlhf-jax (\S+?)(?:: (.+))?\n", text)
    seed = re.search(r"^seed: *(\S+)", text, re.MULTILINE)
    version, command = first.groups("") if first else ("", "")
    starts = [log.start for log in logs if log.start is not None]
    alone = [log for log in logs if log.folder == folder]
    facts = [
        Fact("command", command),
        Fact("seed", seed[1] if seed else ""),
        Fact("rlhf-jax", version),
        Fact("started", utc(min(starts)) if starts else ""),
        *(Fact(log.trainer.title, log.summary) for log in alone),
        Fact("files", "", linked_files(folder, folder)),
        *(
            Fact(log.trainer.title, log.summary, linked_files(log.folder, folder))
            for log in logs
            if log not in alone
        ),
        Fact("page written", utc()),
    ]
    return [fact for fact in facts if fact.text or fact.links]


def utc(seconds: float | None = None) -> str:
    """A time, by default now, to the minute.

    >>> utc(86400.0)
    '1970-01-02 00:00 UTC'
    """
    now = datetime.datetime.now(datetime.UTC)
    time = now if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return time.strftime("%Y-%m-%d %H:%M UTC")


def linked_files(folder: epath.Path, start: epath.Path) -> list[tuple[str, str]]:
    """(name, address relative to `start`) of the known files of a run; [] in an object store."""
    if is_remote(folder) or is_remote(start):
        return []
    names = [name for name in FILES if (folder / name).exists()]
    if folder == start:
        names = [name for name in names if name != "report.html"]
    return [(name, urllib.parse.quote(os.path.relpath(folder / name, start))) for name in names]
