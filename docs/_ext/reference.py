"""A Sphinx extension for the reference: entries that follow the code, and docstrings as they are.

`{public}` with a module's name makes an entry of each of its public names, with `MODULE::NAME` of
that name alone, and `{overview}` with files of `rlhf_jax.functional` a table of their functions.
`{trainer_table}`, `{trainers}` and the line `trainers` of `{command_tree}` derive from `TRAINERS`,
and `{families}` from `FAMILIES`. It is a warning, and so an error of `make docs`, if a public name
has no entry, or if a page loads anything from the network.
"""

import collections
import dataclasses
import inspect
import re
from pathlib import Path
from typing import NamedTuple

from docutils import nodes
from docutils.parsers.rst.states import RSTStateMachine, state_classes
from docutils.statemachine import StringList
from docutils.utils import new_document
from public_names import (
    documented_names,
    family_files,
    functional_names,
    required_names,
    trainer_names,
    trainer_pages,
    trainer_table,
)
from sphinx.addnodes import pending_xref
from sphinx.directives.other import TocTree
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from rlhf_jax import functional, training

# The fields of a docstring, and an item of one: `names: text` or `names:`, indented by two.
FIELD_NAMES = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Raises": "Raises",
    "Returns": "Returns",
}
FIELD = re.compile(rf"^({'|'.join(FIELD_NAMES)}):$")
ITEM = re.compile(r"^  ([*\w]+(?:, [*\w]+)*): (.*)$")

LOGGER = logging.getLogger(__name__)

_counts = collections.Counter(name for _, name in required_names())
TARGETS = {name: f"{module}.{name}" for module, name in required_names() if _counts[name] == 1}

FieldOfTuple = type(NamedTuple("OneField", [("field", int)]).field)


class Public(SphinxDirective):
    """Entries for all public names of a module."""

    required_arguments = 1

    def run(self):
        return parse_rst(self, entries(documented_names(self.arguments[0])))


def entries(names):
    """Lines of reStructuredText with an entry of each (module, name)."""
    lines = []
    for module, name in names:
        is_class = inspect.isclass(getattr(__import__(module, fromlist=[name]), name))
        # Two colons, since `rlhf_jax.rollout.generate` is a module and a function in it.
        lines += [f".. auto{'class' if is_class else 'function'}:: {module}::{name}"]
        lines += ["   :members:", ""] if is_class else [""]
    return lines


def section(title, text, names):
    """Lines of a section: its title, a paragraph, and an entry of each (module, name)."""
    return [title, "-" * len(title), "", text, "", *entries(names)]


class Trainers(SphinxDirective):
    """A section for each trainer: its command, the module of its steps, and its public names."""

    def run(self):
        lines = []
        for trainer in training.TRAINERS:
            page = f"commands/{trainer.name}"
            command = f"``rlhf {trainer.command}``"
            if page in trainer_pages():
                command = f":doc:`rlhf {trainer.command} </{page}>`"
            text = f"{command}: {trainer.summary}. The steps are in ``{trainer.steps.__name__}``."
            lines += section(trainer.title, text, trainer_names(trainer))
        return parse_rst(self, lines)


class Families(SphinxDirective):
    """A section for each file of a model family, with its public names."""

    def run(self):
        files = [(f"``{file}``", "", documented_names(file)) for file in family_files()]
        return parse_rst(self, [line for each in files for line in section(*each)])


class TrainerTable(SphinxDirective):
    """A table of the commands of the trainers."""

    def run(self):
        node = nodes.container()
        self.state.nested_parse(StringList(trainer_table()), 0, node)
        return node.children


class CommandTree(TocTree):
    """A `toctree` in which the line `trainers` stands for the page of each trainer."""

    def run(self):
        lines = list(self.content)
        place = lines.index("trainers")
        lines[place : place + 1] = trainer_pages()
        self.content = StringList(lines)
        return super().run()


class Overview(SphinxDirective):
    """A table of the functions of files of `rlhf_jax.functional`, with their first sentences."""

    required_arguments, optional_arguments = 1, 9

    def run(self):
        names = [name for file in self.arguments for name in functional_names(file)]
        lines = [".. list-table::", "   :widths: 35 65", "   :width: 100%", ""] if names else []
        for name in names:
            summary = inspect.getdoc(getattr(functional, name)).split("\n\n")[0]
            summary = in_code_font(re.sub(r"\s+", " ", summary))
            lines += [f"   * - :py:func:`~rlhf_jax.functional.{name}`", f"     - {summary}"]
        return parse_rst(self, lines)


def parse_rst(directive, lines):
    """Nodes of reStructuredText, though the page around it is Markdown."""
    page = directive.state.document
    document = new_document(page["source"], page.settings)
    document.reporter = page.reporter  # which makes Sphinx's warnings of errors
    source = StringList(lines, source=page["source"])
    RSTStateMachine(state_classes=state_classes, initial_state="Body").run(source, document)
    return document.children


