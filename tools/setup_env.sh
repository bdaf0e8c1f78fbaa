#!/usr/bin/env bash
# Make the environment that wsbcn_mm is developed, trained and tested in.
#
#   bash tools/setup_env.sh                 # OpenMMLab's own packages, .venv
#   STACK=onedl bash tools/setup_env.sh     # the maintained fork, .venv-onedl
#
# Safe to run again: it ends at once when nothing has changed. Set these to
# choose otherwise:
#   PYTHON               interpreter of a new environment      (python3)
#   VENV                 where the environment lives           (.venv)
#   TORCH_VERSION        and TORCHVISION_VERSION               (2.11.0, 0.26.0)
#   MAX_JOBS             compiler processes for mmcv's ops     (all cores)
#   WITH_CUDA            1/0: compile mmcv's CUDA ops or not   (GPU and nvcc?)
#   TORCH_CUDA_ARCH_LIST GPU architectures to compile for      (this GPU's)
#   WSBCN_CACHE          where built wheels are kept    (~/.cache/wsbcn_mm)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STACK=${STACK:-openmmlab}
PYTHON=${PYTHON:-python3}
TORCH_VERSION=${TORCH_VERSION:-2.11.0}
TORCHVISION_VERSION=${TORCHVISION_VERSION:-0.26.0}
MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}
WSBCN_CACHE=${WSBCN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wsbcn_mm}
export MAX_JOBS

fail() { # what went wrong, then what to do about it
    printf '\nerror: %s\n' "$1" >&2
    shift
    printf '  %s\n' "$@" >&2
    exit 1
}

case $STACK in
openmmlab)
    VENV=${VENV:-.venv}
    mmcv=mmcv==2.1.0
    libraries=(mmengine==0.10.7 mmdet==3.3.0 mmsegmentation==1.2.2
        mmpretrain==1.2.0)
    setuptools='setuptools>=64,<80' # mmcv asks for its pkg_resources
    build_minutes=16
    ;;
onedl)
    VENV=${VENV:-.venv-onedl}
    mmcv=onedl-mmcv==2.3.6
    libraries=(onedl-mmengine==0.10.12 onedl-mmdetection==3.5.1
        onedl-mmsegmentation==1.4.2 onedl-mmpretrain==1.3.6)
    setuptools='setuptools>=77,<80' # and for SPDX licenses
    build_minutes=26
    ;;
*)
    fail "STACK is '$STACK', expected 'openmmlab' or 'onedl'." \
        "openmmlab: mmcv, mmengine, mmdet, ... as OpenMMLab released them" \
        "onedl:     the maintained fork, under the same module names"
    ;;
esac
forgotten=(ftfy regex "$setuptools")

# Everything the environment depends on, in one line: unchanged, nothing to do.
inputs="$STACK torch $TORCH_VERSION $TORCHVISION_VERSION $mmcv ${libraries[*]}
cuda ${WITH_CUDA:-auto} $PWD $(cksum setup.py pyproject.toml \
    tools/setup_env.sh tools/build_mmcv.sh \
    wsbcn_mm/functional/kernels/compiled.cpp)"
stamp=$VENV/.wsbcn_mm_env
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$inputs" ]; then
    echo "Environment $VENV is up to date."
    exit 0
fi

log=$VENV/setup_env.log
step() { # a line of progress, a command whose output goes to the log
    local what=$1 begin=$SECONDS
    shift
    printf '%s ... ' "$what"
    if "$@" >>"$log" 2>&1; then
        printf 'done (%d s)\n' $((SECONDS - begin))
    else
        echo 'FAILED'
        tail -n 25 "$log" >&2
        fail "'$what' failed; the end of $log is above." \
            "No network, or a registry that is down: run this again, what is" \
            "done stays done. No compiler: install g++ and the Python headers" \
            "(Debian: apt-get install g++ python3-dev). Out of memory while" \
            "compiling: run it again with MAX_JOBS=1."
    fi
}

command -v "$PYTHON" >/dev/null ||
    fail "no interpreter '$PYTHON'." "Set PYTHON to a Python 3.9 to 3.12."
"$PYTHON" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info < (3, 13))' ||
    fail "'$PYTHON' is $("$PYTHON" --version 2>&1)." \
        "Set PYTHON to a Python 3.9 to 3.12: mmcv's setup fails on newer ones."
