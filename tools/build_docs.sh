#!/usr/bin/env bash
# Build the documentation: docs/ becomes build/docs/index.html.
#
#   bash tools/build_docs.sh            # PYTHON: an environment with '.[docs]'
#
# A warning is an error: a link that leads nowhere, a docstring that does not
# render.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
"$python" -c 'import furo, myst_nb, sphinx, sphinx_copybutton' || {
    echo "error: '$python' has no Sphinx: pip install -e '.[docs]'" >&2
    exit 1
}
"$python" -m sphinx -W --keep-going -q -b html docs "${1:-build/docs}"
echo "Open ${1:-build/docs}/index.html"
