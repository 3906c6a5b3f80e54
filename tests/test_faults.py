"""The fault table: one test a row, named for what the user sees, with tasks in hand.

Rows that concern one line of a script stand with the rest of what it promises: kill -9 and Ctrl+C
in test_tutorial.py; an overdue acknowledgement, work that fails and signals in test_worker.py;
input that stalls and output that cannot be written in test_new_task.py; frozen and full brokers as
one script sees them in test_failures.py.
"""

import re
import signal
import subprocess
import time

import pytest

from tests.harness.proxy import Proxy
from tests.harness.scripts import (
    AGAIN,
    DONE,
    RECEIVED,
    WAITING,
    confirmed,
    done,
    only_told_in_lines,
    received,
    told,
    within_30_seconds,
)
from tests.harness.waiting import wait_until

HEARTBEAT = 2  # seconds; the broker gives up a client that was silent for two of them


@pytest.fixture
def proxy(broker):
    """A way to the broker that can be cut; `proxy.url` leads through it."""
    proxy = Proxy(broker.port)
    proxy.url = broker.url(port=proxy.port, query=f"heartbeat={HEARTBEAT}")
    yield proxy
    proxy.close()


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
    try:
        other = worker(url=url)
        moved = other.wait_for_line(RECEIVED).at - since
        # RabbitMQ takes two or three heartbeats; unasked, the script asks for one in 8 s.
        assert moved < 2 * 8
    finally:
        frozen.signal(signal.SIGCONT)
    frozen.wait_for_line(WAITING, count=2)
    only_told_in_lines(frozen)
    other.kill()
    queue.publish(b"next")
    frozen.wait_for_line(r" \[x\] Received next")
    queue.wait_for_counts(0, 0)


def test_a_connection_reset_in_mid_task_is_told_and_the_task_comes_again(worker, proxy, queue):
    console = worker(url=proxy.url)
    queue.publish(b"task..")
    console.wait_for_line(RECEIVED)
    proxy.reset()
    assert "StreamLostError" in console.wait_for_line(AGAIN).text
    console.wait_for_line(RECEIVED, count=2)
    wait_until_all_is_done(queue, ["task.."], console)
    only_told_in_lines(console)


@pytest.mark.parametrize("ways", [["to broker"], ["to client"]], ids=["out", "in"])
def test_a_black_hole_in_mid_task_is_noticed_and_the_task_goes_to_another(
    worker, proxy, broker, queue, ways
):
    """A hole towards the broker moves the task at once; the worker notices any, and tells."""
    console = worker(url=proxy.url)
    queue.publish(b"task..")
    console.wait_for_line(RECEIVED)
    with proxy.black_hole(*ways):
        line = console.wait_for_line(AGAIN, timeout=2 * (HEARTBEAT + 5) + 10)
        assert "AMQPHeartbeatTimeout" in line.text or ways == ["to broker"]  # whose end arrives
        other = worker(url=broker.url(query=f"heartbeat={HEARTBEAT}"))
        if ways != ["to client"]:  # the broker hears nothing of the worker, not even its end
            other.wait_for_line(r" \[x\] Received task\.\.")
    console.wait_for_line(WAITING, count=2, timeout=60)
    wait_until_all_is_done(queue, ["task.."], console, other)
    only_told_in_lines(console)


def test_a_slow_network_is_only_slow(worker, new_task, proxy, queue):
    with proxy.slow(20_000):
        console = worker(url=proxy.url)
        new_task("x" * 60_000, url=proxy.url)
        console.wait_for_line(DONE, timeout=30)
    assert console.err == []


def test_a_queue_deleted_under_a_task_in_hand_is_declared_again(worker, queue):
    console = worker()
    queue.publish(b"task..")
    console.wait_for_line(RECEIVED)
    queue.delete()
    assert "ConsumerCancelled" in console.wait_for_line(AGAIN).text
    console.wait_for_line(WAITING, count=2)
    queue.publish(b"next")
    console.wait_for_line(r" \[x\] Received next")
    queue.wait_for_counts(0, 0)
    only_told_in_lines(console)


def test_a_vhost_deleted_while_it_works_is_waited_for(worker, broker, queue):
    def add():
        broker.ctl("add_vhost", "passing")
        broker.ctl("set_permissions", "--vhost", "passing", "guest", ".*", ".*", ".*")

    add()
    try:
        console = worker(url=broker.url(vhost="passing"))
        broker.ctl("delete_vhost", "passing")
        console.wait_for_line(r".*vhost passing not found.*trying again.*")
        add()
        console.wait_for_line(WAITING, count=2)
    finally:
        broker.ctl("delete_vhost", "passing")
    only_told_in_lines(console)


def test_a_signal_ends_it_while_it_connects_to_a_silent_broker(worker, proxy):
    """Ctrl+C at once, SIGTERM when the try has ended."""
    with proxy.black_hole():
        consoles = [worker(waiting=False, url=proxy.url + "&stack_timeout=5") for _ in range(2)]
        wait_until(lambda: len(proxy.sockets) == 4, "both have begun to connect")
        for console, signum in zip(consoles, (signal.SIGTERM, signal.SIGINT), strict=True):
            console.signal(signum)
        late, at_once = consoles
        assert at_once.wait(4) == late.wait() == 0
        assert at_once.err == []
        [line] = late.err
        assert "no AMQP answer" in line and "trying again" not in line


def test_a_task_of_16_mib_is_sent_and_done(start_new_task, worker, queue, tmp_path):
    """As much as RabbitMQ 4 takes by default."""
    body = b"x" * (16 << 20)
    (tmp_path / "task").write_bytes(body)
    with (tmp_path / "task").open("rb") as stdin:
        sent = start_new_task("-", stdin=stdin)
    console = worker()
    console.wait_for_line(DONE, timeout=60)
    assert sent.wait() == 0
    assert received(console) == ["x" * 1000]  # more is not shown
    assert console.err == sent.err == []
    queue.wait_for_counts(0, 0)


