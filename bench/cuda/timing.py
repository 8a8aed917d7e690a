"""Times of several paths in turn, and how much time the whole run may take.

On a GPU the calls of a path are captured into a graph, which is replayed until its own launch is a
small part of what is timed; the graphs of all paths are replayed in turn, so that the state of the
card is the same for all. Each path goes through several copies of its weights, larger together than
the second-level cache. Calls launched one by one are timed too where a launch may cost as much as
the kernel. Without a GPU the same code times calls with the clock of the process.
"""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Call = Callable[[], object]
#: Seconds of a run of calls.
Stopwatch = Callable[[Callable[[], None]], float]

ROUNDS = 7
REPLAYED_SECONDS = 2e-3  # a graph is launched in some microseconds
MAX_REPLAYS = 400
CALLS_LAUNCHED = 100
CACHES = 4  # copies of the weights fill the second-level cache so many times
MAX_COPIES = 32
CACHE_OF_THE_CPU = 1 << 12  # one is as good as another: nothing is concluded from its times


@dataclass
class Timing:
    """Median seconds of a call; None where there is none, and then why."""

    graph: float | None = None
    launched: float | None = None
    note: str = ""


def reason(error: BaseException) -> str:
    """An error on one short line, for a cell of a table."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else 'no text'}"
    return text.replace("|", "/")[:160]


def with_events(run: Callable[[], None]) -> float:
    """Seconds on the GPU between the first and the last of what `run` enqueues."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def with_clock(run: Callable[[], None]) -> float:
    """Seconds of the process."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def captured(calls: list[Call]) -> Call:
    """A replay of all calls in one graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


class Timer:
    """Times paths on a device. `stopwatch` and `capture` stand for the device in tests."""

    def __init__(
        self,
        device: torch.device,
        rounds: int = ROUNDS,
        stopwatch: Stopwatch | None = None,
        capture: Callable[[list[Call]], Call] | None = None,
    ) -> None:
        on_gpu = device.type == "cuda"
        self.device, self.rounds = device, rounds
        self._stopwatch = stopwatch or (with_events if on_gpu else with_clock)
        self._capture = capture or (captured if on_gpu else None)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def copies(self, bytes_each: int) -> int:
        """How many copies of a weight fill the second-level cache several times."""
        cache = CACHE_OF_THE_CPU
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(2, min(MAX_COPIES, math.ceil(CACHES * cache / max(1, bytes_each))))

    def measure(self, paths: dict[str, list[Call]], launched: bool = False) -> dict[str, Timing]:
        """Median seconds of a call of each path. A path that fails has a note and no figure; one
        that cannot be captured is timed by launches only."""
        found = {name: Timing() for name in paths}
        replays: dict[str, tuple[Callable[[], None], int]] = {}
        loose: dict[str, tuple[Callable[[], None], int]] = {}
        for name, calls in paths.items():
            try:
                self._warm_up(calls)
            except Exception as error:  # a rival's own
                found[name].note = reason(error)
                continue
            try:
                replays[name] = self._replay(calls)
            except Exception as error:
                self._recover()
                found[name].note = "not captured: " + reason(error)
            if launched or name not in replays:
                loose[name] = self._launches(calls)
        for name, seconds in self._in_turn(replays, found).items():
            found[name].graph = seconds
        for name, seconds in self._in_turn(loose, found).items():
            found[name].launched = seconds
        return found

    def steps(self, paths: dict[str, Call]) -> dict[str, float]:
        """Median seconds of long calls, made once in a turn."""
        return self._in_turn({name: (_once(call), 1) for name, call in paths.items()}, {})

    def _warm_up(self, calls: list[Call]) -> None:
        for call in calls[:2]:
            call()
        self.synchronize()

    def _recover(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.synchronize()

    def _replay(self, calls: list[Call]) -> tuple[Callable[[], None], int]:
        """A function that makes every call several times, and how many calls those are."""
        replay = self._capture(calls) if self._capture else _all(calls)
        replay()
        once = max(self._stopwatch(lambda: _discard(replay())), 1e-7)
        times = max(1, min(MAX_REPLAYS, math.ceil(REPLAYED_SECONDS / once)))
        if self._capture is None:
            times = 1
        return _all([replay] * times), times * len(calls)

    def _launches(self, calls: list[Call]) -> tuple[Callable[[], None], int]:
        times = max(1, CALLS_LAUNCHED // len(calls)) if self.device.type == "cuda" else 1
        return _all(calls * times), times * len(calls)

    def _in_turn(
        self, runs: dict[str, tuple[Callable[[], None], int]], notes: dict[str, Timing]
    ) -> dict[str, float]:
        """Median seconds of a call of each run; what fails is left out, with a note."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(self.rounds):
            names = [name for name in runs if name in times]
            for name in names if turn % 2 else names[::-1]:
                run, count = runs[name]
                try:
                    times[name].append(self._stopwatch(run) / count)
                except Exception as error:
                    if name not in notes:
                        raise
                    del times[name]
                    notes[name].note = reason(error)
        return {name: statistics.median(values) for name, values in times.items()}


def _discard(_: object) -> None:
    pass


def _once(call: Call) -> Callable[[], None]:
    return lambda: _discard(call())


def _all(calls: list[Call]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


# ------------------------------------------------------------------ the time of a run


class Budget:
    """The seconds of a run, and within them those of its parts."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self._end = self._begin + seconds
        self.spent: dict[str, float] = {}
        self._part_end = self._end

    def passed(self) -> float:
        return self._clock() - self._begin

    def left(self) -> float:
        """Seconds of this part, or of the run outside of parts."""
        return min(self._part_end, self._end) - self._clock()

    @contextlib.contextmanager
    def part(self, name: str, seconds: float) -> Iterator[Budget]:
        """What runs inside asks left() before each of its items."""
        begin = self._clock()
        self._part_end = begin + seconds
        try:
            yield self
        finally:
            self._part_end = self._end
            self.spent[name] = self.spent.get(name, 0.0) + self._clock() - begin


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in what takes longer: a rival that compiles or tunes must not use up the run.
    Without effect outside of the main thread, where no signals arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
