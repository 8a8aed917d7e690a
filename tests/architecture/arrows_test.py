"""The architecture as a test: arrows between rooms, no torch below the torch room, instruction-set
flags on single files only, sizes of files and functions. Standard library only.

Run by ctest (QUANTAL_BUILD_DIR is set, the built archives are examined too), by pytest, or alone:
    python3 tests/architecture/arrows_test.py
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import sources  # noqa: E402

# What a room may include, itself aside. core <- kernels <- formats <- policy <- checkpoint <- torch
# <- python; core <- io <- checkpoint <- tools.
ARROWS: dict[str, set[str]] = {
    "core": set(),
    "kernels": {"core"},
    "formats": {"core", "kernels"},
    "io": {"core"},
    "policy": {"core", "kernels", "formats"},
    "checkpoint": {"core", "kernels", "formats", "policy", "io"},
}
ARROWS["torch"] = set(ARROWS["checkpoint"]) | {"checkpoint"}
ARROWS["tools"] = set(ARROWS["torch"])
ARROWS["python"] = set(ARROWS["torch"]) | {"torch"}
# Public headers that are not called as their room.
PUBLIC_ROOMS = {
    "archive": "io",
    "attention_choice": "policy",
    "backend": "policy",
    "coverage": "policy",
    "merge_report": "policy",
    "ggml": "formats",
    "model_fit": "checkpoint",
    "attention": "kernels",
    "low_rank": "kernels",
    "packed": "kernels",
    "plan": "checkpoint",
    "safetensors": "io",
    "shards": "formats",
    "stored_layer": "formats",
    "transcode": "formats",
}
TORCH_FREE = ("core", "kernels", "formats", "policy", "io", "checkpoint")
TORCH_HEADERS = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$")
TORCH_SYMBOL = re.compile(r"(?<![\w:])(torch|at|c10|pybind11)::|\bPy_[A-Z]")
ISA_FILE = re.compile(r"_(avx2|avxvnni|avx512|avx512bf16|avx512vnni|neon|neondot)\.cpp$")
# Headers that a file with instruction-set flags may include besides those of kernels/cpu.
ISA_HEADERS = {"cstddef", "cstdint", "cstring", "immintrin.h", "arm_neon.h"}
MAX_HEADER, MAX_SOURCE, MAX_FUNCTION = 250, 500, 60
# path -> why it may be longer. Nothing over 800 lines belongs here at all.
LONG_FILES: dict[str, str] = {
    "src/kernels/cpu/vec_avx2.h": "all operations of the vector idiom for one instruction set",
    "src/kernels/cpu/vec_neon.h": "all operations of the vector idiom for one instruction set",
    "src/kernels/cpu/vec_scalar.h": "all operations of the vector idiom, and the rules they obey",
}
# "path:function" -> why it may be longer.
LONG_FUNCTIONS: dict[str, str] = {
    "tests/io/gguf_test.cpp:TEST_F(Gguf, RefusesByName)": "a table of cases",
}


def line_limit(path: Path) -> int:
    """Headers declare; an _inl.h holds the code of kernels and counts as a source."""
    if path.suffix == ".h" and not path.name.endswith("_inl.h"):
        return MAX_HEADER
    return MAX_SOURCE


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a Python function without its docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def room_folders() -> dict[str, Path]:
    """Folder of each room that exists."""
    folders = {room: ROOT / "src" / room for room in ARROWS}
    folders["tools"] = ROOT / "tools"
    folders["python"] = ROOT / "python" / "bindings"
    return {room: folder for room, folder in folders.items() if folder.is_dir()}


def files_of(room: str) -> list[Path]:
    """Sources, private headers and the public header of a room."""
    folder = room_folders().get(room)
    found = sorted(folder.rglob("*")) if folder else []
    found = [path for path in found if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    names = [room, *(name for name, owner in PUBLIC_ROOMS.items() if owner == room)]
    public = [ROOT / "include" / "quantal" / f"{name}.h" for name in names]
    return found + [path for path in public if path.exists()]


def all_files() -> list[Path]:
    """C++ files of the repository's own code."""
    found = [path for room in ARROWS for path in files_of(room)]
    for folder in ("bench", "examples", "fuzz", "tests"):
        for suffix in ("*.h", "*.cpp"):
            found += sorted((ROOT / folder).rglob(suffix))
    return found


