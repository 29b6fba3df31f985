"""Settings of Sphinx, which ``make docs`` runs: every broken link or reference is an error there."""

from __future__ import annotations

import sys
from pathlib import Path

import tritonq

sys.path.insert(0, str(Path(__file__).parent))

project = "tritonq"
copyright = "the tritonq authors, Apache-2.0"
version = release = tritonq.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "references"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# "Returns" holds prose; the type is in the signature.
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]

# Types of Python and of libraries whose pages are elsewhere. A reference to anything of tritonq has to be found.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|numpy|np|collections|typing|os|enum|abc|matplotlib|onnxruntime|pathlib)\..*"),
    ("py:.*", r"(Tensor|Module|Path|ndarray|optional|Iterable|Iterator|Mapping|Sequence|Callable|[A-Z])"),
]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"tritonq {release}"
html_static_path = ["_static"]
html_css_files = ["tritonq.css"]
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
