"""What is told, and what becomes of tasks, when the network, a process or RabbitMQ fails.

Faults that concern one line of a script stand with the rest of what it promises: an overdue
acknowledgement, a reset and signals in test_worker.py; work that fails
in test_own_work.py; a broker that dies between publish and confirm, and output that cannot be
written in test_new_task.py; what no RabbitMQ is needed for in test_functions.py.
"""

import signal
import socket
import time

from tests.harness.scripts import (
    AGAIN,
    ANY_REASON,
    DONE,
    NEW_TASK,
    RECEIVED,
    SECRET,
    WAITING,
    WORKER,
    assert_told,
    confirmed,
    done,
    only_told_in_lines,
    received,
    received_line,
)
from tests.harness.waiting import wait_until

HEARTBEAT = 2  # seconds; the broker gives up a client that was silent for two of them


# --- The connection ---


def test_a_login_that_is_refused(start, broker, program):
    """RabbitMQ's log names the connection, and shows no password."""
    console = start(program, url=broker.url(f"guest:{SECRET}"))
    assert_told(console, "login refused; check AMQP_URL", f" 127.0.0.1:{broker.port}: ")
    name = f"{program} {socket.gethostname()} {console.process.pid}"
    wait_until(lambda: name in broker.log(), "it is in the log")
    assert SECRET not in broker.log()


def test_a_black_hole_in_mid_task_is_noticed_and_the_task_goes_to_another(worker, proxy, queue):
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
    queue.wait_for_counts(0, 0)
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


# --- The broker ---


def test_no_task_is_lost_with_the_broker(own_broker, worker, new_task, queue):
    """Of three workers two are busy and one is idle; each is back when the broker is."""
    url = own_broker.url(query=f"heartbeat={HEARTBEAT}")
    new_task("-", stdin=b"first...\nsecond...")
    consoles = [worker(url=url) for _ in range(3)]
    wait_until(lambda: len(received(*consoles)) == 2, "two workers are busy")
    own_broker.kill_when_settled()
    own_broker.start()
    tasks = {"first...", "second..."}
    wait_until(lambda: set(done(*consoles)) == tasks, "both are done")
    wait_until(lambda: queue.consumers() == 3, "every worker is back")
    queue.wait_for_counts(0, 0)
    for console in consoles:
        assert console.err
        only_told_in_lines(console)


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


def test_a_broker_that_freezes_before_or_after_the_connection_is_made(start, broker):
    """In the middle of many tasks, idle, and not yet connected."""
    publishing = start(NEW_TASK, "-", stdin=b"task\n" * 300_000)
    publishing.wait_for_line(r" \[x\] Sent task", count=200)
    worker = start(WORKER)
    worker.wait_for_line(DONE)
    with broker.frozen():
        frozen, place = time.monotonic(), f"127.0.0.1:{broker.port}"
        for console in [start(NEW_TASK), start(WORKER)]:
            assert_told(console, "no AMQP answer", place)
        line = assert_told(publishing, ANY_REASON, place, frozen)
        assert confirmed(line) == len(publishing.out)
        assert_told(worker, ANY_REASON, place, frozen)


def test_an_alarm_holds_up_producers_until_it_is_cleared_and_not_workers(
    broker, start, worker_of, queue, tmp_path
):
    """A producer that has waited long enough says why."""
    finish = tmp_path / "finish"
    console = worker_of(f"while not os.path.exists({str(finish)!r}):\n    time.sleep(0.1)")
    queue.publish(b"before")
    console.wait_for_line(RECEIVED)
    with broker.alarm():
        blocked = start(NEW_TASK)
        patient = start(NEW_TASK, "after", url=broker.url(query="blocked_connection_timeout=120"))
        assert_told(blocked, "RabbitMQ is short of memory or disk", f"127.0.0.1:{broker.port}")
        finish.touch()
        console.wait_for_line(DONE)
        assert blocked.out == patient.out == []
    console.wait_for_line(received_line("after"))
    assert console.err == patient.err == []