def process_docstring(app, what, name, obj, options, lines):
    """Turns a docstring of this project into reStructuredText.

    An indented block in the text is an equation, and becomes a literal block. `Args:` and its like
    become fields, in which each `name: text` is an item. Backticks stand for code.
    """
    converted, before, field, literal = [], "", None, False
    for line in lines:
        if line and not line.startswith(" "):
            field, literal = FIELD.match(line), line.startswith(">>>") or (literal and before)
        elif line and not field and not literal and not before:
            literal = True
            converted += [".. code-block:: none", ""]
        if not literal:
            line = in_text(line, field)
        converted.append(line)
        before = line
    lines[:] = in_code_font("\n".join(converted)).split("\n")


def in_text(line, field):
    """A line of a docstring that is no equation and no example, in reStructuredText."""
    line = re.sub(r"([*|\\]|_(?!\w))", r"\\\1", line)
    if field and not line.startswith(" "):
        return f":{FIELD_NAMES[field[1]]}:" if line else line
    if field and ITEM.match(line):
        return ITEM.sub(r"   * ``\1``: \2", line)
    # The text of an item is one level deeper than that of `Returns:`.
    return f" {line}" if field and line else line


def in_code_font(text):
    """Single backticks mean code, as in Markdown; nothing is escaped in there."""
    return re.sub(r"(?<!`)`([^`]+)`(?!`)", lambda match: f"``{unescaped(match[1])}``", text)


def unescaped(text):
    """The text without the backslashes that `in_text` put in."""
    return re.sub(r"\\(.)", r"\1", text)


class LinkNames(SphinxTransform):
    """Makes a link of each public name in code font, on all pages, if only one thing has it."""

    default_priority = 500

    def apply(self):
        for node in list(self.document.findall(nodes.literal)):
            target = TARGETS.get(node.astext().removeprefix("functional."))
            if target is None or isinstance(node.parent, (nodes.reference, pending_xref)):
                continue
            link = pending_xref(
                "", refdomain="py", reftype="obj", reftarget=target, refdoc=self.env.docname
            )
            node.replace_self(link)
            link += node


def process_signature(app, what, name, obj, options, signature, return_annotation):
    """Shortens defaults that are settings to their fields with another value than the default."""
    if what == "class" and dataclasses.is_dataclass(obj) and signature:
        for field in dataclasses.fields(obj):
            if dataclasses.is_dataclass(field.default):
                signature = signature.replace(repr(field.default), short(field.default))
        # The signature of a dataclass has this in place of a default that is made anew.
        signature = signature.replace("<factory>", "{}")
        # Flax adds these to each of its modules.
        signature = re.sub(r", parent: [^=]* = <[^>]*>, name: [^=]* = None\)$", ")", signature)
    return signature, return_annotation


def short(settings):
    """The call that makes these settings, without arguments that have their default values."""
    changed = [
        f"{field.name}={value!r}"
        for field in dataclasses.fields(settings)
        if (value := getattr(settings, field.name)) != field.default
        and not dataclasses.is_dataclass(value)
        and field.default is not dataclasses.MISSING
    ]
    return f"{type(settings).__name__}({', '.join(changed)})"


def skip_fields(app, what, name, obj, skip, options):
    """Leaves out the fields of named tuples, of which Python only says their number."""
    return True if isinstance(obj, FieldOfTuple) else None


def check_complete(app, env):
    """Warns if a public name has no entry."""
    entries = set(env.domains.python_domain.objects)
    missing = sorted({".".join(pair) for pair in required_names()} - entries)
    if missing:
        LOGGER.warning("the reference has no entry for %s", ", ".join(missing))


def check_offline(app, exception):
    """Warns if a page loads a script, a style, a font or a picture from another place."""
    if exception:
        return
    asset = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["'](?:https?:)?//[^>]*>""")
    link = re.compile(r"""<link[^>]*\shref=["'](?:https?:)?//[^>]*>""")
    style = re.compile(r"""(?:@import|url\()\s*["']?(?:https?:)?//[^)\s]*""")
    for path in sorted(Path(app.outdir).rglob("*")):
        patterns = {".html": (asset, link, style), ".css": (style,)}.get(path.suffix, ())
        for pattern in patterns:
            match = pattern.search(path.read_text(encoding="utf-8"))
            if match:
                LOGGER.warning("%s would load %s from the network", path.name, match[0])


def setup(app):
    """Called by Sphinx when it loads the extension."""
    app.add_directive("public", Public)
    app.add_directive("overview", Overview)
    app.add_directive("trainers", Trainers)
    app.add_directive("trainer_table", TrainerTable)
    app.add_directive("command_tree", CommandTree)
    app.add_directive("families", Families)
    app.add_transform(LinkNames)
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("env-check-consistency", check_complete)
    app.connect("build-finished", check_offline)
    return {"parallel_read_safe": True}
