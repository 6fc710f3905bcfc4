"""The pages of docs/: all public names, all pages in the tree, and links that lead somewhere."""

import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_jax
from rlhf_jax import training

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(path for path in DOCS.glob("**/*.md") if "_build" not in path.parts)


def page_name(path):
    return path.relative_to(DOCS).with_suffix("").as_posix()


@pytest.fixture
def public_names(monkeypatch):
    """docs/_ext/public_names.py, which lists the names of each directive of the reference."""
    monkeypatch.syspath_prepend(DOCS / "_ext")
    return importlib.import_module("public_names")


def reference_text():
    return "".join(path.read_text() for path in PAGES if path.parent.name == "reference")


def directives(name):
    """Arguments of a directive on all pages of the reference."""
    lines = re.findall(rf"^```{{{name}}} (.+)$", reference_text(), re.M)
    return [argument for line in lines for argument in line.split()]


def entries(public_names):
    """(module, name) of each entry of the reference."""
    assert re.findall(r"^```{(trainers|families)}$", reference_text(), re.M) == [
        "families",
        "trainers",
    ]
    modules = [*directives("public"), *public_names.family_files()]
    listed = [entry for each in modules for entry in public_names.documented_names(each)]
    return [*listed, *(e for each in training.TRAINERS for e in public_names.trainer_names(each))]


def test_each_name_of_rlhf_jax_is_in_the_reference_once(public_names):
    listed = [name for module, name in entries(public_names) if module == "rlhf_jax.functional"]
    assert sorted(listed) == sorted(set(rlhf_jax.__all__) - {"__version__", "functional"})


def test_each_file_of_functional_is_in_the_overview(public_names):
    files = directives("overview")
    assert len(files) == len(set(files))
    assert set(public_names.functional_files()) <= set(files)


def defined_names(module):
    """Functions and classes that a module defines and does not hide behind an underscore."""
    return {
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }


def modules_of(package):
    package = importlib.import_module(package)
    prefix = f"{package.__name__}."
    return [
        importlib.import_module(each.name)
        for each in pkgutil.iter_modules(package.__path__, prefix)
    ]


@pytest.mark.parametrize("package", ["rlhf_jax.models", "rlhf_jax.rollout", "rlhf_jax.training"])
def test_each_name_of_models_rollout_and_training_is_in_the_reference(package, public_names):
    documented = {
        getattr(importlib.import_module(module), name) for module, name in entries(public_names)
    }
    for module in modules_of(package):
        missing = {
            name for name in defined_names(module) if getattr(module, name) not in documented
        }
        assert not missing, f"{module.__name__}: {sorted(missing)}"


@pytest.mark.parametrize("name", ["rlhf_jax.batches", "rlhf_jax.errors"])
def test_each_name_of_a_single_file_is_in_the_reference(name, public_names):
    listed = {entry for module, entry in entries(public_names) if module == name}
    assert listed == defined_names(importlib.import_module(name))


@pytest.mark.parametrize("name", ["rlhf_jax.data", "rlhf_jax.parallel", "rlhf_jax.runtime"])
def test_public_names_are_in_the_reference(name, public_names):
    listed = {entry for module, entry in entries(public_names) if module == name}
    assert listed == set(importlib.import_module(name).__all__)


def test_each_configuration_is_in_the_reference(public_names):
    config = importlib.import_module("rlhf_jax.runtime.config")
    classes = {name for name in defined_names(config) if inspect.isclass(getattr(config, name))}
    assert classes == {name for module, name in entries(public_names) if module == config.__name__}


def test_no_name_has_two_entries(public_names):
    listed = entries(public_names)
    assert len(listed) == len(set(listed))


ADDED = """
import public_names
from rlhf_jax import training
assert training.TRAINERS[-1].steps.__name__ == "rlhf_jax.training.reinforce"
print(public_names.trainer_table()[-1])
print(*(name for _, name in public_names.trainer_names(training.TRAINERS[-1])))
"""


