"""bench/cuda/check.py where no GPU is needed: what is timed, what is said of the targets, what a
run leaves behind, which rivals there are, and the step of training at a tiny size."""

import json
import pathlib
import subprocess
import sys
import time
import zipfile

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench" / "cuda"))

import check  # noqa: E402
import forms  # noqa: E402
import peers  # noqa: E402
import qlora_step  # noqa: E402
import speed  # noqa: E402
import targets  # noqa: E402
import timing  # noqa: E402
import wheels  # noqa: E402
from report import Report  # noqa: E402
from targets import Limits, Results, Row, Training  # noqa: E402

CPU = torch.device("cpu")


class Device:
    """A device whose calls take what they say and whose clock counts nothing else."""

    def __init__(self):
        self.now = 0.0
        self.graphs = []

    def work(self, seconds):
        def call():
            self.now += seconds

        return call

    def stopwatch(self, run):
        begin = self.now
        run()
        return self.now - begin

    def capture(self, calls):
        self.graphs.append(len(calls))

        def replay():
            for call in calls:
                call()

        return replay

    def timer(self, **options):
        return timing.Timer(CPU, stopwatch=self.stopwatch, capture=self.capture, **options)


# ------------------------------------------------------------------ times


def test_a_time_is_that_of_one_call_in_a_graph():
    device = Device()
    paths = {"a": [device.work(3e-6)] * 5, "b": [device.work(1e-6), device.work(3e-6)]}
    found = device.timer().measure(paths, launched=True)
    assert found["a"].graph == pytest.approx(3e-6)
    assert found["b"].graph == pytest.approx(2e-6)
    assert found["b"].launched == pytest.approx(2e-6)
    assert device.graphs == [5, 2]


def test_short_graphs_are_replayed_until_their_launch_does_not_matter():
    device = Device()
    spans = []

    def stopwatch(run):
        spans.append(device.stopwatch(run))
        return spans[-1]

    timing.Timer(CPU, rounds=3, stopwatch=stopwatch, capture=device.capture).measure(
        {"a": [device.work(10e-6)] * 2}
    )
    assert spans[0] == pytest.approx(20e-6)
    assert len(spans) == 4
    assert all(span == pytest.approx(timing.REPLAYED_SECONDS, rel=0.02) for span in spans[1:])


def test_a_path_that_fails_has_a_note_and_the_others_have_times():
    device = Device()

    def broken():
        raise ValueError("no kernel | for this\nsecond line")

    found = device.timer().measure({"broken": [broken], "good": [device.work(1e-6)]})
    assert found["broken"].graph is None
    assert found["broken"].note == "ValueError: no kernel / for this"
    assert found["good"].graph == pytest.approx(1e-6)


def test_a_path_that_cannot_be_captured_is_timed_by_launches():
    device = Device()

    def capture(calls):
        raise RuntimeError("operation not permitted when stream is capturing")

    timer = timing.Timer(CPU, stopwatch=device.stopwatch, capture=capture)
    found = timer.measure({"a": [device.work(4e-6)]})["a"]
    assert (found.graph, found.launched) == (None, pytest.approx(4e-6))
    assert found.note.startswith("not captured: RuntimeError")


def test_a_path_that_fails_later_is_left_out_of_the_turns():
    device = Device()
    calls = []

    def tires():
        calls.append(0)
        device.now += 1e-3
        if len(calls) > 6:
            raise RuntimeError("out of memory")

    found = device.timer().measure({"tires": [tires], "good": [device.work(1e-6)]})
    assert found["tires"].graph is None and "out of memory" in found["tires"].note
    assert found["good"].graph == pytest.approx(1e-6)


def test_a_budget_ends_parts_and_the_run():
    now = [100.0]
    budget = timing.Budget(50, clock=lambda: now[0])
    with budget.part("a", 20):
        now[0] += 15
        assert budget.left() == pytest.approx(5)
        now[0] += 10
        assert budget.left() < 0
    assert budget.left() == pytest.approx(25)
    with budget.part("b", 40):
        assert budget.left() == pytest.approx(25)
    assert budget.spent == {"a": 25, "b": 0}


