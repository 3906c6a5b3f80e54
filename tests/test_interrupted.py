"""What tests/ has started is gone when it is interrupted, though only its main process is told."""

import signal
import subprocess
import sys

import pytest

from tests.harness import brokers
from tests.harness.consoles import ROOT, Console
from tests.harness.waiting import wait_until

RUN = ["run", "-n", "2", "-k", "backlog or black_hole"]


@pytest.mark.parametrize(
    ("command", "signum"),
    [
        (RUN, signal.SIGINT),
        (RUN, signal.SIGTERM),
        (["demo"], signal.SIGTERM),
        (["soak"], signal.SIGTERM),
        *([(["bench"], signal.SIGTERM)] if sys.version_info >= (3, 11) else []),  # as it needs
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value.name,
)
def test_nothing_is_left_behind(tmp_path, command, signum):
    name, *words = command
    env = {"TMPDIR": str(tmp_path), "TEST_BROKER": kind()}
    console = Console(ROOT / "tests" / name, *words, env=env)
    try:
        wait_until(lambda: brokers_of(tmp_path), "a broker runs", 180)
        started = set(tmp_path.glob("work-queue-broker-*"))
        console.signal(signum)
        console.wait(60)
        wait_until(lambda: not processes_of(tmp_path), "no process is left", 60)
        wait_until(lambda: not brokers_of(tmp_path), "no broker is left", 60)
        wait_until(lambda: not any(folder.exists() for folder in started), "no folder is left")
    finally:
        console.close()


def kind():
    return next(name for name, kind in brokers.BROKERS.items() if kind is brokers.choose())


def brokers_of(folder):
    """Return what runs for the brokers whose folders are in `folder`."""
    if kind() == "local":
        return shown("pgrep", "-f", f"{folder}/work-queue-broker-")
    every = shown("docker", "ps", "--all", "--format", "{{.Names}}")
    every += shown("docker", "volume", "ls", "--format", "{{.Name}}")
    return [path for path in folder.glob("work-queue-broker-*") if path.name in every]


def processes_of(folder):
    """Return the processes whose TMPDIR is `folder`."""
    return [line for line in shown("ps", "axeww").splitlines() if f"TMPDIR={folder}" in line]


def shown(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout
