"""worker.py does one task at a time, ends as it is told, and comes back, whatever happens."""

import re
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from tests.harness.brokers import free_ports
from tests.harness.consoles import ROOT
from tests.harness.proxy import Proxy
from tests.harness.scripts import (
    AGAIN,
    DONE,
    IN_HAND,
    RECEIVED,
    WAITING,
    WORKER,
    received,
)
from tests.harness.waiting import wait_until

# --- What it shows ---


def test_no_body_forges_a_line_or_drives_the_terminal(worker, queue):
    bodies = {
        "Grüße, 世界 🐇".encode(): "Grüße, 世界 🐇",
        b"\xff\xfe": r"\xff\xfe",
        b"a\n [x] Done\r": r"a\n [x] Done\r",
        b"\x1b[2Jx\x07\x9b": r"\x1b[2Jx\x07\x9b",
        "x\u202eevil\u2028".encode(): r"x\u202eevil\u2028",
        "\U000e0001".encode(): r"\U000e0001",
        b"\0": r"\x00",
        b"": "",
    }
    console = worker(env={"PYTHONUTF8": "1"})
    for body in bodies:
        queue.publish(body)
    console.wait_for_line(DONE, count=len(bodies))
    assert received(console) == list(bodies.values())
    assert console.err == []


def test_a_terminal_that_cannot_show_a_character_shows_its_escape(worker, queue):
    ascii_alone = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    console = worker(env=ascii_alone)
    queue.publish("Grüße 世".encode())
    console.wait_for_line(DONE)
    assert received(console) == [r"Gr\xfc\xdfe \u4e16"]


def test_help(open_console):
    for word in ("-h", "--help"):
        console = open_console(*WORKER, word, url="unusable")
        assert (console.wait(), console.err) == (0, [])
        assert "AMQP_URL" in "\n".join(console.out)


def test_an_argument_is_an_error(open_console):
    console = open_console(*WORKER, "--hepl", url="unusable")
    assert (console.wait(), console.out) == (2, [])
    assert console.err[0].startswith("usage: worker.py")
    assert "--hepl" in console.err[-1]


# --- While it works ---


@pytest.mark.parametrize(
    "work", ["time.sleep(9)", "end = time.monotonic() + 9\nwhile time.monotonic() < end: pass"]
)
def test_a_task_of_many_heartbeats_is_worked_once(worker_of, broker, queue, work):
    """Nine seconds at a heartbeat of one: a broker that misses two closes the connection."""
    console = worker_of(work, url=broker.url(query="heartbeat=1"))
    queue.publish(b"long")
    console.wait_for_line(DONE)
    queue.wait_for_counts(0, 0)
    assert console.err == []
    assert received(console) == ["long"]


# --- How it ends ---


def ended_within(console, seconds, *signals):
    """Send `signals`, and assert that the worker ends within `seconds`, well and without a word."""
    before, started = console.err, time.monotonic()
    for signum in signals:
        console.signal(signum)
    assert console.wait() == 0, console.transcript
    assert time.monotonic() - started < seconds, console.transcript
    assert console.err == before, console.transcript


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_idle_it_ends_at_once(worker, queue, signum):
    console = worker()
    queue.publish(b"task")
    console.wait_for_line(DONE)
    queue.wait_for_counts(0, 0)
    ended_within(console, 3, signum)  # a third of a second where nobody else needs the processors


def test_a_task_that_comes_with_sigterm_is_not_begun(worker, queue):
    """Nor one that comes a little later, before it has looked for the signal."""
    workers = [worker() for _ in range(4)]

    def signal_and_publish(channel):
        for console in workers:
            console.signal(signal.SIGTERM)
        for _ in workers:
            channel.basic_publish("", "task_queue", b"task")

    queue.do(signal_and_publish)
    for console in workers:
        assert console.wait() == 0
        assert console.out == [" [*] Waiting for messages. To exit press CTRL+C"]
    wait_until(lambda: queue.ready() == 4, "all tasks are in the queue")


def test_ctrl_c_ends_it_while_the_work_waits_for_threads_of_its_own(worker_of, queue):
    console = worker_of(
        "with worker.futures.ThreadPoolExecutor() as pool: pool.submit(time.sleep, 25).result()"
    )
    queue.publish(b"task")
    console.wait_for_line(RECEIVED)
    ended_within(console, 1, signal.SIGINT)


def test_ctrl_c_ends_it_while_no_name_server_answers(worker, silent_name_server, tmp_path):
    console = worker(waiting=False, env=silent_name_server)
    wait_until((tmp_path / "asked").exists, "it asks the name server")
    ended_within(console, 1, signal.SIGINT)


def test_sigterm_finishes_and_acknowledges_the_task_in_hand_and_takes_no_other(
    busy, queue, orderly
):
    console = busy(4)
    console.signal(signal.SIGTERM)
    assert console.wait() == 0, console.transcript
    orderly(console)
    assert console.out[1:] == [" [x] Received in hand....", " [x] Done"]
    assert console.err == []
    wait_until(lambda: queue.ready() == 1, "only the other task is left")
    assert queue.take()[0] == b"waits"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_it_at_once(busy, queue, second):
    console = busy(30)
    console.signal(signal.SIGTERM)
    # Of two SIGTERM that are pending together one would be dropped.
    wait_until(lambda: not pending(console), "the first is taken")
    ended_within(console, 1, second)
    wait_until(lambda: queue.ready() == 2, "both tasks are back")