def test_what_takes_too_long_is_stopped():
    with pytest.raises(TimeoutError, match="longer than"), timing.at_most(0.05):
        time.sleep(5)
    with timing.at_most(5):
        pass


@pytest.mark.parametrize("shares", [check.FULL, check.QUICK])
def test_the_parts_fit_the_time_that_the_documentation_states(shares):
    assert sum(shares.values()) <= (300 if shares is check.QUICK else 600)
    assert set(shares) == {"build", "checks", "limits", *check.MEASURED}


# ------------------------------------------------------------------ targets

COPY, GEMM = 4e12, 8e14


def row(part, m, path, graph, form="HQQ 4 bits", shape=(4096, 4096), moved=8_000_000):
    return Row(part, form, shape, m, path, graph, moved=moved)


def verdict(results, begin):
    (found,) = [v for v in targets.verdicts(results) if v.target.startswith(begin)]
    return found


def test_without_figures_every_target_is_open():
    assert {v.verdict for v in targets.verdicts(Results())} == {"open"}
    assert len(targets.verdicts(Results())) == 12


def test_shares_of_the_copy_bandwidth():
    results = Results(Limits(COPY, GEMM))
    results.rows = [row("forward", 1, "quantal: few rows", 2.1e-6)]
    assert verdict(results, "m 1, 4 bits").verdict == "met"  # 95 %
    results.rows.append(row("forward", 1, "quantal: few rows", 2.5e-6, shape=(14336, 4096)))
    found = verdict(results, "m 1, 4 bits")  # 80 %: the smallest counts
    assert found.verdict == "missed"
    assert found.figure == "80% (HQQ 4 bits, 14336 x 4096; smallest of 2)"
    results.rows.append(row("forward", 1, "quantal: few rows", 9e-6, form="8 bits"))
    assert verdict(results, "m 1, 4 bits").figure == found.figure  # not a form of 4 bits


def test_the_op_counts_where_it_was_measured_else_the_best_kernel():
    results = Results(Limits(COPY, GEMM))
    results.rows = [
        row("forward", 64, targets.TORCH, 10e-6),
        row("forward", 64, "quantal: tiles", 12e-6),
        row("forward", 64, "quantal: dequantize + torch", 8e-6),
    ]
    assert verdict(results, "m 64 .. 512").verdict == "met"
    results.rows.append(row("forward", 64, targets.OP, 12e-6))
    assert verdict(results, "m 64 .. 512").verdict == "missed"
    assert verdict(results, "m 64: >= 1.3x").figure.startswith("0.67x")


def test_times_of_one_kind_are_compared():
    theirs = Row("forward", "NF4", (1, 1), 1, "bitsandbytes", None, launched=30e-6)
    mine = Row("forward", "NF4", (1, 1), 1, "quantal", 2e-6, launched=10e-6)
    assert targets.ratio(theirs, mine) == pytest.approx(3)


def test_hqq_is_reckoned_up_to_70_billion_weights():
    results = Results(Limits(COPY, GEMM))
    shapes = list(targets.LLAMA_70B)
    results.rows = [row("quantize", 0, targets.OP, 0.1, shape=shape) for shape in shapes[1:]]
    assert verdict(results, "HQQ").verdict == "open"
    results.rows.append(row("quantize", 0, targets.OP, 0.1, shape=shapes[0]))
    found = verdict(results, "HQQ")  # 80 blocks of 7 layers
    assert (found.figure, found.verdict) == ("56.0 s (80 blocks of Llama 70B)", "met")
    weights = sum(rows * cols * n for (rows, cols), n in targets.LLAMA_70B.items())
    assert 80 * weights == pytest.approx(68.5e9, rel=0.01)
    # the solver has a target of its own
    assert verdict(results, "quantize, but").verdict == "open"


