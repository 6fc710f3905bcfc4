"""The rooms of the package: who may import whom, what stays light, and what the texts promise."""

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlhf_jax import functional

ROOT = Path(__file__).resolve().parents[1]

# A room imports itself and the rooms before it. `data` and `rollout` stand beside each other.
ROOMS = (
    "functional",
    "batches",
    "parallel",
    "models",
    "rewards",
    "data",
    "rollout",
    "training",
    "runtime",
    "scripts",
)
EVERYWHERE = {"errors", "lazy", "backend", "checks", "preference_kinds"}
# The same inside of `runtime`, by the name after it.
RUNTIME_ROOMS = (
    "yaml_files",
    "parsing",
    "run",
    "help",
    "inherit",
    "config",
    "program",
    "loading",
    "rewards",
    "evaluation",
    "sampling",
    "report",
    "stages",
    "compilation",
    "commands",
)
# Settings of rooms of the runtime: they import no room, and any may import them.
SETTINGS = ("run.settings", "evaluation.settings", "rewards.sources")

# What a room may import from other distributions; data, runtime and scripts import what they need.
ARRAYS = {"jax", "numpy", "chex"}
THIRD_PARTY = {
    "__init__": {"jax", "chex"},
    "errors": set(),
    "backend": {"jax"},
    "checks": set(),
    "lazy": set(),
    "preference_kinds": set(),
    "functional": {"jax", "chex"},
    "batches": {"jax"},  # for types alone
    "models": ARRAYS | {"flax", "safetensors"},
    "parallel": ARRAYS,
    "rewards": {"math_verify"},
    "rollout": ARRAYS,
    "training": ARRAYS | {"optax"},
}
# The hub is queried only for a model that is no local folder, and imported only then.
LATE = {"rlhf_jax/models/folders.py": {"huggingface_hub"}}

SOURCES = sorted([*ROOT.glob("rlhf_jax/**/*.py"), *ROOT.glob("scripts/**/*.py")])
OTHERS = ("tools", "tests", "docs/examples")
ALL_PYTHON = [*SOURCES, *(path for name in OTHERS for path in sorted(ROOT.glob(f"{name}/**/*.py")))]


def path_name(path):
    return str(path.relative_to(ROOT))


def room_of(module):
    """'functional' for rlhf_jax.functional.kl, '__init__' for rlhf_jax, 'scripts' for a script."""
    parts = module.split(".")
    if parts[0] == "rlhf_jax":
        return parts[1] if len(parts) > 1 else "__init__"
    return parts[0]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


@functools.cache
def imported_modules(path):
    """Full names of all that the file imports, at the top or inside functions."""
    return [*_imported_modules(path)]


def _imported_modules(path):
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from rlhf_jax import functional` imports a room, not a name of the package.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def ours(modules):
    return [name for name in modules if name.split(".")[0] in ("rlhf_jax", "scripts")]


@pytest.mark.parametrize("path", SOURCES, ids=path_name)
def test_imports_go_to_earlier_rooms_only(path):
    room = room_of(module_name(path))
    if room in EVERYWHERE:
        allowed = EVERYWHERE
    elif room == "__init__":
        allowed = {"functional"}
    else:
        allowed = EVERYWHERE | set(ROOMS[: ROOMS.index(room) + 1])
    wrong = [name for name in ours(imported_modules(path)) if room_of(name) not in allowed]
    assert not wrong, f"{path_name(path)} may import only {sorted(allowed)}, and imports {wrong}"


RUNTIME = "rlhf_jax.runtime."
RUNTIME_FILES = [
    path
    for path in sorted((ROOT / "rlhf_jax" / "runtime").glob("**/*.py"))
    if path.relative_to(ROOT).as_posix() != "rlhf_jax/runtime/__init__.py"  # which has all names
]


@pytest.mark.parametrize("path", RUNTIME_FILES, ids=path_name)
def test_rooms_of_the_runtime_import_earlier_ones_only(path):
    name = module_name(path).removeprefix(RUNTIME)
    room = name.partition(".")[0]
    names = [each.removeprefix(RUNTIME) for each in imported_modules(path) if RUNTIME in each]
    others = {each.partition(".")[0] for each in names if not each.startswith(SETTINGS)}
    allowed = () if name in SETTINGS else RUNTIME_ROOMS[: RUNTIME_ROOMS.index(room) + 1]
    wrong = (others & {*RUNTIME_ROOMS}) - {*allowed}
    assert not wrong, f"{path_name(path)} imports {sorted(wrong)}, which stand above {room}"


def test_the_page_on_the_architecture_has_each_file_and_folder_in_this_order():
    text = (ROOT / "docs" / "architecture.md").read_text().partition("\n## From the command")[0]
    cells = re.findall(r"^\| (`.*?) \|", text, re.M)
    listed = [name for cell in cells for name in re.findall(r"`([\w/.]+)`", cell)]
    named, count = [name.removesuffix("/").removesuffix(".py") for name in listed], len(EVERYWHERE)
    assert {*named[:count]} == EVERYWHERE
    rooms = [*ROOMS[: ROOMS.index("runtime")], *(f"runtime/{room}" for room in RUNTIME_ROOMS)]
    assert named[count:] == rooms
    here = {path.name for path in (ROOT / "rlhf_jax").glob("[!_]*")}
    assert here == {name.partition("/")[0] for name in listed}
    inside = {path.name for path in (ROOT / "rlhf_jax" / "runtime").glob("[!_]*")}
    assert inside == {name.split("/")[1] for name in listed if name.startswith("runtime/")}


