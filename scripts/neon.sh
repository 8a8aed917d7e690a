#!/usr/bin/env bash
# The tests of core, kernels and formats as programs for 64-bit ARM: cross-compiled with developer warnings into
# build/neon and run under qemu, on an emulated processor with dot products (set neon with int_neondot.cpp) and on one
# without (int_neon.cpp). Installs nothing. Emulation proves bits; it says nothing about speed.
#   scripts/neon.sh            build (minutes), run all but Cuda* on both processors (3 minutes each)
#   scripts/neon.sh FILTER     the same with the tests of a GoogleTest filter, e.g. 'Int8*'
# zlib for ARM elsewhere than in /usr/lib/aarch64-linux-gnu: set ZLIB_ROOT (of the unpacked package: DIR/usr).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"  # where `make setup` has put cmake and ninja, if it ran

missing=()
need() { # need COMMAND-OR-FILE PACKAGE
  command -v "$1" > /dev/null 2>&1 || [ -e "$1" ] || missing+=("$2")
}
need cmake cmake
need ninja ninja-build
need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
need qemu-aarch64 qemu-user
need /usr/src/googletest/CMakeLists.txt googletest
need /usr/include/nlohmann/json.hpp nlohmann-json3-dev
if [ -z "${ZLIB_ROOT:-}" ] && command -v aarch64-linux-gnu-g++ > /dev/null; then
  need "$(aarch64-linux-gnu-g++ -print-file-name=libz.a)" zlib1g-dev:arm64
fi
if [ ${#missing[@]} -gt 0 ]; then
  echo "neon: these packages are missing: ${missing[*]}" >&2
  case "${missing[*]}" in
    *:arm64*) echo "neon: first, once:  sudo dpkg --add-architecture arm64 && sudo apt-get update" >&2 ;;
  esac
  echo "neon: on Debian or Ubuntu run:  sudo apt-get install -y --no-install-recommends ${missing[*]}" >&2
  exit 1
fi

mkdir -p build
cmake --preset neon > build/neon.log 2>&1 || { cat build/neon.log; exit 1; }
cmake --build --preset neon

# Not run: the CUDA kernels as plain C++ (Cuda*). They hold nothing for ARM and are run natively by `make test`.
filter=${1:--Cuda*}
for cpu in max cortex-a72; do # with dot products, without
  for program in core kernels formats; do
    echo "neon: $program on $cpu"
    QEMU_CPU=$cpu qemu-aarch64 -L /usr/aarch64-linux-gnu "build/neon/tests/${program}_test" --gtest_brief=1 \
      --gtest_filter="$filter"
  done
done
echo "neon: all passed"
