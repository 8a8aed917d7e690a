#!/usr/bin/env bash
# Live conformance: installs the real upstream packages and quantal into an environment of their own
# and runs conformance/. There a missing package is a failure, not a skip.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-conformance
python=${PYTHON:-python3}
[ -x $venv/bin/python ] || "$python" -m venv $venv
if [ ! -e $venv/.ready ] || [ conformance/requirements.txt -nt $venv/.ready ]; then
  $venv/bin/python -m pip install -q --disable-pip-version-check "${TORCH:-torch==2.13.0}"
  $venv/bin/python -m pip install -q --disable-pip-version-check -r conformance/requirements.txt
  touch $venv/.ready
fi
PATH="$PWD/$venv/bin:$PATH" $venv/bin/python -m pip install -q --no-build-isolation --no-deps \
  -C build-dir=build/python-conformance .
exec $venv/bin/python -m pytest conformance "$@"
