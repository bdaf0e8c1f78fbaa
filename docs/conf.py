"""Sphinx configuration. ``bash tools/build_docs.sh`` builds the pages."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import wsbcn_mm  # noqa: E402

project = 'wsbcn_mm'
author = 'wsbcn_mm contributors'
copyright = '2026, wsbcn_mm contributors'
release = version = wsbcn_mm.__version__

extensions = [
    'sphinx.ext.autodoc',
    'sphinx.ext.mathjax',
    'sphinx.ext.napoleon',
    'sphinx_copybutton',
    'myst_nb',
]

myst_enable_extensions = ['colon_fence', 'dollarmath']
myst_heading_anchors = 3  # as GitHub makes them
nb_execution_mode = 'off'  # a test runs the tutorial; its outputs are kept

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # the docstrings say the types
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# As lists: one line documents several attributes.
napoleon_custom_sections = ['Shape', ('Attributes', 'params_style')]

html_theme = 'furo'
html_title = f'wsbcn_mm {version}'
html_show_sourcelink = False
copybutton_exclude = '.linenos, .gp, .go'