def test_no_two_files_import_each_other():
    files = {module_name(path): path for path in SOURCES if "benchmark" not in path.parts}
    imports = {}
    for name, path in files.items():
        imported = {each for each in imported_modules(path) if each in files}
        imported |= {each.rpartition(".")[0] for each in imported_modules(path)} & {*files}
        imports[name] = imported - {name}
    pairs = {
        tuple(sorted((one, other)))
        for one, imported in imports.items()
        for other in imported
        if one in imports[other] and not _is_package_of(one, other)
    }
    assert not pairs


def _is_package_of(one, other):
    """A package names the modules inside it, lazily, and they are part of it."""
    return one.startswith(f"{other}.") or other.startswith(f"{one}.")


def test_folders_of_the_runtime_have_at_most_ten_files():
    for folder in (ROOT / "rlhf_jax" / "runtime").glob("**/"):
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 10, f"{path_name(folder)} has {len(files)} files"


def test_files_are_short():
    for path in ALL_PYTHON:
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path_name(path)} has {lines} lines"


def test_function_bodies_are_short():
    for path in ALL_PYTHON:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                size = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert size <= 60, f"{path_name(path)}: {node.name} has {size} lines"


def path_to_the_loss():
    """(file, names of its functions) in the lines of the table of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.partition("## From the command to the loss\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| `([\w/]+\.py)` \| (.+?) \|", section, re.M)
    return [(ROOT / "rlhf_jax" / file, re.findall(r"`(.+?)`", names)) for file, names in lines]


def test_seven_files_lead_from_the_command_to_the_loss_of_ppo():
    """One before each file imports it, or it is the trainer's; no other trainer is on the way."""
    reached = {"rlhf_jax.runtime.commands.main", "rlhf_jax.training.ppo"}
    for path, names in path_to_the_loss():
        nodes = [*ast.walk(tree_of(path))]
        defined = {getattr(node, "name", None) for node in nodes}
        assert {name.rpartition(".")[2] for name in names} <= defined, path_name(path)
        is_reached = any(f"{name}.".startswith(f"{module_name(path)}.") for name in reached)
        assert is_reached, f"no file before {path_name(path)} imports it"
        attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        used = attributes & {*functional.__all__}
        reached |= {*imported_modules(path)} | {getattr(functional, x).__module__ for x in used}
    files = [path for path, _ in path_to_the_loss()]
    assert len(files) == len({*files}) == 7
    others = re.compile(r"rlhf_jax\.training\.(grpo|rloo|dynamic_sampling|online_dpo|dpo|kto)")
    for path in files:
        wrong = [name for name in imported_modules(path) if others.match(name)]
        assert not wrong, f"{path_name(path)} imports {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=path_name)
def test_light_rooms_import_light_packages_only(path):
    room = room_of(module_name(path))
    if room not in THIRD_PARTY:
        return
    late = LATE.get(path_name(path), set())
    allowed = sys.stdlib_module_names | THIRD_PARTY[room] | late | {"rlhf_jax"}
    wrong = {name.split(".")[0] for name in imported_modules(path)} - allowed
    assert not wrong, f"{path_name(path)} imports {sorted(wrong)}"


def test_a_measured_process_imports_no_more_than_its_step_needs():
    """What it imports counts in its peak of memory; the process of TRL imports no JAX."""
    worker = ROOT / "scripts" / "benchmark" / "trl_worker.py"
    imported = {name.split(".")[0] for name in imported_modules(worker)}
    assert not imported & {"rlhf_jax", "jax", "scripts"}
    code = "import sys, scripts.benchmark.ours; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert not {name.split(".")[0] for name in loaded} & {"datasets", "orbax", "transformers"}
    names_of_kinds = {f"rlhf_jax.data.{name}" for name in ("chat", "examples", "formats")}
    data = {name for name in loaded if name.startswith("rlhf_jax.data.")}
    assert data <= names_of_kinds


