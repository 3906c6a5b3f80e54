"""Whatever fails, both scripts say so in one line, and why.

Most tests end in `assert_told`: one line that starts with the program's name and says what failed,
at which host and port, and why, without a traceback or a password, within 30 seconds.
"""

import contextlib
import socket
import time

import pika
import pytest

from tests.harness.scripts import (
    ANY_REASON,
    DONE,
    NEW_TASK,
    NOBODY,
    SECRET,
    WAITING,
    WORKER,
    assert_told,
    confirmed,
)
from tests.harness.waiting import wait_until

# --- Where nothing can be sent to or consumed from ---


def test_a_broker_that_does_not_let_us_in(start, broker, program, powerless):
    reasons = {
        f"amqp://u:{SECRET}@{NOBODY}/": "nothing listens there; start RabbitMQ",
        broker.url(f"guest:{SECRET}"): "login refused; check AMQP_URL",
        broker.url(powerless, vhost="lost"): "NOT_ALLOWED - vhost lost not found",
        broker.url(powerless): "ACCESS_REFUSED - .*access to queue 'task_queue'",
    }
    consoles = [start(program, url=url) for url in reasons]
    for console, (url, why) in zip(consoles, reasons.items(), strict=True):
        parameters = pika.URLParameters(url)
        assert_told(console, why, f" {parameters.host}:{parameters.port}: ")


def test_an_unusable_url_ends_both(start_alone, program):
    """Which they are: test_functions.py."""
    console = start_alone(program, url=f"amqp://admin:2024/{SECRET}@localhost/")
    assert console.wait() == 1
    [line] = console.err
    assert line.startswith(f"{program}: cannot use AMQP_URL; write amqp://user:password@host")
    assert SECRET not in line


# --- Several URLs ---


@pytest.fixture
def silent():
    """HOST:PORT of a listener that never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_worker_takes_them_in_turn(start, broker, silent):
    """Beside a silent one, each has at most one failure; tried at random, one in four has more."""
    urls = f"amqp://{silent}/?stack_timeout=4,{broker.url()}"
    workers = [start(WORKER, url=urls) for _ in range(10)]
    for one in workers:
        one.wait_for_line(WAITING, timeout=60)
        assert len(one.err) <= 1


# --- Both scripts' connections ---


def test_a_connection_is_named_after_script_host_and_process(start, broker, program, powerless):
    """RabbitMQ logs that, and no password."""
    console = start(program, url=broker.url(powerless))
    assert_told(console, "ACCESS_REFUSED")
    name = f"{program} {socket.gethostname()} {console.process.pid}"
    wait_until(lambda: name in broker.log(), "it is in the log")
    assert SECRET not in "".join(line for line in broker.log().splitlines() if name in line)


# --- No answer ---


def test_a_listener_that_never_answers(start_alone, program, silent):
    console = start_alone(program, url=f"amqp://u:{SECRET}@{silent}/")
    assert_told(console, "no AMQP answer; is RabbitMQ booting or frozen", silent)


def test_no_answer_to_a_publish_in_an_alarm(start, broker):
    """Ctrl+C ends it at once meanwhile."""
    with broker.alarm():
        blocked = start(NEW_TASK)
        patient = start(NEW_TASK, url=broker.url(query="blocked_connection_timeout=120"))
        wait_until(
            lambda: broker.ctl("list_connections", "state").count("blocked") == 2,
            "both wait for the end of the alarm",
        )
        pressed = time.monotonic()
        patient.ctrl_c()
        assert patient.wait() == 130
        assert time.monotonic() - pressed < 1
        assert_told(blocked, "RabbitMQ is short of memory or disk", f"127.0.0.1:{broker.port}")
        assert blocked.out == patient.out == []


def test_a_broker_that_freezes_before_or_after_the_connection_is_made(start, broker):
    """In the middle of many tasks, idle, and not yet connected."""
    tasks = b"task\n" * 300_000
    publishing = start(NEW_TASK, "-", stdin=tasks)
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


# --- A queue, a task or a broker that will not do ---


@pytest.mark.parametrize(
    "other",
    [{"auto_delete": True}, {"arguments": {"x-queue-type": "quorum"}}],
    ids=["auto-delete", "quorum"],
)
def test_a_task_queue_of_another_kind(start, broker, queue, program, other):
    queue.declare(**other)
    why = "PRECONDITION_FAILED - inequivalent arg"
    assert_told(start(program), why, f"127.0.0.1:{broker.port}")


@contextlib.contextmanager
def size_limit(broker, size):
    """Have the broker take tasks of up to `size` bytes."""
    usual = broker.ctl("eval", "element(2, application:get_env(rabbit, max_message_size)).")
    both = (  # RabbitMQ 3 looks at the first, 4 at the second
        "application:set_env(rabbit, max_message_size, {0}),"
        "persistent_term:put(max_message_size, {0})."
    )
    broker.ctl("eval", both.format(size))
    try:
        yield
    finally:
        broker.ctl("eval", both.format(int(usual)))


def test_a_task_larger_than_the_broker_takes(start, broker, queue):
    with size_limit(broker, 100_000):
        console = start(NEW_TASK, "-", stdin=b"small\n" + b"x" * 200_000 + b"\nnever\n")
        assert confirmed(assert_told(console, "larger than configured max size")) == 1
    assert console.out == [" [x] Sent small"]
    assert queue.take_all() == [b"small"]
