"""What tests/run and tests/soak have started is gone when they are interrupted."""

import signal
import subprocess

import pytest

from tests.harness import brokers
from tests.harness.consoles import Console
from tests.harness.waiting import wait_until


@pytest.mark.parametrize(
    ("command", "signum"),
    [("run -n 2 -k every_dot", signal.SIGINT), ("soak", signal.SIGKILL)],
    ids=["run", "soak"],  # -k would find its own words in a name, and run this test within itself
)
def test_nothing_is_left_behind(tmp_path, command, signum):
    console = Console(*f"tests/{command}".split(), env={"TMPDIR": str(tmp_path)})
    try:
        wait_until(lambda: brokers_of(tmp_path), "a broker runs", 180)
        console.signal(signum)
        console.wait()
        wait_until(lambda: f"TMPDIR={tmp_path}" not in shown("ps", "axeww"), "no process is left")
        wait_until(lambda: not brokers_of(tmp_path), "no broker is left")
        wait_until(lambda: not list(tmp_path.glob("work-queue-broker-*")), "no folder is left")
    finally:
        console.close()


def brokers_of(folder):
    """Return what runs for the brokers whose folders are in `folder`."""
    if brokers.choose() is brokers.LocalBroker:
        return shown("pgrep", "-f", f"{folder}/work-queue-broker-")
    every = shown("docker", "ps", "--all", "--format", "{{.Names}}")
    every += shown("docker", "volume", "ls", "--format", "{{.Name}}")
    return [path for path in folder.glob("work-queue-broker-*") if path.name in every]


def shown(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout
