"""Settings of Sphinx for the pages; `make docs` calls it. Nothing is fetched while it builds."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(Path(__file__).parents[1])]

import rlhf_jax  # noqa: E402  (the clone's own, wherever Sphinx was started)

project = "rlhf_jax"
author = "The rlhf-jax authors"
project_copyright = author
version = release = rlhf_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "reference",  # docs/_ext/reference.py
]
exclude_patterns = ["_build", "examples"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
smartquotes = False  # docstrings speak of "k1"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# Imported for type checkers only, and so unknown when signatures are read.
autodoc_type_aliases = {"PreTrainedTokenizerFast": "transformers.PreTrainedTokenizerFast"}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False

# Every link has to lead somewhere; types of other packages have no pages here.
nitpicky = True
nitpick_ignore_regex = [
    (
        r"py:class",
        r"(tuple\[(int|str|~rlhf_jax[.].*)|dict\[str)",
    ),  # of a tuple of any length, or of a mapping
    (
        r"py:class",  # type variables
        r"rlhf_jax\.(data\.batching\.Batch|models\.family\.Config|runtime\.config\.Config)",
    ),
    (
        r"py:.*",
        r"(jax|jaxlib|numpy|np|optax|flax|nn|transformers|collections|contextlib|typing|types|os|pathlib)\..*",
    ),
]

html_theme = "furo"
html_title = f"rlhf_jax {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False
toc_object_entries_show_parents = "hide"
pygments_style = "friendly"
pygments_dark_style = "monokai"