def room_of_include(path: str) -> str | None:
    """Room whose header this is, None for headers from elsewhere."""
    public = re.fullmatch(r"quantal/(\w+)\.h", path)
    if public:
        return PUBLIC_ROOMS.get(public.group(1), public.group(1))
    first = path.split("/")[0]
    return first if "/" in path and first in ARROWS else None


def arrow_violations(room: str, text: str) -> list[str]:
    """Includes in `text` that a file of `room` may not have."""
    bad = []
    for _, path in sources.includes(text):
        target = room_of_include(path)
        if path.startswith("torch/") or target == room:
            continue  # torch's own headers begin like our room: torch_violations judges them
        if target is not None and target not in ARROWS[room]:
            bad.append(path)
    return bad


def torch_violations(text: str) -> list[str]:
    """Includes of torch or Python."""
    return [path for _, path in sources.includes(text) if TORCH_HEADERS.match(path)]


def flag_violations(cmake: str) -> list[str]:
    """Commands other than set_source_files_properties that hold instruction-set flags."""
    code = re.sub(r"#[^\n]*", "", cmake)
    bad = []
    for match in re.finditer(r"-m(avx|fma|f16c|sse|amx|arch|cpu|tune|bmi)\w*", code):
        commands = re.findall(r"\b(\w+)\s*\(", code[: match.start()])
        command = commands[-1] if commands else "?"
        if command != "set_source_files_properties":
            bad.append(f"{match.group(0)} in {command}")
    return bad


def isa_violations(text: str) -> list[str]:
    """Direct includes that a file with instruction-set flags may not have."""
    return [
        path
        for _, path in sources.includes(text)
        if path not in ISA_HEADERS and not path.startswith("kernels/cpu/")
    ]


def build_dir() -> Path | None:
    """Build folder to examine, None without one."""
    named = os.environ.get("QUANTAL_BUILD_DIR")
    if named:
        return Path(named)
    usual = ROOT / "build" / "release"
    return usual if (usual / "libquantal_core.a").exists() else None


def symbols(archive: Path) -> list[tuple[str, str, str]]:
    """(member, type letter, demangled name) of every symbol of an archive."""
    out = subprocess.run(
        ["nm", "-C", "-A", str(archive)], check=True, capture_output=True, text=True
    ).stdout
    pattern = re.compile(r"^[^:]+:([^:]+):[0-9a-f ]* ([A-Za-z]) (.*)$")
    return [found.groups() for line in out.splitlines() if (found := pattern.match(line))]  # type: ignore[misc]


class Arrows(unittest.TestCase):
    def test_rooms_include_only_along_the_arrows(self) -> None:
        for room in ARROWS:
            for path in files_of(room):
                with self.subTest(path=str(path.relative_to(ROOT))):
                    self.assertEqual(arrow_violations(room, sources.read(path)), [])

    def test_no_torch_below_the_torch_room(self) -> None:
        for room in TORCH_FREE:
            for path in files_of(room):
                with self.subTest(path=str(path.relative_to(ROOT))):
                    self.assertEqual(torch_violations(sources.read(path)), [])

    def test_every_torch_free_room_is_there(self) -> None:
        for room in TORCH_FREE:
            self.assertGreater(len(files_of(room)), 1, room)

    def test_the_checks_find_violations(self) -> None:
        self.assertEqual(
            arrow_violations("io", '#include "quantal/formats.h"\n#include "core/half.h"'),
            ["quantal/formats.h"],
        )
        self.assertEqual(arrow_violations("policy", '  #  include "io/file.h"'), ["io/file.h"])
        self.assertEqual(
            arrow_violations("formats", '#include "quantal/torch.h"'), ["quantal/torch.h"]
        )
        self.assertEqual(torch_violations("#include <torch/torch.h>"), ["torch/torch.h"])
        self.assertEqual(isa_violations("#include <vector>\n#include <cstdint>"), ["vector"])


