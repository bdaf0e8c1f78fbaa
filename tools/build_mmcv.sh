#!/usr/bin/env bash
# Compile a wheel of mmcv and its ops for the torch that is installed.
#
#   bash tools/build_mmcv.sh [FOLDER]    # then: pip install FOLDER/*.whl
#
# Torch asks for a newer C++ from version to version, and mmcv asks for that of
# its own time: here torch has its way. Set these to choose otherwise:
#   PYTHON      interpreter of the environment that has torch    (python)
#   MMCV        what to compile                                  (mmcv==2.1.0)
#   MAX_JOBS    compiler processes                               (all cores)
#   FORCE_CUDA  1: CUDA ops even where torch sees no GPU
# The environment needs 'setuptools<80', wheel, ninja and psutil.
set -euo pipefail

PYTHON=${PYTHON:-python}
MMCV=${MMCV:-mmcv==2.1.0}
folder=${1:-.}
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT

pip=("$PYTHON" -m pip --disable-pip-version-check)
# What pip keeps of its own does not tell for which torch it was compiled.
options=(--no-deps --no-build-isolation --no-cache-dir)
"${pip[@]}" download "${options[@]}" --no-binary :all: -d "$source" "$MMCV"
tar -xzf "$source"/*.tar.gz -C "$source"
rm "$source"/*.tar.gz
standard=$("$PYTHON" -c "
import os.path as osp, re, torch
with open(osp.join(torch.__path__[0], 'include/ATen/ATen.h')) as f:
    print(re.search(r'C\+\+(\d\d) or later', f.read())[1])")
sed -i "s/-std=c++1[47]/-std=c++$standard/" "$source"/*/setup.py
mkdir -p "$folder"
MMCV_WITH_OPS=1 "${pip[@]}" wheel "${options[@]}" -w "$folder" "$source"/*/
