"""The training program's heap: freed tensors are whole again, decided before the process starts."""

import os
import subprocess
import sys

import pytest

from quantal_train import heap

GLIBC = heap._is_glibc()
NAMES = ("GLIBC_TUNABLES", heap.SWITCH)


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in NAMES}


@pytest.mark.skipif(not GLIBC, reason="glibc's settings")
def test_settings_are_added_to_those_of_the_user():
    assert heap.tuned({"A": "1"}) == {"A": "1", "GLIBC_TUNABLES": ":".join(heap.TUNABLES)}
    mine = "glibc.malloc.arena_max=2"
    assert heap.tuned({"GLIBC_TUNABLES": mine}) == {
        "GLIBC_TUNABLES": ":".join((mine, *heap.TUNABLES))
    }


@pytest.mark.parametrize(
    "environment",
    [
        {"QUANTAL_MALLOC": "default"},
        {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=4"},
        {"GLIBC_TUNABLES": ":".join(heap.TUNABLES)},
    ],
)
def test_what_the_user_decided_stays(environment):
    assert heap.tuned(environment) is None


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "_is_glibc", lambda: False)
    assert heap.tuned({}) is None


PROGRAM = """
import os, sys
from quantal_train import heap
print("begun", flush=True)
heap.restart_whole()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], "torch" in sys.modules)
"""


@pytest.mark.parametrize("switch", [None, "default"])
def test_a_program_starts_again_once_with_its_arguments(switch):
    environment = clean() | ({heap.SWITCH: switch} if switch else {})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--flag", "a b"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    restarted = GLIBC and switch is None
    expected = ":".join(heap.TUNABLES) if restarted else "None"
    lines = done.stdout.splitlines()
    assert lines == ["begun"] * (2 if restarted else 1) + [f"{expected} ['--flag', 'a b'] False"]
