#!/usr/bin/env bash
# Environment if missing, lint, the test suite.
#
#   bash tools/run_tests.sh                # the fast tests
#   bash tools/run_tests.sh -m ''          # the slow ones too, as CI does
#   bash tools/run_tests.sh tests/test_x   # any of pytest's arguments
#
# TEST_PROCESSES: how many at a time (2), of up to 4 GB each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
case ${STACK:-openmmlab} in
onedl) python=${VENV:-.venv-onedl}/bin/python ;;
*) python=${VENV:-.venv}/bin/python ;;
esac
"$python" -m ruff check .
"$python" -m ruff format --check .
# Some tests start processes. Threads that wait for each other by spinning make
# them crawl where there are more threads than cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -n "${TEST_PROCESSES:-2}" --dist worksteal "$@"
