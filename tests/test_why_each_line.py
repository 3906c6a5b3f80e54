"""Why each line is there: without it the tutorial's scripts lose a task; with it ours do not."""

import contextlib

import pika
import pytest

from tests.harness.scripts import received, received_line
from tests.harness.waiting import wait_until

# --- basic_ack after the work ---


def kill_in_mid_task(one, new_task):
    new_task("Long" + "." * 20)
    one.wait_for_line(received_line("Long" + "." * 20))
    one.kill()


def test_without_manual_acknowledgement_a_killed_workers_task_is_lost(tutorials, new_task, queue):
    acknowledged_at_once = {
        "    ch.basic_ack(delivery_tag=method.delivery_tag)\n": "",
        "callback=callback)": "callback=callback, auto_ack=True)",
    }
    kill_in_mid_task(tutorials("worker", edits=acknowledged_at_once), new_task)
    wait_until(lambda: queue.consumers() == 0, "the dead worker is gone")
    assert queue.ready() == 0


def test_with_it_the_task_comes_back(worker, new_task, queue):
    kill_in_mid_task(worker(), new_task)
    wait_until(lambda: queue.ready() == 1, "the task is back in the queue")


# --- durable=True, and delivery_mode=Persistent ---


def test_a_restart_loses_what_is_not_durable_or_not_persistent(
    running_broker, tutorials, new_task, queue
):
    transient = {'"task_queue"': '"transient"', ", durable=True": ""}
    console = tutorials("new_task", "Lost.", edits=transient)
    if console.process.returncode:  # RabbitMQ 4.3 has no such queues unless it is told to
        assert "transient_nonexcl_queues" in console.transcript
    passing = {'"task_queue"': '"durable"', "DeliveryMode.Persistent": "DeliveryMode.Transient"}
    tutorials("new_task", "Lost.", edits=passing)
    new_task("Kept.")
    running_broker.restart()

    def count(name):
        return queue.do(lambda ch: ch.queue_declare(name, passive=True).method.message_count)

    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
        count("transient")
    assert count("durable") == 0
    assert count("task_queue") == 1


# --- basic_qos(prefetch_count=1) ---


def shares(workers, new_task, tmp_path):
    """Send heavy and light tasks in turn to two waiting workers; return how many each received."""
    tasks = ["heavy.........", "light", "heavy.", "light", "heavy.", "light"]
    (tmp_path / "tasks").write_text("\n".join(tasks))
    with (tmp_path / "tasks").open("rb") as stdin:
        new_task("-", stdin=stdin)

    wait_until(lambda: len(received(*workers)) == len(tasks), "all tasks are received")
    return [len(received(one)) for one in workers]


def test_without_prefetch_one_worker_starves_while_the_other_is_swamped(
    tutorials, new_task, queue, tmp_path
):
    unlimited = {"channel.basic_qos(prefetch_count=1)\n": ""}
    workers = [tutorials("worker", edits=unlimited) for _ in range(2)]
    assert shares(workers, new_task, tmp_path) == [3, 3]


def test_with_it_the_idle_worker_takes_what_the_busy_one_cannot(worker, new_task, queue, tmp_path):
    workers = [worker(), worker()]
    assert shares(workers, new_task, tmp_path) == [1, 5]


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


def test_without_confirms_a_full_queue_swallows_a_task_in_silence(
    broker, queue, tutorials, new_task
):
    with full_queue(broker, queue):
        assert tutorials("new_task", "Lost.").out == [" [x] Sent Lost."]
        console = new_task("Refused.", status=1)
        assert console.out == []
        assert "the queue is full" in console.err[0]
        assert queue.ready() == 1
