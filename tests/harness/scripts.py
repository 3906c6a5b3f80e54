"""The two scripts and the tutorial's own: how to run them, and how to read what they show."""

import re
from itertools import pairwise

from tests.harness.consoles import ROOT

NEW_TASK, WORKER = "new_task.py", "worker.py"
PEERS = ROOT / "tests/tools/peers"
TUTORIAL = {role: PEERS / f"tutorial_{role}.py" for role in ("new_task", "worker")}

# Lines of a worker, as regular expressions.
WAITING = r" \[\*\] Waiting for messages\. To exit press CTRL\+C"
RECEIVED, DONE = r" \[x\] Received .*", r" \[x\] Done"
FAILED = r"worker\.py: cannot do the task: .*"
AGAIN = r"worker\.py: cannot consume from \S+: .*; trying again"
IN_HAND = r"worker\.py: waiting for the work in hand"

SECRET = "s3cret"  # the password in URLs that fail; no line may show it
NOBODY = "127.0.0.1:1"  # nothing listens there
ANY_REASON = r"\w+ \w+"  # in words that pika or the system chose


def received_line(task):
    """Return the line that shows `task` as received, as a regular expression."""
    return r" \[x\] Received " + re.escape(task)


def received(*workers):
    """Return the tasks that `workers` have received, in each one's order."""
    prefix = " [x] Received "
    lines = [line for one in workers for line in one.out]
    return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]


def done(*workers):
    """Return the tasks that `workers` have done, in each one's order."""
    return [
        line.removeprefix(" [x] Received ")
        for one in workers
        for line, after in pairwise(one.out)
        if after == " [x] Done"
    ]


def only_told_in_lines(worker):
    """Fail if `worker` has shown anything on standard error but why it tries again, or waits."""
    for line in worker.err:
        assert re.fullmatch(f"{AGAIN}|{IN_HAND}", line)


def assert_told(console, why, place="", since=None):
    """Assert that `console` told its first failure in one line, as `why` says; return the line.

    It names `place`, shows no password, and came within 30 seconds of `since` (monotonic), or of
    the program's start. new_task.py ends with status 1 then. A worker tries again.
    """
    where = r"(new_task\.py: cannot send to|worker\.py: cannot consume from) \S+:\d+.*"
    line = console.wait_for_line(rf"{where}: .*({why}).*( \(tasks confirmed: \d+\)|; trying again)")
    if console.name.startswith(NEW_TASK):
        assert (console.wait(), len(console.err)) == (1, 1)
    else:
        only_told_in_lines(console)  # it may have tried again by now
    assert console.err[0] == line.text
    assert place in line.text
    assert line.at - (since or console.started) < 30
    assert SECRET not in "".join(console.err)
    return line.text


def confirmed(line):
    """Return how many tasks `line` says are confirmed."""
    return int(re.search(r" \(tasks confirmed: (\d+)\)$", line)[1])
