"""worker.py does one task at a time, ends as it is told, and comes back, whatever happens."""

import contextlib
import re
import shlex
import signal
import sys
import time
from itertools import pairwise

import pytest

from tests.harness.brokers import run
from tests.harness.consoles import ROOT
from tests.harness.readmes import edited
from tests.harness.scripts import AGAIN, DONE, IN_HAND, NOBODY, RECEIVED, WAITING, WORKER, received
from tests.harness.waiting import wait_until


def test_an_argument_is_an_error(start_alone):
    """Whatever AMQP_URL says."""
    console = start_alone(WORKER, "--hepl", url="unusable")
    assert (console.wait(), console.out) == (2, [])
    assert "--hepl" in console.err[-1]


# --- While it works ---


@pytest.mark.parametrize("work", ["sleeps", "computes"])
def test_a_task_of_many_heartbeats_is_worked_once(worker_of, broker, queue, work):
    """Nine seconds at a heartbeat of one: a broker that misses two closes the connection."""
    lines = {
        "sleeps": "time.sleep(9)",
        "computes": "end = time.monotonic() + 9\nwhile time.monotonic() < end: pass",
    }
    console = worker_of(lines[work], url=broker.url(query="heartbeat=1"))
    queue.publish(b"long")
    console.wait_for_line(DONE)
    queue.wait_for_counts(0, 0)
    assert console.err == []
    if work == "sleeps":
        assert processor_seconds(console) < 2


def processor_seconds(console):
    return int(run("ps", "-o", "cputimes=", "-p", str(console.process.pid)))


# --- How it ends ---


def ended_within(console, seconds, signum):
    """Send a signal, and assert that the worker ends within `seconds`, well and without a word."""
    before, started = console.err, time.monotonic()
    console.signal(signum)
    assert console.wait() == 0
    assert time.monotonic() - started < seconds
    assert console.err == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_idle_it_ends_at_once(worker, signum):
    ended_within(worker(), 3, signum)  # alone, in half a second


def test_a_task_that_comes_with_sigterm_is_not_begun(workers, queue):
    """Nor one that comes a little later, before it has looked for the signal."""
    four = workers(4)
    with queue.channel() as channel:
        for console in four:
            console.signal(signal.SIGTERM)
        for _ in four:
            channel.basic_publish("", "task_queue", b"task")
    for console in four:
        assert console.wait() == 0
        assert console.out == [" [*] Waiting for messages. To exit press CTRL+C"]
    wait_until(lambda: queue.ready() == 4, "all tasks are in the queue")


def test_ctrl_c_ends_it_while_the_work_waits_for_threads_of_its_own(worker_of, queue):
    console = worker_of(
        "with ThreadPoolExecutor() as pool: pool.submit(time.sleep, 25).result()",
        top="from concurrent.futures import ThreadPoolExecutor",
    )
    queue.publish(b"task")
    console.wait_for_line(RECEIVED)
    ended_within(console, 1, signal.SIGINT)


def test_ctrl_c_ends_it_while_no_name_server_answers(start_alone, silent_name_server, tmp_path):
    """It asks for localhost where AMQP_URL says nothing."""
    console = start_alone(WORKER, env={**silent_name_server, "AMQP_URL": ""})
    asked = tmp_path / "asked"
    wait_until(lambda: asked.exists() and asked.read_text(), "it asks the name server")
    assert asked.read_text() == "localhost:5672"
    ended_within(console, 1, signal.SIGINT)


def test_sigterm_finishes_and_acknowledges_the_task_in_hand_and_takes_no_other(
    busy, queue, orderly
):
    console = busy(4)
    console.signal(signal.SIGTERM)
    assert console.wait() == 0
    orderly(console)
    assert console.out[1:] == [" [x] Received in hand....", " [x] Done"]
    assert console.err == []
    assert queue.take_all() == [b"waits"]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["in a task", "while lost work goes on", "while it connects"])