def test_training_is_compared_with_bf16_and_with_bitsandbytes():
    results = Results()
    results.training = [
        Training("bf16 LoRA", 1000.0, 3000),
        Training("quantal NF4", 950.0, 1000),
        Training("bitsandbytes NF4", note="bitsandbytes not installed"),
    ]
    assert verdict(results, "QLoRA step").verdict == "met"
    assert verdict(results, "QLoRA peak").verdict == "open"
    results.training[2] = Training("bitsandbytes NF4", 800.0, 900)
    assert verdict(results, "QLoRA peak").verdict == "missed"


# ------------------------------------------------------------------ what a run leaves behind


def test_the_page_is_written_after_everything_that_is_found(tmp_path):
    page = tmp_path / "cuda_check.md"
    report = Report(tmp_path, "CUDA kernels on a card", on_gpu=True)
    report.say("torch", "2.13 | x")
    assert "| torch | 2.13 / x |" in page.read_text()
    assert "not complete: running" in page.read_text()
    report.results.limits = Limits(COPY, GEMM)
    report.add([row("forward", 1, targets.TORCH, 8e-6, moved=32_000_000)])
    report.add([row("forward", 1, "quantal: few rows", 2e-6)])
    text = page.read_text()
    assert "| forward, HQQ 4 bits, 4096 x 4096, m 1 | quantal: few rows | 2.0 |" in text
    assert "| 100% | 0% | 4.00 |" in text
    assert "| m 16, 4 bits: >= 80 % of copy | not measured | open |" in text
    report.failed.append("dequantize NF4")
    report.leave_out("forward, NF4")
    report.state = "complete"
    report.write()
    text = page.read_text()
    assert "not complete" not in text
    assert "- FAILED dequantize NF4" in text and "- forward, NF4" in text
    raw = json.loads((tmp_path / "cuda_check.json").read_text())
    assert raw["rows"][1]["graph"] == 2e-6 and raw["state"] == "complete"
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_is_killed_leaves_what_it_has(tmp_path):
    program = """
import sys, os, signal
sys.path.insert(0, sys.argv[1])
import pathlib, torch, timing, speed, report
made = report.Report(pathlib.Path(sys.argv[2]), "x", True)
timer = timing.Timer(torch.device("cpu"), rounds=1)
bench = speed.Bench(None, timer, timing.Budget(60), made)
def items():
    yield "first", lambda: [speed.Row("forward", "NF4", (1, 1), 1, "first", 1e-6)]
    yield "second", lambda: os.kill(os.getpid(), signal.SIGKILL)
speed.run(bench, "forward", 60, items())
"""
    folder = str(pathlib.Path(speed.__file__).parent)
    done = subprocess.run([sys.executable, "-c", program, folder, str(tmp_path)], check=False)
    assert done.returncode != 0
    text = (tmp_path / "cuda_check.md").read_text()
    assert "| first |" in text and "not complete" in text


def test_items_behind_the_time_are_named_and_failures_go_on():
    report = Report(None, "x", on_gpu=True)
    now = [0.0]
    bench = speed.Bench(None, timing.Timer(CPU), timing.Budget(100, clock=lambda: now[0]), report)

    def slow():
        now[0] += 30
        return [row("forward", 1, "slow", 1.0)]

    def broken():
        raise RuntimeError("CUDA out of memory")

    items = [("broken", broken), ("slow", slow), ("late", slow)]
    speed.run(bench, "forward", 20, iter(items))
    assert [r.path for r in report.results.rows] == ["slow"]
    assert report.left_out == ["broken: RuntimeError: CUDA out of memory", "late"]
    assert report.seconds == {"forward": 30}


# ------------------------------------------------------------------ arguments, rivals, wheels