mkdir -p "$VENV"
: >"$log"
[ -x "$VENV/bin/pip" ] ||
    step "Making $VENV with $("$PYTHON" --version)" "$PYTHON" -m venv "$VENV"
rm -f "$stamp"
pip=("$VENV/bin/python" -m pip install --disable-pip-version-check)

step 'Installing the build tools' "${pip[@]}" "$setuptools" wheel ninja psutil
step "Installing torch $TORCH_VERSION (up to 5 GB, 1-3 minutes)" \
    "${pip[@]}" "torch==$TORCH_VERSION" "torchvision==$TORCHVISION_VERSION" \
    "$setuptools"

# mmcv publishes no wheels for current torch: build its ops once, keep the
# wheel. One built against another torch, Python or set of GPUs does not load.
if [ -z "${WITH_CUDA:-}" ]; then
    WITH_CUDA=0
    if command -v nvcc >/dev/null && "$VENV/bin/python" -c \
        'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        WITH_CUDA=1
    elif nvidia-smi >/dev/null 2>&1; then
        cuda=$("$VENV/bin/python" -c 'import torch; print(torch.version.cuda)')
        echo "
notice: this machine has a GPU, but mmcv's ops are compiled for the CPU only,
  because there is no nvcc on the PATH, or torch does not see the GPU (an old
  driver). On the GPU, RoIAlign, NMS and mmcv's other ops will fail, and with
  them most detectors; classifiers and most segmenters do without. For all of
  it, install the CUDA toolkit, in torch's version ($cuda), and run
  rm -rf $VENV && bash tools/setup_env.sh
"
    fi
fi
key=$("$VENV/bin/python" -c "
import platform, sys, torch
print(f'py{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}'
      f'-{platform.machine()}')")
unset FORCE_CUDA
if [ "$WITH_CUDA" = 1 ]; then
    export FORCE_CUDA=1
    if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
        TORCH_CUDA_ARCH_LIST=$("$VENV/bin/python" -c "
import torch
print('.'.join(map(str, torch.cuda.get_device_capability())))") ||
            fail 'WITH_CUDA=1, but no GPU tells its architecture.' \
                "Set TORCH_CUDA_ARCH_LIST, e.g. '8.0;9.0'."
    fi
    export TORCH_CUDA_ARCH_LIST
    key+=-cuda${TORCH_CUDA_ARCH_LIST//[; ]/_}
    # An nvcc that comes without the library headers: pip's torch has them.
    for include in "$VENV"/lib/python3*/site-packages/nvidia/*/include; do
        [ -d "$include" ] && CPATH=$PWD/$include${CPATH:+:$CPATH}
    done
    export CPATH
else
    # Without a GPU mmcv's setup.py asks torch itself, and builds CPU ops.
    export CUDA_VISIBLE_DEVICES=
    key+=-cpu
fi
wheels=$WSBCN_CACHE/$key
mkdir -p "$wheels"
find_wheel() {
    find "$wheels" -name "$(tr '=-' '-_' <<<"${mmcv/==/=}" |
        sed 's/_\([0-9]\)/-\1/')-*.whl" | head -n 1
}
wheel=$(find_wheel)
if [ -z "$wheel" ]; then
    minutes=$((build_minutes / MAX_JOBS + 1))
    step "Compiling $mmcv (about $minutes minutes with $MAX_JOBS jobs)" \
        env PYTHON="$VENV/bin/python" MMCV="$mmcv" \
        bash tools/build_mmcv.sh "$wheels"
    wheel=$(find_wheel)
    [ -n "$wheel" ] || fail "no wheel of $mmcv in $wheels." "See $log."
fi
# One of the same version, for another torch, may be there.
step "Installing ${mmcv%%=*}" \
    "${pip[@]}" --no-deps --force-reinstall "$wheel"
step 'Installing what it needs' "${pip[@]}" "$wheel"
step "Installing ${libraries[*]}" \
    "${pip[@]}" "${libraries[@]}" "${forgotten[@]}" "torch==$TORCH_VERSION"
step 'Installing wsbcn_mm, editable, with what its tests need' \
    "${pip[@]}" --no-build-isolation -e '.[digits,docs,plots,tests]' \
    "$setuptools" "torch==$TORCH_VERSION"
step 'Importing all of it' "$VENV/bin/python" -c "
import mmcv.ops, mmdet, mmseg, mmpretrain, wsbcn_mm"
printf '%s' "$inputs" >"$stamp"
echo "Environment ready: source $VENV/bin/activate"
