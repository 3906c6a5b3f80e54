"""Why each line is there: without it the tutorial's scripts lose a task; with it ours do not."""

import pika
import pytest

from tests.harness.queues import Queue
from tests.harness.scripts import DONE, NEW_TASK, assert_told, confirmed, received, received_line
from tests.harness.waiting import wait_until

# --- basic_ack after the work ---


def test_without_manual_acknowledgement_a_killed_workers_task_is_lost(tutorials, new_task, queue):
    """With it the task comes back: test_tutorial.py."""
    acknowledged_at_once = {
        "    ch.basic_ack(delivery_tag=method.delivery_tag)\n": "",
        "callback=callback)": "callback=callback, auto_ack=True)",
    }
    console = tutorials("worker", edits=acknowledged_at_once)
    new_task("Long" + "." * 20)
    console.wait_for_line(received_line("Long" + "." * 20))
    console.kill()
    wait_until(lambda: queue.consumers() == 0, "the dead worker is gone")
    assert queue.ready() == 0


# --- What ends the tutorial's worker, and not ours ---


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


# --- durable=True, and delivery_mode=Persistent ---


def test_a_restart_loses_what_is_not_durable_or_not_persistent(
    own_broker, tutorials, new_task, queue
):
    transient = {'"task_queue"': '"transient"', ", durable=True": ""}
    console = tutorials("new_task", "Lost.", edits=transient)
    if console.process.returncode:  # RabbitMQ 4.3 has no such queues unless it is told to
        assert "transient_nonexcl_queues" in str(console)
    passing = {'"task_queue"': '"durable"', "DeliveryMode.Persistent": "DeliveryMode.Transient"}
    tutorials("new_task", "Lost.", edits=passing)
    new_task("Kept.")
    own_broker.restart()

    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
        Queue(own_broker, "transient").ready()
    assert Queue(own_broker, "durable").ready() == 0
    assert queue.ready() == 1


# --- basic_qos(prefetch_count=1) ---


def test_without_prefetch_one_worker_starves_while_the_other_is_swamped(tutorials, new_task):
    """With it they share the heavy tasks: test_tutorial.py."""
    unlimited = {"channel.basic_qos(prefetch_count=1)\n": ""}
    workers = [tutorials("worker", edits=unlimited) for _ in range(2)]
    new_task("-", stdin=b"heavy.........\nlight\nheavy.\nlight\nheavy.\nlight")
    wait_until(lambda: len(received(*workers)) == 6, "all tasks are received")
    assert [len(received(one)) for one in workers] == [3, 3]


# --- confirm_delivery(), and mandatory=True ---


def test_without_confirms_a_full_queue_swallows_a_task_in_silence(broker, queue, tutorials, start):
    """With them, what it took before it was full is confirmed, and no more is told as sent."""
    limit = '{"max-length": 2, "overflow": "reject-publish"}'
    broker.ctl("set_policy", "full", "^task_queue$", limit, "--apply-to", "queues")
    try:
        console = start(NEW_TASK, "-", stdin=b"1\n2\n3\n4\n")
        line = assert_told(console, "is the queue full", f"127.0.0.1:{broker.port}")
        assert confirmed(line) == len(console.out) == queue.ready() < 4
        assert tutorials("new_task", "Lost.").out == [" [x] Sent Lost."]
        assert b"Lost." not in queue.take_all()
    finally:
        broker.ctl("clear_policy", "full")