def test_a_second_signal_ends_it_at_once(start, worker, proxy, queue, moment, second):
    console = worker(url=proxy.url)
    queue.publish(b"long" + b"." * 60)
    console.wait_for_line(RECEIVED)
    with contextlib.ExitStack() as stack:
        if moment != "in a task":
            proxy.reset()
            console.wait_for_line(IN_HAND)
        if moment == "while it connects":
            console.kill()
            stack.enter_context(proxy.black_hole())
            console = start(WORKER, url=proxy.url)
            wait_until(lambda: proxy.connections, "it connects")
        console.signal(signal.SIGTERM)
        # Of two SIGTERM that are pending together one would be dropped.
        wait_until(lambda: int(console.status("ShdPnd"), 16) == 0, "the first is taken")
        ended_within(console, 2, second)
    wait_until(lambda: queue.ready() == 1, "the task is back")


def test_sigterm_that_meets_a_lost_connection_ends_it_with_a_line(worker, proxy, queue):
    console = worker(url=proxy.url)
    queue.publish(b"task..")
    console.wait_for_line(RECEIVED)
    console.signal(signal.SIGTERM)
    proxy.reset()
    assert console.wait() == 0
    line, *more = console.err
    assert f"cannot consume from 127.0.0.1:{proxy.port}: StreamLostError" in line
    assert "trying again" not in line
    assert {*more} <= {"worker.py: waiting for the work in hand"}  # for two seconds at most


def test_sigterm_lets_work_that_has_lost_its_connection_end_as_any_other(worker_of, proxy, queue):
    """A Python that is ending starts no new threads: such work must not fail for that."""
    console = worker_of(
        "time.sleep(3)\nThreadPoolExecutor().submit(print, 'from a thread').result()",
        top="from concurrent.futures import ThreadPoolExecutor",
        url=proxy.url,
    )
    queue.publish(b"task")
    console.wait_for_line(RECEIVED)
    proxy.reset()
    console.wait_for_line(AGAIN)
    console.signal(signal.SIGTERM)
    assert console.wait() == 0
    assert console.out[-1] == "from a thread"


def test_a_signal_ends_it_while_it_waits_to_connect_again(start_alone):
    console = start_alone(WORKER, url=f"amqp://{NOBODY}")
    console.wait_for_line(AGAIN, count=4)  # after seven seconds or more; eight are to come
    assert processor_seconds(console) < 2
    ended_within(console, 2, signal.SIGTERM)


# --- How it comes back ---


def test_pauses_grow_and_are_jittered(start_alone):
    """Nothing listens: of three pauses each is twice the one before, and eight workers differ."""
    workers = [start_alone(WORKER, url=f"amqp://{NOBODY}") for _ in range(8)]
    taken = []
    for console in workers:
        first, _, third, fourth = (console.wait_for_line(AGAIN, count=n).at for n in range(1, 5))
        assert fourth - console.started >= 1 + 2 + 4
        assert fourth - third >= 4 - 1  # a line may be read late
        assert fourth - first < 2 * (1.5 + 3 + 6)
        taken.append(fourth - first)
    assert max(taken) - min(taken) > 0.1  # as in each of 400,000 simulated runs


def test_pauses_grow_where_each_connection_is_dropped_at_once(worker, proxy):
    """As it consumes. A slow try may begin the pauses anew, so one of four seconds will do: without
    growth, all are below two."""
    proxy.fatal = b"\0\x3c\0\x15"  # basic.consume-ok
    console = worker(url=proxy.url)

    def longest():
        at = [line.at for line in list(console.lines) if line.stream == "err"]
        return max((after - before for before, after in pairwise(at)), default=0)

    wait_until(lambda: longest() > 4, "it pauses for more than four seconds")
    assert not any("no AMQP answer" in line for line in console.err)


