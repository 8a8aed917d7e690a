#!/usr/bin/env bash
# Formatting, static checks and types.
#   scripts/lint.sh            check; clang-tidy on the C++ files changed since LINT_BASE (default HEAD~1)
#   scripts/lint.sh --all      clang-tidy on every source of src/ and tools/ (minutes)
#   scripts/lint.sh --fix      rewrite formatting instead of checking it
# Tools come from scripts/requirements-lint.txt, into the environment of `make setup`; clang-tidy is
# the Debian package (the one of the Python registry lacks the compiler's own headers).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
[ -x $venv/bin/python ] || { echo "lint: run 'make setup' first" >&2; exit 1; }
$venv/bin/python -m pip install -q --disable-pip-version-check -r scripts/requirements-lint.txt
export PATH="$PWD/$venv/bin:$PATH"
mode=${1:-}

cpp_files() { git ls-files '*.h' '*.hpp' '*.cpp' '*.cu' | grep -v '^tests/golden/'; }
python_dirs=(train.py python examples bench scripts tests conformance)

if [ "$mode" = --fix ]; then
  cpp_files | xargs clang-format -i
  ruff format "${python_dirs[@]}"
  ruff check --fix "${python_dirs[@]}"
  exit
fi

echo "lint: clang-format"
cpp_files | xargs clang-format --dry-run -Werror
echo "lint: ruff"
ruff check "${python_dirs[@]}"
echo "lint: mypy"
mypy
echo "lint: typos"
typos
if command -v doxygen > /dev/null; then
  echo "lint: comments of public symbols"
  scripts/docs.sh cpp > /dev/null
fi
echo "lint: changelog"
python scripts/check_changelog.py

if [ "$mode" = --all ]; then
  sources=$(git ls-files 'src/*.cpp' 'tools/*.cpp')
else
  base=${LINT_BASE:-HEAD~1}
  sources=$(git diff --name-only --diff-filter=d "$base" -- 'src/*.cpp' 'tools/*.cpp' 2> /dev/null || true)
fi
# The torch room needs torch's headers in the compile database, NEON files an ARM compiler.
sources=$(echo "$sources" | grep -v -e '^src/torch/' -e '_neon\(dot\)\?\.cpp$' || true)
if [ -n "$sources" ]; then
  command -v clang-tidy > /dev/null || { echo "lint: run 'apt-get install clang-tidy'" >&2; exit 1; }
  [ -e build/lint/compile_commands.json ] || cmake -S . -B build/lint -G Ninja > /dev/null
  echo "lint: clang-tidy on $(echo "$sources" | wc -l) files"
  echo "$sources" | xargs -P 2 -n 1 clang-tidy -p build/lint --quiet \
    --extra-arg=-Wno-unknown-warning-option
fi
echo "lint: nothing found"