def test_arguments(tmp_path, capsys):
    library = ["--device", "cpu", "--library", "x.so"]
    args = check.parsed(library)
    assert (args.parts, args.output, args.seconds) == (list(check.MEASURED), None, 540)
    assert check.parsed([*library, "--quick"]).seconds == 270
    assert check.parsed([*library, "--checks-only"]).parts == []
    for wrong, words in (
        (["--device", "cpu"], "needs --library"),
        ([*library, "--wheels", str(tmp_path)], "holds no wheels"),
        ([*library, "--parts", "sideways"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            check.parsed(wrong)
        assert words in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            check.parsed([])
        assert "no CUDA device" in capsys.readouterr().err


def test_rivals_that_are_missing_broken_or_something_else(tmp_path, monkeypatch):
    (tmp_path / "marlin").mkdir()
    (tmp_path / "marlin" / "__init__.py").write_text("")
    (tmp_path / "gemlite").mkdir()
    (tmp_path / "gemlite" / "__init__.py").write_text("raise ImportError('no GPU')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("marlin", "gemlite"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = peers.versions()
    assert set(found) == set(peers.PACKAGES)
    assert "another package of this name" in found["marlin"]
    assert found["gemlite"].startswith("does not import: ImportError")
    assert not peers.usable(found, "marlin") and not peers.usable(found, "gemlite")
    nothing = dict.fromkeys(peers.PACKAGES, "not installed")
    with_reasons = {peer.name: why for peer, why in peers.of_form("HQQ 4 bits", 1, nothing)}
    assert with_reasons["torch int4 (tinygemm)"] == ""
    assert with_reasons["hqq: gemlite"] == "hqq not installed; gemlite not installed"
    assert list(peers.of_form("MLX 4 bits", 1, nothing)) == []
    assert "torch int4 (tinygemm)" not in {
        peer.name for peer, _ in peers.of_form("HQQ 4 bits", 2048, nothing)
    }


def test_a_rival_that_takes_too_long_is_asked_once(monkeypatch):
    asked = []

    def slow(work):
        asked.append(work.form)
        time.sleep(5)

    def broken(work):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(speed, "SECONDS_OF_A_RIVAL", 0.05)
    monkeypatch.setattr(
        peers,
        "PEERS",
        (peers.Peer("slow", (), ("F",), slow), peers.Peer("broken", (), ("F",), broken)),
    )
    bench = speed.Bench(None, timing.Timer(CPU), timing.Budget(60), Report(None, "x", True))
    work = peers.Work("F", 4, 4, torch.zeros(1, 4), 1)
    for turn in range(2):
        paths, notes = {}, {}
        speed._add_rivals(bench, work, paths, notes)
        assert paths == {}
        assert notes["broken"] == "RuntimeError: no kernel image"
        assert ("slow" in notes) == (turn == 0)
    assert asked == ["F"]


def test_torch_rivals_run_on_this_machine():
    work = peers.Work("x", 32, 256, torch.randn(1, 256).bfloat16(), 2)
    for make in (peers.torch_int4, peers.torch_int8):
        calls = make(work)
        assert len(calls) == 2
        assert [tuple(call().shape) for call in calls] == [(1, 32)] * 2


def _wheel(folder, name, files):
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    records = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in records.items():
            archive.writestr(inside, text)
        lines = "".join(f"{inside},,\n" for inside in records)
        archive.writestr(f"{info}/RECORD", lines + f"{info}/RECORD,,\n")
    return path


def test_wheels_are_installed_without_a_network(tmp_path, monkeypatch):
    folder = tmp_path / "wheels"
    folder.mkdir()
    good = _wheel(folder, "a_rival_of_the_tests", {"a_rival_of_the_tests.py": "VERSION = 7\n"})
    (folder / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert wheels.install(folder, tmp_path / "target") == ["broken-1.0-py3-none-any.whl"]
    import a_rival_of_the_tests

    assert a_rival_of_the_tests.VERSION == 7
    found = wheels.sizes(folder)
    assert found[good.name] == good.stat().st_size
    assert wheels.described({"a": 1_500_000, "b": 1_000_000}) == "2 wheels, 2.5 MB"


def test_one_cuda_version_of_bitsandbytes_is_kept(tmp_path):
    names = [
        f"bitsandbytes/libbitsandbytes_{x}.so" for x in ("cpu", "cuda128", "cuda130", "rocm72")
    ]
    files = {**dict.fromkeys(names, "x"), "bitsandbytes/__init__.py": ""}
    wheel = _wheel(tmp_path, "bitsandbytes", files)
    wheels.slim(wheel, "130")
    with zipfile.ZipFile(wheel) as archive:
        kept = [name for name in archive.namelist() if name.endswith(".so")]
        record = archive.read("bitsandbytes-1.0.dist-info/RECORD").decode()
    assert kept == [names[0], names[2]]
    assert "cuda130" in record and "cuda128" not in record and "rocm" not in record
    with pytest.raises(SystemExit, match="no CUDA 999"):
        wheels.slim(wheel, "999")


# ------------------------------------------------------------------ plans and training


def test_plans_hold_what_the_targets_are_about():
    full = speed.Plan()
    assert set(full.few) == {1, 16} and {64, 128, 256, 512, 2048} <= set(full.many)
    assert set(full.back) == {1, 16, 64, 512, 2048}
    assert full.shapes[0] == (4096, 4096) and full.shapes[-1] == (28672, 8192)
    bench = speed.Bench(None, timing.Timer(CPU), timing.Budget(1), Report(None, "x", True))
    for plan in (full, speed.QUICK, speed.TINY):
        names = [what for what, _ in speed.products(bench, plan)]
        names += [what for what, _ in speed.backwards(bench, plan)]
        names += [what for what, _ in speed.weights_as_bytes(bench, plan)]
        names += [what for what, _ in speed.int8s(bench, plan)]
        assert len(names) == len(set(names))
    assert set(targets.FOUR_BITS) <= set(speed.FORMS)
    assert targets.SOLVER in forms.ENCODED


def test_the_model_has_the_weights_that_it_is_said_to_have():
    size = qlora_step.TINY
    model = qlora_step.random_model(size, CPU)
    assert sum(p.numel() for p in model.parameters()) == size.weights()
    assert 1.0e9 < qlora_step.Size().weights() < 1.2e9 and qlora_step.Size().seq == 2048
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("peft", [False, True], ids=["own adapters", "PEFT"])
def test_a_step_of_training_lowers_the_loss_and_quantal_follows_bf16(peft):
    if peft:
        pytest.importorskip("peft")
    tokens = torch.randint(0, qlora_step.TINY.words, (1, qlora_step.TINY.seq))
    losses = {}
    for side in ("bf16 LoRA", "quantal NF4"):
        model = qlora_step.with_lora(
            qlora_step.SIDES[side](qlora_step.random_model(qlora_step.TINY, CPU)), peft
        )
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * len(qlora_step.LINEARS) * qlora_step.TINY.blocks
        step = qlora_step.stepper(model, tokens)
        losses[side] = [float(step()) for _ in range(30)]
        assert losses[side][-1] < losses[side][0]
    assert losses["quantal NF4"][0] == pytest.approx(losses["bf16 LoRA"][0], rel=0.02)


def test_training_names_missing_rivals_and_times_the_others():
    found = {**dict.fromkeys(peers.PACKAGES, "not installed"), "quantal": "installed"}
    report = Report(None, "x", on_gpu=False)
    timer = timing.Timer(CPU, rounds=1)
    qlora_step.run(timer, timing.Budget(600), report, qlora_step.TINY, found)
    sides = {t.side: t for t in report.results.training}
    assert list(sides) == list(qlora_step.SIDES)
    assert sides["bitsandbytes NF4"].note == "bitsandbytes not installed"
    assert sides["bitsandbytes NF4"].tokens_per_second is None
    for side in ("bf16 LoRA", "quantal NF4", "quantal HQQ"):
        assert sides[side].tokens_per_second > 0 and sides[side].loss > 0
        assert sides[side].peak is None  # there is no device memory here
    assert "own" in report.setting[-1][1]
