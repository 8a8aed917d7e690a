"""The command-line tool as its users run it: help, exit codes, plans, conversions, interruption.
Standard library only.

Run by ctest, or alone: QUANTAL_CLI=build/release/tools/quantal python3 tests/tools/cli_test.py
"""

from __future__ import annotations

import json
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "checkpoints"
TOOL = os.environ.get("QUANTAL_CLI", str(ROOT / "build" / "release" / "tools" / "quantal"))
Q4_1 = GOLDEN / "gguf" / "tiny-q4_1.gguf"
LAYERS = 14


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def header(path: Path) -> dict:
    """Of a safetensors file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size))


def write_safetensors(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """bfloat16 tensors of magnitudes from 0.008 to 0.031."""
    numbers = random.Random(3)
    entries, end = {}, 0
    for name, (rows, cols) in shapes.items():
        begin, end = end, end + 2 * rows * cols
        entries[name] = {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [begin, end]}
    data = bytearray(numbers.randbytes(end))
    data[1::2] = bytes(end // 2).replace(b"\0", b"\x3c")
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class ToolTest(unittest.TestCase):
    def setUp(self) -> None:
        self._temp = tempfile.TemporaryDirectory()
        self.addCleanup(self._temp.cleanup)
        self.folder = Path(self._temp.name)

    def done(self, *arguments: object) -> str:
        """Standard output of a call that succeeds and complains of nothing."""
        result = run(*arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(result.stderr, "")
        return result.stdout

    def fails(self, code: int, *arguments: object) -> str:
        """Standard error of a call that fails."""
        result = run(*arguments)
        self.assertEqual(result.returncode, code, result.stdout + result.stderr)
        return result.stderr

    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))

    def layers_of(self, path: Path) -> list[str]:
        """The types of the quantized layers."""
        described = json.loads(self.done("inspect", "--json", path))
        gguf = described["container"].startswith("GGUF")
        return [
            t["type"]
            for t in described["tensors"]
            if t["quantized_layer"] or (gguf and t["type"].startswith("Q"))
        ]


class Usage(ToolTest):
    def test_help_and_version(self) -> None:
        self.assertRegex(self.done("--version"), r"^quantal \d+\.\d+\.\d+\n$")
        text = self.done("--help")
        for command in ("inspect", "convert", "formats"):
            self.assertIn(command, text)
            own = self.done(command, "--help")
            self.assertIn("--help", own)
            if command != "formats":
                self.assertIn("Examples:", own)

    def test_help_of_convert_lists_targets_and_layouts(self) -> None:
        text = self.done("convert", "--help")
        for word in ("bnb", "hqq", "mlx", "quanto", "gguf", "dense", "qmodel", "mlx-lm", "--plan"):
            self.assertIn(word, text)

    def test_wrong_usage_is_exit_code_2(self) -> None:
        self.assertIn("convert", self.fails(2))
        for arguments in (
            ["explode"],
            ["inspect"],
            ["inspect", "a", "b"],
            ["convert", Q4_1],
            ["convert", Q4_1, "--to", "mlx"],
            ["convert", Q4_1, "out"],
            ["convert", Q4_1, "out", "--to", "gptq"],
            ["convert", Q4_1, "out", "--to", "mlx", "--dtype", "int3"],
            ["convert", Q4_1, "out", "--to", "mlx", "--bits", "four"],
            ["convert", Q4_1, "out", "--to", "mlx", "--max-shard-size", "12 parsecs"],
            ["convert", Q4_1, "out", "--to", "mlx", "--threads", "-3"],
            ["formats", "--verbose"],
        ):
            with self.subTest(arguments):
                self.assertNotEqual(self.fails(2, *arguments), "")
        self.assertIn("hqq", self.fails(2, "convert", Q4_1, "out", "--to", "gptq"))

    def test_failures_are_exit_code_1_and_one_line(self) -> None:
        broken = self.folder / "broken.gguf"
        broken.write_bytes(Q4_1.read_bytes()[:100])
        for arguments in (
            ["inspect", self.folder / "none"],
            ["inspect", broken],
            ["convert", broken, self.folder / "m", "--to", "mlx"],
            ["convert", Q4_1, self.folder / "m", "--to", "mlx", "--bits", "7"],
            ["convert", Q4_1, self.folder / "m", "--to", "mlx", "--layout", "qmodel"],
            ["convert", Q4_1, self.folder / "m", "--to", "bnb", "--quant-type", "nf5"],
            ["convert", Q4_1, Q4_1, "--to", "gguf", "--overwrite"],
        ):
            with self.subTest(arguments):
                error = self.fails(1, *arguments)
                self.assertRegex(error, r"^quantal: error: .*\n$")
        self.assertEqual(self.names(), ["broken.gguf"])

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full here")
    def test_a_full_disk_under_standard_output_is_told(self) -> None:
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                [TOOL, "formats"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        self.assertEqual(result.returncode, 1)
        self.assertIn("standard output", result.stderr)


class Formats(ToolTest):
    def test_every_dialect_is_listed_with_its_files(self) -> None:
        text = self.done("formats")
        for name in ("bnb: ", "hqq: ", "mlx: ", "quanto: ", "gguf: ", "dense: "):
            self.assertIn("\n" + name, "\n" + text)
        for word in ("LLM.int8", "qfloat8", "mxfp4", "IQ4_NL", "qmodel.pt", "mlx_config.json"):
            self.assertIn(word, text)

    def test_markdown_is_the_table_of_the_readme(self) -> None:
        self.assertIn(self.done("formats", "--markdown"), (ROOT / "README.md").read_text())


class Convert(ToolTest):
    def test_a_plan_writes_nothing(self) -> None:
        target = self.folder / "m"
        text = self.done("convert", Q4_1, target, "--to", "mlx", "--plan")
        self.assertIn("layout mlx mlx-lm", text)
        self.assertRegex(text, r"gguf Q4_1 +mlx 4-bit, group 32, f32 +copied +exact +equal")
        self.assertEqual(text, self.done("convert", Q4_1, "--to", "mlx", "--plan"))
        lossy = self.done("convert", GOLDEN / "bnb-nf4", "--to", "hqq", "--plan")
        self.assertRegex(lossy, r"bnb nf4.* new +new +differ")
        self.assertEqual(self.names(), [])

    def test_lossless_conversion_there_and_back(self) -> None:
        text = self.done("convert", Q4_1, self.folder / "m", "--to", "mlx", "--lossless-only")
        self.assertIn(f"written to {self.folder}/m: nothing is lost\n", text)
        self.assertIn("config.json", os.listdir(self.folder / "m"))
        self.done("convert", self.folder / "m", self.folder / "back.gguf", "--to", "gguf")
        described = [
            json.loads(self.done("inspect", "--json", path))
            for path in (Q4_1, self.folder / "back.gguf")
        ]
        self.assertEqual(described[0]["types"], described[1]["types"])
        self.assertEqual(
            sorted(described[0]["tensors"], key=lambda t: t["name"]),
            sorted(described[1]["tensors"], key=lambda t: t["name"]),
        )

    def test_lossless_only_stops_before_writing(self) -> None:
        for source, to in (("bnb-nf4", "hqq"), ("dense-bf16", "mlx"), ("quanto-int4", "bnb")):
            error = self.fails(
                1, "convert", GOLDEN / source, self.folder / "m", "--to", to, "--lossless-only"
            )
            self.assertIn("model.layers.0", error)
        self.assertEqual(self.names(), [])

    def test_every_golden_folder_becomes_every_dialect(self) -> None:
        for source in ("bnb-int8", "hqq-pt-3bit-axis0", "mlx-npz", "quanto-int2", "dense-bf16"):
            for to in ("bnb", "hqq", "mlx", "quanto", "gguf", "dense"):
                with self.subTest(source=source, to=to):
                    target = self.folder / f"{source}-{to}{'.gguf' if to == 'gguf' else ''}"
                    more = ["--mode", "Q8_0"] if (source, to) == ("quanto-int2", "gguf") else []
                    text = self.done("convert", GOLDEN / source, target, "--to", to, *more)
                    self.assertIn(f"written to {target}", text)
                    count = len(self.layers_of(target))
                    # Of the npz file the output layer and the embedding are quantized too.
                    most = 0 if to == "dense" else LAYERS + 2 * (source == "mlx-npz")
                    self.assertTrue(min(most, LAYERS) <= count <= most, count)

    def test_form_options_arrive(self) -> None:
        source = GOLDEN / "dense-bf16"
        for number, (to, options, form) in enumerate(
            [
                ("hqq", ["--bits", 3, "--group-size", 32], r"3-bit, group 32"),
                ("hqq", ["--bits", 8, "--axis", 0], r"8-bit.*columns"),
                ("mlx", ["--mode", "mxfp4"], r"mxfp4"),
                ("mlx", ["--bits", 6, "--group-size", 32, "--dtype", "float16"], r"6-bit.*32"),
                ("quanto", ["--bits", 2], r"2-bit"),
                ("bnb", ["--quant-type", "fp4", "--no-double-quant"], r"fp4, block 64(?!.*nested)"),
                ("bnb", ["--group-size", 128], r"nf4, block 128, nested"),
                ("gguf", ["--mode", "Q5_1"], r"Q5_1"),
            ]
        ):
            with self.subTest(to=to, options=options):
                target = self.folder / f"{number}{'.gguf' if to == 'gguf' else ''}"
                text = self.done("convert", source, target, "--to", to, *options)
                self.assertRegex(text, form)
                self.assertTrue(self.layers_of(target))

    def test_patterns_that_stay_dense(self) -> None:
        for number, skip in enumerate((["lm_head,down_proj"], ["lm_head", "--skip", "down_proj"])):
            target = self.folder / str(number)
            self.done("convert", GOLDEN / "dense-f16-bin", target, "--to", "hqq", "--skip", *skip)
            self.assertEqual(len(self.layers_of(target)), LAYERS - 2)

    def test_dense_targets_have_the_dtype_asked_for(self) -> None:
        for dtype, stored in (("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")):
            target = self.folder / dtype
            self.done(
                "convert", GOLDEN / "mlx-4bit", target, "--to", "dense", "--dense-dtype", dtype
            )
            entry = header(target / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
            self.assertEqual(entry["dtype"], stored)
            config = json.loads((target / "config.json").read_text())
            self.assertEqual(config.get("dtype", config.get("torch_dtype")), dtype)

    def test_layouts_shards_and_overwriting(self) -> None:
        source, target = GOLDEN / "dense-bf16", self.folder / "m"
        self.done("convert", source, target, "--to", "hqq", "--layout", "qmodel")
        self.assertIn("qmodel.pt", os.listdir(target))
        self.done("convert", source, target, "--to", "bnb", "--max-shard-size", "20KB")
        files = os.listdir(target)
        self.assertNotIn("qmodel.pt", files, "a folder of our own is replaced")
        self.assertIn("model.safetensors.index.json", files)
        self.assertGreater(sum(f.endswith(".safetensors") for f in files), 2)
        foreign = self.folder / "foreign"
        foreign.mkdir()
        (foreign / "diary.txt").write_text("mine")
        self.fails(1, "convert", source, foreign, "--to", "bnb")
        self.assertEqual(os.listdir(foreign), ["diary.txt"])
        file = self.folder / "x.gguf"
        file.write_text("mine")
        self.fails(1, "convert", source, file, "--to", "gguf")
        self.assertEqual(file.read_text(), "mine")
        self.done("convert", source, file, "--to", "gguf", "--overwrite")
        self.assertEqual(len(self.layers_of(file)), LAYERS)

    def test_bytes_do_not_depend_on_threads_and_quiet_is_quiet(self) -> None:
        source = GOLDEN / "dense-bf16"
        for threads in (1, 3):
            text = self.done(
                "convert", source, self.folder / str(threads), "--to", "hqq", "-q",
                "--threads", threads,
            )  # fmt: skip
            self.assertEqual(text, "")
        one, three = (
            {p.name: p.read_bytes() for p in (self.folder / str(t)).iterdir()} for t in (1, 3)
        )
        self.assertEqual(one, three)

    def test_the_source_is_recognized_by_content(self) -> None:
        shutil.copy(Q4_1, self.folder / "weights.bin")
        self.done("convert", self.folder / "weights.bin", self.folder / "m", "--to", "mlx")
        self.assertEqual(len(self.layers_of(self.folder / "m")), LAYERS + 2)


class Interruption(ToolTest):
    """The tool writes its progress to a terminal that nobody reads: it stops in the middle of the
    conversion, however fast the machine is."""

    COUNT = 3000
    NAME = "model.layers.{}." + "a_block_of_a_long_name." * 3 + "linear.weight"

    def setUp(self) -> None:
        super().setUp()
        self.source = self.folder / "model.safetensors"
        write_safetensors(self.source, {self.NAME.format(i): (8, 64) for i in range(self.COUNT)})

    def start(self, *arguments: object) -> tuple[subprocess.Popen[str], int]:
        reading, writing = pty.openpty()
        self.addCleanup(os.close, reading)
        process = subprocess.Popen(
            [TOOL, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=writing,
            text=True,
        )
        os.close(writing)
        self.addCleanup(process.stdout.close)
        return process, reading

    def wait_for_files(self, process: subprocess.Popen[str]) -> None:
        """Until something stands beside the source."""
        for _ in range(6000):
            if len(self.names()) > 1:
                return
            self.assertIsNone(process.poll(), "ended before it wrote anything")
            time.sleep(0.01)
        self.fail("nothing was written within a minute")

    def drain(self, process: subprocess.Popen[str], terminal: int) -> str:
        text = b""
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            text += part
        self.assertNotEqual(process.wait(timeout=60), None)
        return text.decode()

    def test_signals_leave_nothing(self) -> None:
        for to, suffix in (("bnb", ""), ("mlx", ".npz"), ("hqq", ""), ("dense", ".pt")):
            for number in (signal.SIGINT, signal.SIGTERM):
                with self.subTest(to=to, signal=number.name):
                    target = self.folder / f"made{suffix}"
                    process, terminal = self.start("convert", self.source, target, "--to", to)
                    self.wait_for_files(process)
                    process.send_signal(number)
                    told = self.drain(process, terminal)
                    self.assertEqual(process.returncode, 128 + number)
                    self.assertIn("interrupted; nothing was written", told)
                    self.assertEqual(self.names(), ["model.safetensors"])

    def test_a_killed_tool_leaves_no_target(self) -> None:
        target = self.folder / "made"
        process, terminal = self.start("convert", self.source, target, "--to", "bnb")
        self.wait_for_files(process)
        process.kill()
        self.drain(process, terminal)
        self.assertFalse(target.exists())

    def test_progress_counts_on_a_terminal(self) -> None:
        process, terminal = self.start("convert", self.source, self.folder / "m", "--to", "bnb")
        told = self.drain(process, terminal)
        self.assertEqual(process.returncode, 0)
        steps = [int(n) for n in re.findall(rf"(\d+)/{self.COUNT} ", told)]
        self.assertEqual(steps, list(range(self.COUNT)))
        self.assertTrue(told.endswith("\r\x1b[K"), "the line is cleared at the end")


class PlanTest(ToolTest):
    def test_help_and_wrong_usage(self) -> None:
        self.assertIn("--memory-gb", self.done("plan", "--help"))
        self.assertIn("path is required", self.fails(2, "plan"))
        self.fails(2, "plan", GOLDEN / "dense-bf16", "--mode", "train")
        self.fails(2, "plan", GOLDEN / "dense-bf16", "--memory-gb", "-1")
        self.assertIn(
            "world_size is 0", self.fails(1, "plan", GOLDEN / "dense-bf16", "--world-size", 0)
        )
        self.fails(1, "plan", self.folder / "nowhere")

    def test_a_plan_for_people_and_for_programs(self) -> None:
        arguments = [
            "plan",
            GOLDEN / "dense-bf16",
            "--method",
            "hqq",
            "--bits",
            4,
            "--group-size",
            32,
        ]
        text = self.done(*arguments)
        self.assertIn("hqq 4-bit g32 on cpu, inference, 1 rank", text)
        self.assertTrue(all(len(line) <= 100 for line in text.splitlines()))
        plan = json.loads(self.done(*arguments, "--json", "--mode", "qlora", "--world-size", 2))
        self.assertEqual(len([layer for layer in plan["layers"] if layer["quantized"]]), LAYERS)
        self.assertEqual(plan["options"]["world_size"], 2)
        self.assertEqual([p["name"] for p in plan["phases"]][-1], "optimizer")

    def test_a_plan_is_what_the_conversion_makes(self) -> None:
        plan = json.loads(
            self.done("plan", GOLDEN / "dense-bf16", "--method", "mlx_int8", "--json")
        )
        target = self.folder / "mlx"
        form = ["--bits", 8, "--group-size", 64]
        self.done("convert", GOLDEN / "dense-bf16", target, "--to", "mlx", *form, "-q")
        real = json.loads(self.done("inspect", "--json", target))["totals"]["bytes"]
        self.assertEqual(plan["file_bytes"], real)

    def test_recommendation_needs_memory(self) -> None:
        known = self.done("plan", GOLDEN / "dense-bf16", "--memory-gb", 0.1)
        self.assertIn("none (recommended) on cpu", known)
        self.assertIn("fits: peak", known.splitlines()[-1])
        self.assertNotIn("recommended", self.done("plan", GOLDEN / "dense-bf16"))
        tight = self.done("plan", GOLDEN / "dense-bf16", "--memory-gb", 0.001)
        self.assertIn("does not fit", tight)


if __name__ == "__main__":
    unittest.main()
