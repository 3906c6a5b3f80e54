"""Why each line is there: the same experiment without it loses a task, and our scripts do not.

Without: the bare program of tests/bare.py, with one safeguard switched off. With: our scripts.
"""

import contextlib
import re
import sys
from pathlib import Path

import pika
import pytest
from conftest import WAITING
from waiting import wait_until

BARE = str(Path(__file__).with_name("bare.py"))


@pytest.fixture
def bare(open_console):
    """Start the bare program with `words`; new_task runs to its end, worker until it waits."""

    def start(role, *words, **options):
        console = open_console(sys.executable, BARE, role, *words, **options)
        if role == "worker":
            console.wait_for_line(WAITING)
        else:
            assert console.wait() == 0, console.transcript
        return console

    return start


def received(text):
    return r" \[x\] Received " + re.escape(text)


# --- basic_ack after the work ---


def kill_in_mid_task(one, new_task):
    new_task("Long" + "." * 20)
    one.wait_for_line(received("Long" + "." * 20))
    one.kill()


def test_without_manual_acknowledgement_a_killed_workers_task_is_lost(bare, new_task, queue):
    kill_in_mid_task(bare("worker", "--auto-ack"), new_task)
    wait_until(lambda: queue.consumers() == 0, "the dead worker is gone")
    assert queue.ready() == 0


def test_with_it_the_task_comes_back(worker, new_task, queue):
    kill_in_mid_task(worker(), new_task)
    wait_until(lambda: queue.ready() == 1, "the task is back in the queue")


# --- durable=True, and delivery_mode=Persistent ---


def test_a_restart_loses_what_is_not_durable_or_not_persistent(
    running_broker, bare, new_task, queue
):
    bare("new_task", "--queue", "persistent_in_transient", "--transient-queue", "Lost.")
    bare("new_task", "--queue", "transient_in_durable", "--transient", "Lost.")
    new_task("Kept.")
    running_broker.restart()

    def count(name):
        return queue.do(lambda ch: ch.queue_declare(name, passive=True).method.message_count)

    try:
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
            count("persistent_in_transient")
        assert count("transient_in_durable") == 0
        assert count("task_queue") == 1
    finally:
        queue.do(lambda ch: ch.queue_delete("transient_in_durable"))


# --- basic_qos(prefetch_count=1) ---


def received_by(workers, new_task, tmp_path):
    """Send heavy and light tasks in turn to two waiting workers; return how many each received."""
    tasks = ["heavy.........", "light", "heavy.", "light", "heavy.", "light"]
    (tmp_path / "tasks").write_text("\n".join(tasks))
    with (tmp_path / "tasks").open("rb") as stdin:
        new_task("-", stdin=stdin)

    def counts():
        return [sum("Received" in line for line in one.out) for one in workers]

    wait_until(lambda: sum(counts()) == len(tasks), "all tasks are received")
    return counts()


def test_without_prefetch_one_worker_starves_while_the_other_is_swamped(
    bare, new_task, queue, tmp_path
):
    workers = [bare("worker", "--no-prefetch") for _ in range(2)]
    assert received_by(workers, new_task, tmp_path) == [3, 3]


def test_with_it_the_idle_worker_takes_what_the_busy_one_cannot(worker, new_task, queue, tmp_path):
    workers = [worker(), worker()]
    assert received_by(workers, new_task, tmp_path) == [1, 5]


# --- confirm_delivery(), and mandatory=True ---


@contextlib.contextmanager
def full_queue(broker, queue):
    """`task_queue` takes one task and rejects the next, by a policy that is removed in the end."""
    limit = '{"max-length": 1, "overflow": "reject-publish"}'
    broker.ctl("set_policy", "full", "^task_queue$", limit, "--apply-to", "queues")
    try:
        queue.declare()
        queue.do(lambda ch: ch.basic_publish("", "task_queue", b"the one that fits"))
        wait_until(lambda: queue.ready() == 1, "the queue is full")
        yield
    finally:
        broker.ctl("clear_policy", "full")


def test_without_confirms_a_full_queue_swallows_a_task_in_silence(broker, queue, bare, new_task):
    with full_queue(broker, queue):
        assert bare("new_task", "--no-confirms", "Lost.").out == [" [x] Sent Lost."]
        console = new_task("Refused.", status=1)
        assert console.out == []
        assert "the queue is full" in console.err[0]
        assert queue.ready() == 1