def pending(console):
    """Whether a signal waits to be taken by the process (where the system tells)."""
    try:
        with open(f"/proc/{console.process.pid}/status") as file:
            status = file.read()
    except FileNotFoundError:
        return False
    return any(int(mask, 16) for mask in re.findall(r"^(?:Shd|Sig)Pnd:\t(\w+)", status, re.M))


def test_two_signals_at_any_moment_of_a_task_end_it_at_once(busy, queue):
    """Each pair comes a little later than the last: in a task, near its end, or in the next."""

    def end(number):
        console = busy(1)
        time.sleep(number / 15)  # the moment is what is tested
        console.signal(signal.SIGTERM)
        ended_within(console, 1.5, signal.SIGINT)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(end, range(18)))


def test_sigterm_that_meets_a_lost_connection_ends_it_with_a_line(worker, broker, queue):
    proxy = Proxy(broker.port)
    try:
        console = worker(url=broker.url(port=proxy.port))
        queue.publish(b"task..")
        console.wait_for_line(RECEIVED)
        console.signal(signal.SIGTERM)
        proxy.reset()
        assert console.wait() == 0
        line, *more = console.err
        assert re.match(rf"worker\.py: cannot consume from 127\.0\.0\.1:{proxy.port}: \w+", line)
        assert "trying again" not in line
        assert all(re.fullmatch(IN_HAND, line) for line in more)  # for two seconds at most
    finally:
        proxy.close()


def test_sigterm_lets_work_that_has_lost_its_connection_end_as_any_other(worker_of, broker, queue):
    """A Python that is ending starts no new threads: such work must not fail for that."""
    proxy = Proxy(broker.port)
    try:
        thread = "worker.futures.ThreadPoolExecutor().submit(print, 'from a thread').result()"
        console = worker_of(f"time.sleep(3)\n{thread}", url=broker.url(port=proxy.port))
        queue.publish(b"task")
        console.wait_for_line(RECEIVED)
        proxy.reset()
        console.wait_for_line(AGAIN)
        console.signal(signal.SIGTERM)
        assert console.wait() == 0
        assert console.out[-1] == "from a thread"
    finally:
        proxy.close()


def test_a_signal_ends_it_while_it_waits_to_connect_again(worker, broker, queue):
    proxy = Proxy(broker.port)
    console = worker(url=broker.url(port=proxy.port))
    proxy.close()
    console.wait_for_line(AGAIN, count=3)  # the pause is of four seconds, or more
    ended_within(console, 2, signal.SIGTERM)


# --- How it comes back ---


def test_pauses_grow_and_are_jittered(worker, queue):
    """Nothing listens: of three pauses each is twice the one before, and eight workers differ."""
    url = f"amqp://127.0.0.1:{free_ports(1)[0]}"
    workers = [worker(waiting=False, url=url) for _ in range(8)]
    taken = []
    for console in workers:
        first, fourth = (console.wait_for_line(AGAIN, count=count).at for count in (1, 4))
        assert "127.0.0.1" in console.err[0] and "start RabbitMQ" in console.err[0]
        assert fourth - console.started >= 1 + 2 + 4
        assert fourth - first < 2 + 4 + 8
        taken.append(fourth - first)
    assert max(taken) - min(taken) > 0.1  # as in each of 400,000 simulated runs


def test_pauses_grow_where_it_may_not_consume(worker, broker, queue):
    broker.ctl("add_user", "writer", "secret")
    try:
        broker.ctl("set_permissions", "writer", ".*", ".*", "^$")
        console = worker(url=broker.url("writer:secret"))
        assert console.wait_for_line(AGAIN, count=4).at - console.started >= 1 + 2 + 4
    finally:
        broker.ctl("delete_user", "writer")


def test_pauses_grow_where_each_connection_is_dropped_at_once(worker, broker, queue):
    """A moment after it consumes. A slow try may begin the pauses anew, so one of four seconds will
    do: without growth, all are below two."""
    proxy = Proxy(broker.port)
    proxy.fatal = b"\0\x3c\0\x15"  # basic.consume-ok
    try:
        console = worker(url=broker.url(port=proxy.port))

        def longest():
            at = [line.at for line in list(console.lines) if line.stream == "err"]
            return max((after - before for before, after in pairwise(at)), default=0)

        wait_until(lambda: longest() > 4, "it pauses for more than four seconds")
        assert not any("no AMQP answer" in line for line in console.err)
    finally:
        proxy.close()


def test_it_fails_over_as_fast_each_time(worker, broker, queue):
    """From a connection that is cut, by way of a broker that is gone, to the next connection."""
    console = worker(url=f"amqp://127.0.0.1:{free_ports(1)[0]},{broker.url()}")
    for number in range(1, 5):
        queue.publish(b"a connection of more than a second..")
        console.wait_for_line(DONE, count=number)
        cut = time.monotonic()
        broker.ctl("close_all_connections", "test")
        # Pauses of up to 1.5 and 3 s; where each broker has its own, the last is of 9 or more.
        assert console.wait_for_line(WAITING, count=number + 1).at - cut < 8, console.transcript


