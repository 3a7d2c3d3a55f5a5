"""The watchdog waits for every launch, names the one that hangs and ends the process; events and clock are our own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

from dsv4lab.kernels._common import launch
from dsv4lab.kernels._common.launch import Gpu, give_name, name_of, wait_or_exit, watchdog


class Clock:
    """Time that passes only when someone sleeps or looks."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, 0

    def __call__(self) -> float:
        self.now += 1e-4
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += 1


class Event:
    """Done at a time; records where it was put."""

    def __init__(self, clock: Clock, done_at: float, log: list[str] | None = None, name: str = "") -> None:
        self.clock, self.done_at, self.log, self.name = clock, done_at, log, name

    def record(self) -> None:
        assert self.log is not None
        self.log.append(self.name)

    def query(self) -> bool:
        return self.clock.now >= self.done_at


class Exit(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(status: int) -> None:
        raise Exit(status)

    monkeypatch.setattr(launch.os, "_exit", end)


def kernel(*_: Any) -> None:
    """A launch."""


give_name(kernel, "dsv4lab.kernels.gemm.slow", "Config(tokens=8)")
ARGS = (torch.zeros(3, 64, dtype=torch.bfloat16), 7)


def wait(clock: Clock, before: float, after: float, seconds: float) -> None:
    wait_or_exit(kernel, ARGS, Event(clock, before), Event(clock, after), seconds, clock=clock, sleep=clock.sleep)


def test_a_launch_that_ends_is_waited_for() -> None:
    clock = Clock()
    wait(clock, 0, 0.5, 2.0)
    assert 0.5 <= clock.now < 0.51 and clock.slept > 100, "after a moment it sleeps between questions"
    clock = Clock()
    wait(clock, 0, 5e-4, 2.0)
    assert not clock.slept, "a quick kernel is not slept over"


@pytest.mark.parametrize(("before", "what"), [(0.0, "kernel has"), (9.0, "work ahead of this kernel in its stream has")])
def test_a_launch_that_hangs_is_named(ends: None, capfd: pytest.CaptureFixture[str], before: float, what: str) -> None:
    clock = Clock()
    with pytest.raises(Exit, match="70"):
        wait(clock, before, 9.0, 2.0)
    assert 2.0 < clock.now < 2.01
    said = f"dsv4lab watchdog: {what} not ended after 2 s: dsv4lab.kernels.gemm.slow 'Config(tokens=8)', arguments"
    assert f"{said} bfloat16[3, 64] on cpu, 7\n" in capfd.readouterr().err


def test_an_error_of_a_launch_says_whose_it_is() -> None:
    class Broken(Event):
        def query(self) -> bool:
            raise RuntimeError("an illegal memory access was encountered")

    clock = Clock()
    with pytest.raises(RuntimeError, match="illegal") as caught:
        wait_or_exit(kernel, ARGS, Event(clock, 0), Broken(clock, 0), 1.0)
    assert "after the launch of dsv4lab.kernels.gemm.slow" in caught.value.__notes__[0]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[Gpu, list[str], dict[str, Any]]:
    """A GPU that is none, what happens on it in order, and its state."""
    log: list[str] = []
    state: dict[str, Any] = {"capturing": False, "names": iter(("before", "after"))}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "device", lambda device: watchdog(1.0))  # any context manager will do
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(Clock(), 0, log, next(state["names"])))
    found = Gpu.__new__(Gpu)
    found.device = torch.device("cuda:0")
    return found, log, state


def test_launches_are_watched_inside_the_context_only(gpu: tuple[Gpu, list[str], dict[str, Any]]) -> None:
    place, log, state = gpu
    place.call(log.append, "alone")
    with watchdog(3.0):
        place.call(log.append, "watched")
    state["capturing"] = True
    with watchdog(3.0):
        place.call(log.append, "captured")
    assert log == ["alone", "before", "watched", "after", "captured"]


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_rejects_times_that_are_none(seconds: float) -> None:
    with pytest.raises(ValueError, match="watchdog's seconds must be positive and finite, got"), watchdog(seconds):
        pass


@pytest.mark.parametrize(("text", "said"), [("2.5", "2.5"), ("", "None"), ("0", "None"), ("soon", "must be a number")])
def test_the_environment_sets_it(text: str, said: str) -> None:
    program = textwrap.dedent(
        """
        try:
            from dsv4lab.kernels._common import launch
            print(launch._watchdog.get())
        except ValueError as error:
            print(error)
        """
    )
    environment = {**os.environ, "DSV4LAB_WATCHDOG": text}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert said in done.stdout


def test_a_hung_process_ends_with_its_status() -> None:
    program = "from dsv4lab.kernels._common import launch; launch._exit('it hangs')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (70, "it hangs\n")


def test_a_function_without_a_name_is_shown_as_it_is() -> None:
    assert repr(print) in str(name_of(print))


@pytest.mark.gpu
def test_a_kernel_that_spins_ends_the_process() -> None:
    program = textwrap.dedent(
        """
        import torch
        from dsv4lab.kernels._common.launch import Gpu, watchdog
        gpu = Gpu(torch.device("cuda:0"))
        with watchdog(0.2):
            gpu.call(torch.cuda._sleep, 1_000)
            gpu.call(torch.cuda._sleep, 20_000_000_000)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 70 and "kernel has not ended after 0.2 s" in done.stderr and "20000000000" in done.stderr