class Flags(unittest.TestCase):
    def test_instruction_sets_are_set_on_single_files(self) -> None:
        build_files = [ROOT / "CMakeLists.txt", *sorted((ROOT / "cmake").glob("*.cmake"))]
        for folder in ("src", "tools", "python", "tests", "bench", "examples", "fuzz"):
            build_files += sorted((ROOT / folder).rglob("CMakeLists.txt"))
            build_files += sorted((ROOT / folder).rglob("*.cmake"))
        for path in build_files:
            with self.subTest(path=str(path.relative_to(ROOT))):
                self.assertEqual(flag_violations(sources.read(path)), [])

    def test_files_with_flags_include_only_kernel_headers(self) -> None:
        files = [path for path in files_of("kernels") if ISA_FILE.search(path.name)]
        self.assertTrue(files)
        for path in files:
            with self.subTest(path=str(path.relative_to(ROOT))):
                self.assertEqual(isa_violations(sources.read(path)), [])

    def test_the_check_finds_violations(self) -> None:
        bad = "target_compile_options(x PRIVATE\n  -O2 -mavx2)"
        self.assertEqual(flag_violations(bad), ["-mavx2 in target_compile_options"])
        good = 'set_source_files_properties(a PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma") # -mavx2'
        self.assertEqual(flag_violations(good), [])


class Archives(unittest.TestCase):
    def setUp(self) -> None:
        folder = build_dir()
        if folder is None or shutil.which("nm") is None:
            self.skipTest("no build folder (QUANTAL_BUILD_DIR) or no nm")
        self.folder = folder

    def test_no_torch_symbol(self) -> None:
        for room in TORCH_FREE:
            archive = self.folder / f"libquantal_{room}.a"
            self.assertTrue(archive.exists(), f"{archive} is not built")
            found = symbols(archive)
            self.assertTrue(any(name.startswith("quantal::") for _, _, name in found), archive)
            bad = [name for _, _, name in found if TORCH_SYMBOL.search(name)]
            self.assertEqual(bad, [], archive.name)

    def test_files_with_flags_share_no_function(self) -> None:
        """A weak copy compiled for a newer CPU could be the one that the linker keeps."""
        cache = (self.folder / "CMakeCache.txt").read_text(encoding="utf-8")
        if re.search(r"CMAKE_BUILD_TYPE:\w+=Debug|fsanitize", cache):
            self.skipTest("without optimisation inline functions are emitted everywhere")
        found = symbols(self.folder / "libquantal_kernels.a")
        isa = [row for row in found if ISA_FILE.search(row[0].removesuffix(".o"))]
        self.assertTrue(isa, "no object with instruction-set flags")
        bad = [
            f"{m}: {name}" for m, kind, name in isa if kind in "WVu" and "personality" not in name
        ]
        self.assertEqual(bad, [])


class Sizes(unittest.TestCase):
    def test_files(self) -> None:
        for path in all_files():
            name = path.relative_to(ROOT).as_posix()
            limit = line_limit(path)
            lines = sources.read(path).count("\n")
            with self.subTest(path=name):
                if name in LONG_FILES:
                    self.assertGreater(lines, limit, "no longer needs its entry in LONG_FILES")
                    limit = 800
                self.assertLessEqual(lines, limit)

    def test_functions(self) -> None:
        long: set[str] = set()
        for path in all_files():
            name = path.relative_to(ROOT).as_posix()
            for function in sources.functions(sources.read(path)):
                key = f"{name}:{function.name}"
                with self.subTest(function=key, line=function.line):
                    if key in LONG_FUNCTIONS:
                        long.add(key)
                    else:
                        self.assertLessEqual(function.lines, MAX_FUNCTION)
        self.assertEqual(long, set(LONG_FUNCTIONS), "entries of functions that are gone")

    def test_python(self) -> None:
        for folder in ("python", "scripts", "examples", "bench"):
            for path in sorted((ROOT / folder).rglob("*.py")):
                name = path.relative_to(ROOT).as_posix()
                text = path.read_text(encoding="utf-8")
                with self.subTest(path=name):
                    self.assertLessEqual(text.count("\n"), MAX_SOURCE)
                for node in ast.walk(ast.parse(text)):
                    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                        continue
                    with self.subTest(function=f"{name}:{node.name}"):
                        self.assertLessEqual(body_lines(node), MAX_FUNCTION)

    def test_functions_are_found(self) -> None:
        text = """
namespace a {
constexpr int kTable[] = {1, 2, 3};
struct S : Base<int> {
  int value{3};
  S() : value{4} {}
  int get() const { return value; }  // a } in a comment
};
template <class T>
std::vector<T> long_one(
    const T& x) {
  auto f = [&] { if (x) { return "}"; } };
  for (;;) {
    break;
  }
}
}  // namespace a
"""
        found = {f.name: f.lines for f in sources.functions(text)}
        self.assertEqual(found["long_one"], 8)
        self.assertEqual(found["get"], 1)
        self.assertNotIn("?", found)


if __name__ == "__main__":
    unittest.main()
