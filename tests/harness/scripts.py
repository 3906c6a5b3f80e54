"""The two scripts and the tutorial's own: how to run them, and how to read what they show."""

import re
import sys

import pytest

from tests.harness.consoles import ROOT
from tests.harness.waiting import wait_until

# With the interpreter of the tests, as a user would with the one of .venv.
NEW_TASK = [sys.executable, str(ROOT / "new_task.py")]
WORKER = [sys.executable, str(ROOT / "worker.py")]
BOTH = pytest.mark.parametrize("program", [NEW_TASK, WORKER], ids=["new_task.py", "worker.py"])
PEERS = ROOT / "tests/tools/peers"
TUTORIAL = {role: PEERS / f"tutorial_{role}.py" for role in ("new_task", "worker")}

# Lines of a worker, as regular expressions.
WAITING = r" \[\*\] Waiting for messages\. To exit press CTRL\+C"
RECEIVED, DONE = r" \[x\] Received .*", r" \[x\] Done"
FAILED = r"worker\.py: cannot do the task: .*"
AGAIN = r"worker\.py: cannot consume from \S+: .*; trying again"
IN_HAND = r"worker\.py: waiting for the work in hand"

SECRET = "s3cret"  # the password in URLs that fail; no line may show it


def received_line(task):
    """Return the line that shows `task` as received, as a regular expression."""
    return r" \[x\] Received " + re.escape(task)


def received(*workers):
    """Return the tasks that `workers` have received, in each one's order."""
    prefix = " [x] Received "
    return [line.removeprefix(prefix) for one in workers for line in one.out if prefix in line]


def done(*workers):
    """Return the tasks that `workers` have done."""
    found = []
    for one in workers:
        pairs = zip(one.out, one.out[1:], strict=False)
        found += [line[14:] for line, after in pairs if after == " [x] Done" and "Rec" in line]
    return found


def wait_until_done(count, *workers):
    wait_until(lambda: len(done(*workers)) == count, f"{count} tasks are done")


def only_told_in_lines(worker):
    """Fail if `worker` has shown anything on standard error but why it tries again, or waits."""
    for line in worker.err:
        assert re.fullmatch(f"{AGAIN}|{IN_HAND}", line), worker.transcript


def told(console, why, *places):
    """Assert that `console` told one failure, in one line, as `why` says; return the line.

    new_task.py ends with status 1. A worker tries again, whatever the reason; it is ended here.
    """
    if NEW_TASK[-1] in console.process.args:
        assert console.wait() == 1, console.transcript
        assert len(console.err) == 1, console.transcript
        line = next(line for line in console.lines if line.stream == "err")
        whole = rf"new_task\.py: cannot send to \S+:\d+.*: .*({why}).* \(tasks confirmed: \d+\)"
    else:
        whole = rf"worker\.py: cannot consume from \S+:\d+: .*({why}).*; trying again"
        line = console.wait_for_line(r"worker\.py: .*", 32)
        assert console.process.poll() is None, console.transcript
        console.ctrl_c()
        assert console.wait() == 0, console.transcript
        only_told_in_lines(console)  # it may have tried again by now
    assert re.fullmatch(whole, line.text), console.transcript
    for place in places:
        assert place in line.text, console.transcript
    assert SECRET not in "".join(console.err)
    return line


def confirmed(line):
    """Return how many tasks `line` says are confirmed."""
    return int(re.search(r" \(tasks confirmed: (\d+)\)$", line)[1])


def within_30_seconds(console, since):
    """Assert that the first failure was told within 30 seconds of `since` (monotonic)."""
    line = next(line for line in console.lines if line.stream == "err")
    assert line.at - since < 30, console.transcript