def test_it_waits_for_a_broker_that_goes_away_and_comes_back(running_broker, worker, queue):
    idle = worker()
    running_broker.stop()
    line = idle.wait_for_line(AGAIN)
    assert str(running_broker.port) in line.text
    late = worker(waiting=False)  # a broker that is not up yet is waited for, too
    late.wait_for_line(AGAIN)
    running_broker.start()
    wait_until(lambda: queue.consumers() == 2, "both consume")
    for number in range(2):
        queue.publish(b"task %d.." % number)  # so that each connection stands for two seconds
    for console in (idle, late):
        console.wait_for_line(DONE)
    running_broker.ctl("close_all_connections", "test")
    forced = idle.wait_for_line(rf".*ConnectionClosedByBroker: \(320\) .*- test.*{AGAIN[-14:]}")
    again = idle.wait_for_line(WAITING, count=3)
    assert again.at - forced.at < 8  # the pauses have started over: the next was of 8 s


def test_the_work_ends_before_it_consumes_again(worker_of, broker, queue):
    """A task that is lost with the connection comes again, and never beside itself."""
    proxy = Proxy(broker.port)
    try:
        console = worker_of(
            "print(' begins')\ntime.sleep(5)\nprint(' ends')", url=broker.url(port=proxy.port)
        )
        queue.publish(b"task")
        console.wait_for_line(" begins")
        proxy.reset()
        console.wait_for_line(AGAIN)
        console.wait_for_line(IN_HAND)
        assert " ends" not in console.out  # it is told at once
        console.wait_for_line(DONE)
        kinds = [line.split()[0] for line in console.out]
        assert kinds == ["[*]", "[x]", "begins", "ends", "[*]", "[x]", "begins", "ends", "[x]"]
    finally:
        proxy.close()


def test_an_overdue_acknowledgement_is_told_and_it_consumes_again(
    broker, worker_of, start_new_task, quorum_url, tmp_path
):
    """RabbitMQ gives the task to another worker, and this one may finish it all the same.

    Up to 4.2 it closes the channel, which is told while the work goes on. Since then it cancels the
    consumer, and of quorum queues alone; the worker learns of that when the work has ended.
    """
    finish = tmp_path / "finish"
    closes = broker.version() < (4, 3)
    if closes:
        broker.set("consumer_timeout", 1000)
        broker.set("channel_tick_interval", 500)
    else:
        policy = '{"consumer-timeout": 1000}'
        broker.ctl("set_policy", "--vhost", "quorum", "overdue", ".*", policy)
    try:
        work = f"while not os.path.exists({str(finish)!r}):\n    time.sleep(0.1)"
        slow, other = (worker_of(work, url=quorum_url) for _ in range(2))
        start_new_task("task", url=quorum_url)
        wait_until(lambda: received(slow) and received(other), "both have received it")
        if closes:
            line = slow.wait_for_line(AGAIN).text
            assert re.search("PRECONDITION_FAILED - delivery acknowledgement .* timed out", line)
    finally:
        broker.set("consumer_timeout", 1800000)
        broker.set("channel_tick_interval", 60000)
    finish.touch()
    slow.wait_for_line(rf".*{'delivery ack' if closes else 'ConsumerCancelled'}.*; trying again")
    slow.wait_for_line(WAITING, count=2)


# --- When it is not RabbitMQ that fails ---


def test_a_reader_that_goes_away_is_told_and_the_task_goes_back(queue, open_console):
    """As with `python worker.py | head -n 1`."""
    command = f"{{ {shlex.join(WORKER)}; echo status $? >&2; }} | head -n 1"
    console = open_console("bash", "-c", command)
    console.wait_for_line(WAITING)
    wait_until(lambda: queue.consumers() == 1, "it consumes")
    queue.publish(b"task")
    console.wait_for_line(r"status [1-9]\d*")
    assert console.err[0] == "Traceback (most recent call last):"
    assert any(line.startswith("BrokenPipeError") for line in console.err)
    wait_until(lambda: queue.ready() == 1, "the task is back")


@pytest.mark.parametrize("line", ["channel.basic_qos(", "connection.process_data_events("])
def test_a_bug_of_its_own_is_python_s_traceback(open_console, queue, tmp_path, line):
    """While it connects, and while it works."""
    text = (ROOT / "worker.py").read_text()
    assert text.count(line) == 1
    (tmp_path / "worker.py").write_text(text.replace(line, f"open('/no/such/file'); {line}"))
    console = open_console(sys.executable, tmp_path / "worker.py")
    queue.declare()
    queue.publish(b"task.")
    assert console.wait() == 1, console.transcript
    assert console.err[0] == "Traceback (most recent call last):"
    assert "/no/such/file" in console.err[-1]
    wait_until(lambda: queue.ready() == 1, "the task is back")