def test_it_fails_over_as_fast_each_time(start, broker, queue):
    """From a connection that is cut, by way of a broker that is gone, to the next connection."""
    console = start(WORKER, url=f"amqp://{NOBODY},{broker.url()}")
    closed = r".*: ConnectionClosedByBroker: \(320\) .*; trying again"
    for number in range(1, 5):
        console.wait_for_line(WAITING, count=number)
        queue.publish(b"a connection of more than a second..")
        console.wait_for_line(DONE, count=number)
        broker.ctl("close_all_connections", "test")
        cut = console.wait_for_line(closed, count=number).at
        # Pauses of up to 1.5 and 3 s; where each broker has its own, the last is of 9 or more.
        assert console.wait_for_line(WAITING, count=number + 1).at - cut < 8


def test_the_work_ends_before_it_consumes_again(worker_of, proxy, queue):
    """A task that is lost with the connection comes again, and never beside itself."""
    console = worker_of("print(' begins')\ntime.sleep(5)\nprint(' ends')", url=proxy.url)
    queue.publish(b"task")
    console.wait_for_line(" begins")
    proxy.reset()
    assert "StreamLostError" in console.wait_for_line(AGAIN).text
    console.wait_for_line(IN_HAND)
    assert " ends" not in console.out  # it is told at once
    console.wait_for_line(DONE)
    kinds = [line.split()[0] for line in console.out]
    assert kinds == ["[*]", "[x]", "begins", "ends", "[*]", "[x]", "begins", "ends", "[x]"]
    queue.wait_for_counts(0, 0)


def test_an_overdue_acknowledgement_is_told_and_it_consumes_again(
    broker, worker_of, new_task, quorum_url, tmp_path
):
    """RabbitMQ gives the task to another worker, and this one may finish it all the same.

    Up to 4.2 it closes the channel, which is told while the work goes on. Since then it cancels the
    consumer, and of quorum queues alone; the worker learns of that when the work has ended.
    """
    finish = tmp_path / "finish"
    work = f"while not os.path.exists({str(finish)!r}):\n    time.sleep(0.1)"
    closes = re.match(r"3\.|4\.[012]\.", broker.ctl("version"))
    if closes:
        broker.set("consumer_timeout", 1000)
        broker.set("channel_tick_interval", 500)
    else:
        policy = '{"consumer-timeout": 1000}'
        broker.ctl("set_policy", "--vhost", "quorum", "overdue", ".*", policy)
    try:
        slow, other = (worker_of(work, url=quorum_url) for _ in range(2))
        new_task("task", url=quorum_url)
        wait_until(lambda: received(slow) and received(other), "both have received it")
        if closes:
            slow.wait_for_line(r".*PRECONDITION_FAILED - delivery acknowledgement .* timed out.*")
    finally:
        broker.set("consumer_timeout", 1800000)
    finish.touch()
    slow.wait_for_line(rf".*{'timed out' if closes else 'ConsumerCancelled'}.*; trying again")
    slow.wait_for_line(WAITING, count=2)


# --- When it is not RabbitMQ that fails ---


def test_a_reader_that_goes_away_is_told_and_the_task_goes_back(queue, open_console):
    """As with `python worker.py | head -n 1`."""
    command = f"{{ {shlex.quote(sys.executable)} {WORKER}; echo status $? >&2; }} | head -n 1"
    console = open_console("bash", "-c", command)
    console.wait_for_line(WAITING)
    queue.declare()
    queue.publish(b"task")
    console.wait_for_line(r"status [1-9]\d*")
    assert console.err[0] == "Traceback (most recent call last):"
    assert any(line.startswith("BrokenPipeError") for line in console.err)
    wait_until(lambda: queue.ready() == 1, "the task is back")


@pytest.mark.parametrize("line", ["channel.basic_qos(", "connection.process_data_events("])
def test_a_bug_of_its_own_is_python_s_traceback(start, queue, tmp_path, line):
    """While it connects, and while it works."""
    bug = {line: f"open('/no/such/file'); {line}"}
    (tmp_path / WORKER).write_text(edited((ROOT / WORKER).read_text(), bug))
    console = start(tmp_path / WORKER)
    queue.declare()
    queue.publish(b"task.")
    assert console.wait() == 1
    assert console.err[0] == "Traceback (most recent call last):"
    assert "/no/such/file" in console.err[-1]
    wait_until(lambda: queue.ready() == 1, "the task is back")