@pytest.mark.parametrize("room", ["rollout", "training"])
def test_steps_know_a_model_by_its_interface_only(room):
    families = ("rlhf_jax.models.gpt2", "rlhf_jax.models.huggingface", "rlhf_jax.models.family")
    for path in sorted((ROOT / "rlhf_jax" / room).glob("**/*.py")):
        wrong = [name for name in imported_modules(path) if name.startswith(families)]
        assert not wrong, f"{path_name(path)} imports {wrong}"


def test_the_import_test_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "rlhf_jax" / "functional" / "kl.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b\n"
        "from rlhf_jax import data\n"
        "from . import masking\n"
        "from .logprobs import x\n"
        "from ..runtime import config\n"
        "def f():\n    from c import d\n"
    )
    assert set(imported_modules(path)) == {
        "a.b",
        "rlhf_jax.data",
        "rlhf_jax.functional.masking",
        "rlhf_jax.functional.logprobs.x",
        "rlhf_jax.runtime.config",
        "c.d",
    }


IMPORT = """
import sys
before = set(sys.modules)
import {modules}
tops = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(tops - sys.stdlib_module_names - {{"__main__", "rlhf_jax"}}))
"""

USE = """
import sys, jax
modules, settings = set(sys.modules), dict(jax.config.values)
import rlhf_jax
rlhf_jax.gae
tops = [{name.partition(".")[0] for name in each} for each in (sys.modules, modules)]
print(*sorted(tops[0] - tops[1] - sys.stdlib_module_names))
print(*sorted(name for name in sys.modules if name.startswith("rlhf_jax.")))
print(*sorted(name for name, value in jax.config.values.items() if settings[name] != value))
"""


def printed_lines(code):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("modules", "light"),
    [
        ("rlhf_jax, rlhf_jax.batches, rlhf_jax.data, rlhf_jax.data.settings", set()),
        ("rlhf_jax.data.kinds, rlhf_jax.data.batching, rlhf_jax.data.tokenizers", {"numpy"}),
    ],
)
def test_what_needs_no_jax_does_not_import_it(modules, light):
    (others,) = printed_lines(IMPORT.format(modules=modules))
    assert set(others.split()) <= light


def test_functions_of_rlhf_jax_import_light_packages_and_change_no_setting_of_jax():
    others, ours, settings = printed_lines(USE)
    assert set(others.split()) <= {"absl", "chex", "rlhf_jax", "toolz", "typing_extensions"}
    light = ("rlhf_jax.functional", "rlhf_jax.backend", "rlhf_jax.preference_kinds")
    assert all(name.startswith(light) for name in ours.split())
    assert settings == ""


def lower_bounds(project):
    optional = project["optional-dependencies"]
    for line in [*project["dependencies"], *optional["train"], *optional["test"]]:
        name, bound = line.split(">=")
        yield re.sub(r"\[.*\]", "", name).lower(), bound


def test_the_oldest_versions_tested_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "tools" / "constraints-oldest.txt").read_text()
    tested = {name.lower(): version for name, version in re.findall(r"^(\S+)==(\S+)$", text, re.M)}
    tested.pop("jaxlib")  # goes with jax
    assert tested == dict(lower_bounds(project))


PAGES = sorted(path_name(path) for path in (ROOT / "docs").glob("**/*.md"))
TEXTS = ["README.md", "CONTRIBUTING.md", *PAGES]


@pytest.mark.parametrize("name", [*TEXTS, "Makefile"])
def test_files_named_in_the_texts_exist(name):
    text = re.sub(r"https?://\S+", "", (ROOT / name).read_text())
    named = set(re.findall(r"\b(?:scripts|configs|docs|tools|tests|rlhf_jax)/[\w/.-]*\w", text))
    # What `make docs` makes is not there in a new clone.
    missing = sorted(
        path for path in named if not (ROOT / path).exists() and not path.startswith("docs/_build")
    )
    assert not missing, f"{name} names {missing}"


@pytest.mark.parametrize("name", TEXTS)
def test_make_targets_named_in_the_texts_exist(name):
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    text = re.sub(r"https?://\S+", "", (ROOT / name).read_text())
    named = set(re.findall(r"(?:^|`)make\s([a-z][a-z-]*)", text, re.M))
    assert named <= targets, f"{name} names make {sorted(named - targets)}"


@pytest.mark.parametrize("name", TEXTS)
def test_python_in_the_texts_runs(name):
    names: dict = {}  # a page is read from top to bottom: a block may use what stands above it
    for block in re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S):
        exec(compile(block, name, "exec"), names)


def test_the_readme_names_each_function():
    named = set(re.findall(r"`(\w+)`", (ROOT / "README.md").read_text()))
    assert not set(functional.__all__) - named


def test_importing_the_tests_leaves_xla_its_flags(xla_flags_at_start):
    """Where all tests run, programs for eight devices are imported: all would start with eight."""
    assert os.environ.get("XLA_FLAGS") == xla_flags_at_start
