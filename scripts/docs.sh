#!/usr/bin/env bash
# The reference of the interfaces as HTML, from the comments in the sources: build/docs/html.
#   scripts/docs.sh          everything
#   scripts/docs.sh python   Python only, by pdoc, from the package that `make package` installed
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

case ${1:-all} in
  python) python ;;
  all) python ;;
  *) echo "usage: scripts/docs.sh [python]" >&2; exit 2 ;;
esac
echo "docs: $out/html"
