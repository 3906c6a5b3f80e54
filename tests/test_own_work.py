"""worker.py with its reader's own work: whatever that does, and however it fails."""

import os
import re
import signal
import time

from tests.harness.scripts import DONE, FAILED, RECEIVED
from tests.harness.waiting import wait_until

# --- Work that fails: what test_functions.py has of it is told in the same way ---


def test_work_that_fails_is_told_and_goes_back_and_the_worker_goes_on(worker_of, queue):
    """What it fails once is done the next time."""
    console = worker_of(
        "if body in vars(work): return\nvars(work)[body] = 'tried'\nraise ValueError('why')"
    )
    queue.publish(b"one", b"two")
    console.wait_for_line(DONE, count=2)
    queue.wait_for_counts(0, 0)
    told = [line for line in console.err if re.fullmatch(FAILED, line)]
    assert told == ["worker.py: cannot do the task: ValueError"] * 2
    assert console.err[-1] == "  ValueError: why"


def test_a_task_that_always_fails_is_tried_without_haste_and_heartbeats_go_on(
    worker_of, broker, queue
):
    console = worker_of("raise ValueError", url=broker.url(query="heartbeat=1"))
    sent = time.monotonic()
    queue.publish(b"bad")
    assert 4 <= console.wait_for_line(RECEIVED, count=5).at - sent < 4 * 3
    console.signal(signal.SIGTERM)
    assert console.wait() == 0
    assert not any("cannot consume" in line for line in console.err)
    wait_until(lambda: queue.ready() == 1, "the task is back")


# --- What it keeps: files, threads, processes ---


def test_a_dead_workers_processes_do_not_keep_its_task(worker_of, worker, queue):
    """They hold no connection: the task is elsewhere long before heartbeats could tell."""
    pool = "from concurrent.futures import ProcessPoolExecutor\nPOOL = ProcessPoolExecutor(1)"
    console = worker_of("POOL.submit(time.sleep, len(body)).result()", top=pool)
    queue.publish(b"")
    console.wait_for_line(DONE)  # the process is there
    queue.publish(b"x" * 60)
    console.wait_for_line(RECEIVED, count=2)
    other = worker()
    killed = time.monotonic()
    os.kill(console.process.pid, signal.SIGKILL)
    assert other.wait_for_line(RECEIVED).at - killed < 8


def test_its_thread_outlives_the_connection(worker_of, broker, queue):
    """So does what belongs to that thread, such as a SQLite connection."""
    console = worker_of(
        "vars(own).setdefault('here', body)\nprint(own.here)",
        top="import threading\nown = threading.local()",
    )
    for number, task in enumerate((b"first", b"second"), 1):
        queue.publish(task)
        console.wait_for_line(DONE, count=number)
        broker.ctl("close_all_connections", "test")
    assert console.out.count("b'first'") == 2