def test_a_backlog_of_100_000_is_begun_at_once(worker, queue):
    """It takes them one by one: prefetch bounds what a worker holds, however long the queue."""
    queue.declare()

    def fill(channel):
        for number in range(100_000):
            channel.basic_publish("", "task_queue", b"%d" % number)

    queue.do(fill)
    wait_until(lambda: queue.ready() == 100_000, "all have arrived")
    console = worker()
    console.wait_for_line(DONE, count=1000)
    assert received(console)[:1000] == [str(number) for number in range(1000)]
    memory = re.search(r"VmHWM:\s+(\d+) kB", proc_status(console))[1]
    assert int(memory) < 60 << 10
    console.ctrl_c()
    console.wait()
    finished = len(done(console))
    wait_until(lambda: queue.ready() in (100_000 - finished, 100_001 - finished), "the rest waits")


def proc_status(console):
    with open(f"/proc/{console.process.pid}/status") as status:
        return status.read()


# --- The producer ---


@pytest.fixture
def stream(start_new_task):
    """Start `new_task.py -`, and have what was given to it confirmed."""

    def start(url=None):
        console = start_new_task("-", stdin=subprocess.PIPE, url=url)
        say(console, "before")
        console.wait_for_line(r" \[x\] Sent before")
        return console

    return start


def say(console, *lines):
    console.stdin.write("".join(f"{line}\n" for line in lines).encode())
    console.stdin.flush()


PATIENT = "blocked_connection_timeout=120"  # the default is too short to look with rabbitmqctl


def wait_until_blocked(broker):
    wait_until(lambda: "blocked" in broker.ctl("list_connections", "state"), "a blocked connection")


def test_a_black_hole_in_mid_stream_says_how_many_are_confirmed(proxy, stream, queue):
    console = stream(proxy.url)
    with proxy.black_hole():
        say(console, "after")
        assert confirmed(told(console, ".+").text) == 1
    assert console.out == [" [x] Sent before"]
    assert queue.take()[0] == b"before"


# --- The broker ---


def test_a_broker_that_dies_between_publish_and_confirm(
    running_broker, worker, start_new_task, queue
):
    """A worker that waits tells it as well, and tries again."""
    place = f"127.0.0.1:{running_broker.port}"
    yes = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    try:
        producer, console = start_new_task("-", stdin=yes.stdout), worker()
        console.wait_for_line(r" \[x\] Done", count=100)
        running_broker.kill()
        died = time.monotonic()
        line = told(producer, r"\w+ \w+", place)
        assert confirmed(line.text) == len(producer.out)
        console.wait_for_line(rf"worker\.py: cannot .*{place}.*; trying again", 30)
        within_30_seconds(producer, died)
        within_30_seconds(console, died)
    finally:
        yes.kill()
        yes.stdout.close()
        yes.wait()


def strike(broker, fault):
    """Make `fault` happen to the broker, and have it run again."""
    if fault == "freeze":
        with broker.frozen():
            time.sleep(3 * HEARTBEAT)  # longer than it takes the broker to give up a client
    else:
        getattr(broker, fault)()
        broker.start()


@pytest.mark.parametrize(
    ("fault", "workers"), [("kill", 0), ("stop", 1), ("kill", 3), ("freeze", 3)]
)
def test_no_task_is_lost_with_the_broker(running_broker, worker, new_task, queue, fault, workers):
    """Of three workers two are busy and one is idle; each is back when the broker is."""
    url = running_broker.url(query=f"heartbeat={HEARTBEAT}")
    tasks = ["first...", "second..."]
    for task in tasks:
        new_task(task)
    consoles = [worker(url=url) for _ in range(workers)]
    wait_until(lambda: len(received(*consoles)) == min(workers, 2), "the workers are busy")
    strike(running_broker, fault)
    consoles = consoles or [worker(url=url)]
    wait_until_all_is_done(queue, tasks, *consoles)
    wait_until(lambda: queue.consumers() == len(consoles), "every worker is back", 60)
    for console in consoles:
        assert console.process.poll() is None
        only_told_in_lines(console)


def test_a_booting_broker_is_waited_for_or_told_and_never_a_traceback(
    running_broker, worker, start_new_task, queue
):
    """Clients come one after another, from a closed port over an open one to a ready broker."""
    running_broker.stop()
    running_broker.launch()
    console = worker(waiting=False)
    tries = []
    while not tries or tries[-1].wait() != 0:
        assert len(tries) < 500, tries[-1].transcript
        tries.append(start_new_task("task"))
    for early in tries[:-1]:
        assert early.process.poll() == 1
        assert early.out == []
        assert len(early.err) == 1, early.transcript
        assert early.err[0].startswith("new_task.py: cannot send to 127.0.0.1")
    console.wait_for_line(DONE, timeout=60)
    only_told_in_lines(console)


@pytest.mark.parametrize("disk", [True, False], ids=["disk", "memory"])
def test_an_alarm_holds_up_producers_until_it_is_cleared_and_not_workers(
    broker, worker, stream, queue, disk
):
    producer, console = stream(broker.url(query=PATIENT)), worker()
    console.wait_for_line(DONE)
    with broker.alarm(disk):
        say(producer, "after")
        wait_until_blocked(broker)
        assert console.process.poll() is None
        assert producer.out == [" [x] Sent before"]
    console.wait_for_line(DONE, count=2)
    assert console.err == producer.err == []
