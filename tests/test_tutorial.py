"""What the tutorial says and shows, section by section, on our scripts; and where its own break."""

import time

import pytest

from tests.harness.scripts import (
    DONE,
    FIVE_TASKS,
    NEW_TASK,
    TUTORIAL,
    WAITING,
    assert_told,
    confirmed,
    done,
    received,
    received_line,
)
from tests.harness.waiting import wait_until

# --- What This Tutorial Focuses On ---


def test_every_dot_is_a_second_of_work(new_task, worker):
    console, sent = worker(), time.monotonic()
    new_task("-", stdin=b"Hello....\nHello\nHello\nHello\nHello\n")
    assert console.wait_for_line(DONE).at - sent >= 4
    assert console.wait_for_line(DONE, count=5).at - sent < 8  # also if each took one second more


# --- Round-Robin Dispatching ---


def test_five_tasks_go_to_the_workers_in_turn(new_task, workers):
    """To three: the README's two consoles are in test_readme.py."""
    workers = workers(3)
    for task in FIVE_TASKS:
        assert new_task(*task.split()).out == [f" [x] Sent {task}"]
    wait_until(lambda: len(done(*workers)) == 5, "all are done")
    for number, one in enumerate(workers):
        expected = [" [*] Waiting for messages. To exit press CTRL+C"]
        for task in FIVE_TASKS[number::3]:
            expected += [f" [x] Received {task}", " [x] Done"]
        assert one.out == expected


# --- Message Acknowledgment ---


def test_the_task_of_a_worker_that_is_interrupted_goes_to_another(new_task, worker, queue):
    first = worker()
    new_task("Long.....")
    first.wait_for_line(received_line("Long....."))
    second = worker()
    first.ctrl_c()
    second.wait_for_line(received_line("Long....."), timeout=10)
    second.wait_for_line(DONE)
    queue.wait_for_counts(0, 0)
    assert " [x] Done" not in first.out


# --- Message Durability ---


def test_queue_and_tasks_outlive_a_stop_and_a_crash_of_rabbitmq(own_broker, new_task, queue):
    new_task("Persistent.")
    own_broker.stop()
    own_broker.start()
    assert queue.ready() == 1
    own_broker.kill_when_settled()
    own_broker.start()
    assert queue.take_all() == [b"Persistent."]


# --- Fair Dispatch ---


def test_light_tasks_do_not_queue_behind_a_heavy_one(new_task, workers):
    """All odd tasks are heavy, all even ones light: the two workers share the heavy ones."""
    workers = workers(2)
    new_task("-", stdin=b"heavy...\nlight\n" * 3)
    wait_until(lambda: len(done(*workers)) == 6, "all are done")
    heavy = [sum("heavy" in line for line in one.out) for one in workers]
    assert sorted(heavy) == [1, 2]  # blindly dealt out, one worker would have all three


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


def test_a_body_that_is_no_utf_8_ends_one_worker_after_the_other(tutorials, worker, queue):
    queue.declare()
    queue.publish(b"\xff")
    for _ in range(2):
        console = tutorials("worker")
        assert console.wait() != 0
        assert "UnicodeDecodeError" in console.err[-1]
    console = worker()
    console.wait_for_line(DONE)
    assert received(console) == [r"\xff"]


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
