#!/usr/bin/env bash
# The reference of the interfaces as HTML, from the comments in the sources: build/docs/html/index.html.
#   scripts/docs.sh          everything
#   scripts/docs.sh python   Python only, by pdoc, from the package that `make package` installed
#   scripts/docs.sh cpp      C++ only, by Doxygen (Debian package doxygen); fails if a public symbol
#                            has no comment
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/docs
venv=.venv
mkdir -p "$out/html"

python() {
  local py=$venv/bin/python
  [ -x $py ] || { echo "docs: run 'make package' first" >&2; exit 1; }
  $py -c 'import pdoc' 2> /dev/null ||
    $py -m pip install -q --disable-pip-version-check -r scripts/requirements-docs.txt
  rm -rf "$out/html/python"
  echo "docs: Python"
  $py -m pdoc -d markdown --no-show-source -o "$out/html/python" quantal quantal.model_loader \
    quantal.error_handling quantal.quantization_error_handler quantal.layers quantal.testing \
    quantization_wrapper backend_manager imports
}

cpp() {
  command -v doxygen > /dev/null || { echo "docs: run 'apt-get install doxygen'" >&2; exit 1; }
  local version
  version=$(sed -n 's/^project(quantal VERSION \([0-9.]*\).*/\1/p' CMakeLists.txt)
  sed -e "s#@VERSION@#$version#" -e "s#@OUTPUT@#$out/html#" docs/reference/Doxyfile.in > "$out/Doxyfile"
  rm -rf "$out/html/cpp"
  echo "docs: C++"
  doxygen "$out/Doxyfile"
  # The pages link to the examples.
  rm -rf "$out/html/examples" && cp -r examples "$out/html/examples"
}

case ${1:-all} in
  python) python ;;
  cpp) cpp ;;
  all)
    cpp
    python
    ;;
  *) echo "usage: scripts/docs.sh [python|cpp]" >&2; exit 2 ;;
esac
cp docs/reference/index.html "$out/html/index.html"
echo "docs: $out/html/index.html"
