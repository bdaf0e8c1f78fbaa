#!/usr/bin/env bash
# Compile a wheel of mmcv and its ops for the torch that is installed.
#
#   pip install 'setuptools<80' wheel ninja psutil
#   bash tools/build_mmcv.sh [FOLDER]    # then: pip install FOLDER/mmcv-*.whl
#
# Torch asks for a newer C++ from version to version, and mmcv asks for that of
# its own time: here torch has its way. Set these to choose otherwise:
#   PYTHON      interpreter of the environment that has torch    (python)
#   MMCV        what to compile                                  (mmcv==2.1.0)
#   MAX_JOBS    compiler processes                               (all cores)
#   FORCE_CUDA  1: CUDA ops even where torch sees no GPU
set -euo pipefail

PYTHON=${PYTHON:-python}
MMCV=${MMCV:-mmcv==2.1.0}
folder=${1:-.}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}
command -v "$PYTHON" >/dev/null ||
    fail "no interpreter '$PYTHON': set PYTHON to one that has torch."
standard=$("$PYTHON" -c "
import os.path as osp, re, torch
with open(osp.join(torch.__path__[0], 'include/ATen/ATen.h')) as f:
    print(re.search(r'C\+\+(\d\d) or later', f.read())[1])") ||
    fail "'$PYTHON' has no torch to compile for: set PYTHON to one that has it."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 13))' ||
    fail "mmcv's setup fails on Python 3.13 and newer: take 3.9 to 3.12."
"$PYTHON" -W ignore -c 'import ninja, pkg_resources, psutil, wheel' ||
    fail "mmcv's setup needs more: pip install 'setuptools<80' wheel ninja psutil"

source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
pip=("$PYTHON" -m pip --disable-pip-version-check)
# What pip keeps of its own does not tell for which torch it was compiled.
options=(--no-deps --no-build-isolation --no-cache-dir)
"${pip[@]}" download "${options[@]}" --no-binary :all: -d "$source" "$MMCV"
tar -xzf "$source"/*.tar.gz -C "$source"
rm "$source"/*.tar.gz
sed -i "s/-std=c++1[47]/-std=c++$standard/" "$source"/*/setup.py
mkdir -p "$folder"
MMCV_WITH_OPS=1 "${pip[@]}" wheel "${options[@]}" -w "$folder" "$source"/*/
