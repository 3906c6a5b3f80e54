"""What happens to tasks when the network, a process or RabbitMQ fails.

Faults that concern one line of a script stand with the rest of what it promises: kill -9 and Ctrl+C
in test_tutorial.py; an overdue acknowledgement, a reset and signals in test_worker.py; work that
fails in test_own_work.py; input that stalls, a broker that dies between publish and confirm, and
output that cannot be written in test_new_task.py; frozen brokers in test_failures.py; a full queue
in test_why_each_line.py.
"""

import signal
import time

import pytest

from tests.harness.scripts import (
    AGAIN,
    ANY_REASON,
    DONE,
    NEW_TASK,
    RECEIVED,
    WAITING,
    WORKER,
    assert_told,
    done,
    only_told_in_lines,
    received,
    received_line,
)
from tests.harness.waiting import wait_until

HEARTBEAT = 2  # seconds; the broker gives up a client that was silent for two of them


def wait_until_all_is_done(queue, tasks, *consoles):
    """Wait until each of `tasks` was done and none is left; fail if there is one never sent."""
    wait_until(lambda: set(tasks) <= set(done(*consoles)), f"{tasks} are done", 90)
    queue.wait_for_counts(0, 0)
    assert set(done(*consoles)) == set(tasks)


# --- The worker ---


def test_a_frozen_worker_loses_its_task_to_another_and_comes_back(worker, broker, queue):
    url = broker.url(query=f"heartbeat={HEARTBEAT}")
    frozen = worker(url=url)
    queue.publish(b"task...")
    frozen.wait_for_line(RECEIVED)
    frozen.signal(signal.SIGSTOP)
    since = time.monotonic()
    other = worker(url=url)
    moved = other.wait_for_line(RECEIVED).at - since
    assert moved < 2 * 8  # two or three heartbeats; unasked, the script asks for one in 8 s
    frozen.signal(signal.SIGCONT)
    wait_until(lambda: queue.consumers() == 2, "both consume")
    only_told_in_lines(frozen)
    wait_until_all_is_done(queue, ["task..."], frozen, other)


def test_a_black_hole_in_mid_task_is_noticed_and_the_task_goes_to_another(
    worker, proxy, broker, queue
):
    """RabbitMQ and the worker each notice that they hear nothing, not even an end."""
    console = worker(url=proxy.url)
    queue.publish(b"task..")
    console.wait_for_line(RECEIVED)
    with proxy.black_hole():
        line = console.wait_for_line(AGAIN, timeout=2 * (HEARTBEAT + 5) + 10)
        assert "AMQPHeartbeatTimeout" in line.text
        other = worker()
        other.wait_for_line(RECEIVED)
    console.wait_for_line(WAITING, count=2)
    wait_until_all_is_done(queue, ["task.."], console, other)
    only_told_in_lines(console)


def test_a_queue_deleted_under_a_task_in_hand_is_declared_again(worker, queue):
    console = worker()
    queue.publish(b"task..")
    console.wait_for_line(RECEIVED)
    queue.delete()
    assert "ConsumerCancelled" in console.wait_for_line(AGAIN).text
    console.wait_for_line(WAITING, count=2)
    queue.publish(b"next")
    console.wait_for_line(received_line("next"))
    queue.wait_for_counts(0, 0)
    only_told_in_lines(console)


def test_a_signal_ends_it_while_it_connects_to_a_silent_broker(start, proxy):
    """Ctrl+C at once, SIGTERM when the try has ended."""
    with proxy.black_hole():
        late, at_once = (start(WORKER, url=f"{proxy.url}&stack_timeout=5") for _ in range(2))
        wait_until(lambda: len(proxy.connections) == 2, "both have begun to connect")
        late.signal(signal.SIGTERM)
        at_once.ctrl_c()
        assert at_once.wait(4) == late.wait() == 0
    assert at_once.err == []
    [line] = late.err
    assert "no AMQP answer" in line and "trying again" not in line


def test_a_backlog_of_100_000_is_begun_at_once(worker, queue):
    """It takes them one by one: prefetch bounds what a worker holds, however long the queue."""
    queue.declare()
    queue.publish(*(b"%d" % number for number in range(100_000)))
    wait_until(lambda: queue.ready() == 100_000, "all have arrived")
    console = worker()
    console.wait_for_line(DONE, count=1000)
    assert received(console)[:1000] == [str(number) for number in range(1000)]
    assert int(console.status("VmHWM")) < 60 << 10  # KiB


# --- The broker ---


@pytest.mark.parametrize("fault", ["stop", "kill_when_settled"])
def test_no_task_is_lost_with_the_broker(own_broker, worker, new_task, queue, fault):
    """Of three workers two are busy and one is idle; each is back when the broker is."""
    url = own_broker.url(query=f"heartbeat={HEARTBEAT}")
    tasks = ["first...", "second..."]
    for task in tasks:
        new_task(task)
    consoles = [worker(url=url) for _ in range(3)]
    wait_until(lambda: len(received(*consoles)) == 2, "two workers are busy")
    getattr(own_broker, fault)()
    own_broker.start()
    wait_until_all_is_done(queue, tasks, *consoles)
    wait_until(lambda: queue.consumers() == 3, "every worker is back")
    for console in consoles:
        assert console.process.poll() is None
        assert console.err
        only_told_in_lines(console)


def test_a_vhost_that_is_created_is_waited_for(start, broker):
    console = start(WORKER, url=broker.url(vhost="late"))
    console.wait_for_line(r".*vhost late not found.*; trying again")
    with broker.vhost("late"):
        console.wait_for_line(WAITING)


def test_a_booting_broker_is_waited_for_or_told_and_never_a_traceback(own_broker, start):
    """Clients come one after another, from a closed port over an open one to a ready broker."""
    own_broker.stop()
    own_broker.launch()
    console = start(WORKER)
    sent = start(NEW_TASK, "task")
    while sent.wait() != 0:
        assert_told(sent, ANY_REASON)
        assert time.monotonic() - console.started < 120
        sent = start(NEW_TASK, "task")
    console.wait_for_line(DONE)
    only_told_in_lines(console)


def test_an_alarm_holds_up_producers_until_it_is_cleared_and_not_workers(
    broker, start, worker_of, queue, tmp_path
):
    finish = tmp_path / "finish"
    console = worker_of(f"while not os.path.exists({str(finish)!r}):\n    time.sleep(0.1)")
    queue.publish(b"before")
    console.wait_for_line(RECEIVED)
    with broker.alarm():
        patient = broker.url(query="blocked_connection_timeout=120")  # long enough for rabbitmqctl
        producer = start(NEW_TASK, "after", url=patient)
        wait_until(lambda: "blocked" in broker.ctl("list_connections", "state"), "it is blocked")
        finish.touch()
        console.wait_for_line(DONE)
        assert producer.out == []
    console.wait_for_line(received_line("after"))
    assert console.err == producer.err == []
