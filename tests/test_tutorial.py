"""What the tutorial says, and where its own scripts break. What it shows: test_readme.py."""

import time

import pytest

from tests.harness.scripts import (
    DONE,
    NEW_TASK,
    TUTORIAL,
    WAITING,
    assert_told,
    confirmed,
    received_line,
)
from tests.harness.waiting import wait_until


def test_every_dot_is_a_second_of_work(new_task, worker):
    console, sent = worker(), time.monotonic()
    new_task("-", stdin=b"Hello....\nHello\nHello\nHello\nHello\n")
    assert console.wait_for_line(DONE).at - sent >= 4
    assert console.wait_for_line(DONE, count=5).at - sent < 8  # also if each took one second more


# --- Putting It All Together: the lines of the listings are in test_functions.py ---


@pytest.fixture
def tutorials(start):
    """Start the tutorial's own `role` with `words`."""
    return lambda role, *words, **options: start(TUTORIAL[role], *words, **options)


def test_the_tutorials_own_programs_and_ours_exchange_tasks(tutorials, new_task, worker, queue):
    console = tutorials("worker")
    console.wait_for_line(WAITING)
    new_task("From", "ours")
    console.wait_for_line(received_line("From ours"))
    console.kill()
    assert tutorials("new_task", "From-theirs").wait() == 0
    console = worker()
    console.wait_for_line(received_line("From-theirs"))
    queue.wait_for_counts(0, 0)


# --- Where the tutorial's own break, and ours hold ---


def test_without_heartbeats_a_long_task_ends_the_worker_and_comes_again(tutorials, broker, queue):
    """With a heartbeat of one second; RabbitMQ's own of 60 allows three minutes."""
    queue.declare()
    queue.publish(b"long.........")
    console = tutorials("worker", url=broker.url(query="heartbeat=1"))
    assert console.wait() != 0
    assert console.err[-1].startswith("pika.exceptions.")
    wait_until(lambda: queue.ready() == 1, "the task is back")


def test_without_confirms_a_full_queue_swallows_a_task_in_silence(broker, queue, tutorials, start):
    """With them, what it took before it was full is confirmed, and no more is told as sent."""
    limit = '{"max-length": 2, "overflow": "reject-publish"}'
    broker.ctl("set_policy", "full", "^task_queue$", limit, "--apply-to", "queues")
    try:
        console = start(NEW_TASK, "-", stdin=b"1\n2\n3\n4\n")
        line = assert_told(console, "is the queue full", f"127.0.0.1:{broker.port}")
        assert confirmed(line) == len(console.out) == queue.ready() < 4
        theirs = tutorials("new_task", "Lost.")
        assert (theirs.wait(), theirs.out) == (0, [" [x] Sent Lost."])
        assert b"Lost." not in queue.take_all()
    finally:
        broker.ctl("clear_policy", "full")