def test_a_trainer_of_one_file_and_one_line_is_in_the_docs(tmp_path):
    """In a copy of the package: a line in the table of commands, and entries in the reference."""
    shutil.copytree(DOCS.parent / "rlhf_jax", tmp_path / "rlhf_jax")
    shutil.copytree(DOCS / "_ext", tmp_path / "docs" / "_ext")
    folder = tmp_path / "rlhf_jax" / "training"
    shutil.copy(DOCS / "examples" / "reinforce.py", folder)
    package = folder / "__init__.py"
    last = '        "rloo_settings",\n'
    assert package.read_text().count(last) == 1
    package.write_text(package.read_text().replace(last, f'{last}        "reinforce",\n'))
    paths = f"{tmp_path}{os.pathsep}{tmp_path / 'docs' / '_ext'}"
    command = [sys.executable, "-c", ADDED]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    table, names = done.stdout.splitlines()
    settings = "{py:obj}`reinforce <rlhf_jax.training.reinforce.Settings>`"
    assert table == f"| `rlhf reinforce` | REINFORCE with a moving baseline | {settings} |"
    assert {"Settings", "State", "init_state", "make_update_step"} <= {*names.split()}


def test_each_trainer_has_a_page_and_a_line_that_links_to_it(public_names):
    names = [trainer.name for trainer in training.TRAINERS]
    assert public_names.trainer_pages() == [f"commands/{name}" for name in names]
    table = public_names.trainer_table()[2:]
    for trainer, line in zip(training.TRAINERS, table, strict=True):
        assert line.startswith(f"| [`rlhf {trainer.command}`]({trainer.name}.md) | ")
    assert "```{trainer_table}\n```" in (DOCS / "commands" / "index.md").read_text()


def test_each_page_is_in_the_tree_once(public_names):
    tree = r"^```{(?:toctree|command_tree)}\n(.*?)^```$"
    trees = [
        (path, line)
        for path in PAGES
        for block in re.findall(tree, path.read_text(), re.M | re.S)
        for entry in map(str.strip, block.splitlines())
        if entry and not entry.startswith(":")
        for line in (public_names.trainer_pages() if entry == "trainers" else [entry])
    ]
    listed = [page_name((path.parent / f"{entry}.md").resolve()) for path, entry in trees]
    assert sorted([*listed, "index"]) == [page_name(path) for path in PAGES]


def anchors(path):
    """The anchors of the headings of a page."""
    headings = re.findall(r"^#{1,3} (.*)$", path.read_text(), re.M)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_between_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(page), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_files_that_pages_include_exist(path):
    for name in re.findall(r"^```{literalinclude} (\S+)$", path.read_text(), re.M):
        assert (path.parent / name).is_file(), f"{path.name} includes {name}"


def test_each_example_is_on_a_page():
    included = {
        (path.parent / name).resolve()
        for path in PAGES
        for name in re.findall(r"^```{literalinclude} (\S+)$", path.read_text(), re.M)
    }
    assert included == set((DOCS / "examples").glob("*.py"))


def facts():
    """(number, text) of each fact on the page of facts."""
    text = (DOCS / "facts.md").read_text()
    return re.findall(r"^\*\*(\d+)\. (.*?)(?=^\*\*\d|^## |\Z)", text, re.M | re.S)


@pytest.mark.parametrize(("number", "text"), facts(), ids=[number for number, _ in facts()])
def test_each_fact_names_tests_that_exist(number, text):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert named or "*Not yet" in text
    for file, test in named:
        assert f"\ndef {test}(" in (DOCS.parent / file).read_text(), f"{file} has no {test}"


def test_the_facts_are_counted_through_and_their_tests_are_on_the_page():
    assert [int(number) for number, _ in facts()] == list(range(1, 48))
    for name in ("test_facts.py", "test_preference_golden.py"):
        source = (DOCS.parent / "tests" / "functional" / name).read_text()
        for test, number in re.findall(r"^def (test_(\d\d)_\w+)\(", source, re.M):
            assert f"::{test}`" in dict(facts())[str(int(number))], f"facts.md lacks {test}"


def test_metric_names_of_the_page_on_runs_are_those_of_the_code():
    sources = "".join(path.read_text() for path in (DOCS.parent / "rlhf_jax").glob("**/*.py"))
    text = (DOCS / "runs.md").read_text()
    named = set(re.findall(r"`((?:train|objective|policy|val|loss|eval|perf)/\w+)`", text))
    assert len(named) > 20
    # `train/...` and `eval/...` are put together from a stage's own names.
    missing = {name for name in named if f'"{name}"' not in sources and name not in sources}
    missing = {name for name in missing if f'"{name.partition("/")[2]}"' not in sources}
    assert not missing
