"""worker.py with its reader's own work: whatever that does, and however it fails."""

import os
import re
import signal
import subprocess
import time

import pytest

from tests.harness.scripts import DONE, FAILED, RECEIVED, done
from tests.harness.waiting import wait_until

# --- Work that fails ---


@pytest.mark.parametrize("failure", ["ValueError", "SystemExit", "KeyboardInterrupt"])
def test_work_that_fails_is_told_and_goes_back_and_the_worker_goes_on(worker_of, queue, failure):
    """What it fails once is done the next time; test_functions.py has the words."""
    console = worker_of(
        f"if body in vars(work): return\nvars(work)[body] = 'tried'\nraise {failure}('why')"
    )
    queue.publish(b"one", b"two")
    console.wait_for_line(DONE, count=2)
    queue.wait_for_counts(0, 0)
    told = [line for line in console.err if re.fullmatch(FAILED, line)]
    assert told == [f"worker.py: cannot do the task: {failure}"] * 2
    assert re.fullmatch(r' *File ".*own\.py", line \d+, in work', console.err[-3])
    assert console.err[-1] == f"  {failure}: why"
    assert console.out.count(" [*] Waiting for messages. To exit press CTRL+C") == 1


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


def test_one_task_that_always_fails_does_not_keep_a_fleet_from_the_others(worker_of, queue):
    fleet = [worker_of("if body == b'bad': raise ValueError\ntime.sleep(0.01)") for _ in range(4)]
    queue.publish(b"bad")
    wait_until(lambda: any(one.err for one in fleet), "one has tried it")
    queue.publish(*(b"good %d" % number for number in range(400)))
    wait_until(lambda: len(done(*fleet)) == 400, "all the others are done")
    assert all(one.process.poll() is None for one in fleet)


# --- What it keeps: files, threads, processes ---


def test_sigterm_ends_an_idle_worker_as_python_ends(worker_of, queue, orderly, tmp_path):
    """What was written is in the file, and RabbitMQ heard a goodbye."""
    log, bye = tmp_path / "log", tmp_path / "bye"
    console = worker_of(
        "LOG.write('done\\n')",
        top=f"import atexit, pathlib\nLOG = open({str(log)!r}, 'a')\n"
        f"atexit.register(pathlib.Path({str(bye)!r}).touch)",
    )
    queue.publish(b"task")
    console.wait_for_line(DONE)
    queue.wait_for_counts(0, 0)
    console.signal(signal.SIGTERM)
    assert console.wait() == 0
    assert (log.read_text(), bye.exists(), console.err) == ("done\n", True, [])
    orderly(console)


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
    moved = other.wait_for_line(RECEIVED).at
    os.killpg(console.process.pid, signal.SIGKILL)  # what a sudden end leaves behind
    assert moved - killed < 8


def test_sigterm_leaves_no_process_of_the_work(worker_of, queue):
    pool = "from concurrent.futures import ProcessPoolExecutor\nPOOL = ProcessPoolExecutor(2)"
    console = worker_of("assert POOL.submit(abs, -1).result() == 1", top=pool)
    queue.publish(b"task")
    console.wait_for_line(DONE)
    console.signal(signal.SIGTERM)
    assert console.wait() == 0
    group = ["pgrep", "-g", str(console.process.pid)]  # multiprocessing's own process is the last
    wait_until(lambda: not subprocess.run(group, capture_output=True).stdout, "all have ended")
    assert console.err == []


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


def test_a_process_of_the_work_can_be_terminated(worker_of, queue):
    """A copy of the worker would have its handler of SIGTERM, which ends nothing."""
    console = worker_of(
        "child = multiprocessing.Process(target=time.sleep, args=(600,))\n"
        "child.start()\nchild.terminate()\nchild.join()",
        top="import multiprocessing",
    )
    queue.publish(b"task")
    console.wait_for_line(DONE)


# --- What is shown ---


def test_a_large_body_is_shown_in_part_and_costs_little_more_than_its_size(
    worker_of, new_task, queue
):
    """Whole, it would take 50 times its size. RabbitMQ 4 takes 16 MiB."""
    console = worker_of("if b'x' in body: raise ValueError(body)")
    line = os.urandom(16 << 20).translate(bytes.maketrans(b"x\r\n", b"yyy"))
    assert len(new_task("-", stdin=line).out[0]) < 10_100
    queue.publish(b"x" + b"\xff" * 1_000_000)
    console.wait_for_line(FAILED)
    assert console.out.count(" [x] Done") == 1
    assert max(map(len, console.out + console.err)) < 10_100
    assert int(console.status("VmHWM")) < 150 << 10  # KiB
