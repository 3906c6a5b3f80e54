"""Section 2 of the contract: what worker.py promises, and how it ends and comes back."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest
from brokers import free_ports
from conftest import AGAIN, COMES_AGAIN, DONE, RECEIVED, WAITING
from consoles import script
from proxy import Proxy
from waiting import wait_until

# --- What it shows ---


def test_it_takes_one_task_at_a_time_and_acknowledges_no_sooner_than_it_is_done(busy, queue):
    console = busy(60)
    queue.wait_for_counts(1, 1)  # one in hand, the other not prefetched
    assert " [x] Done" not in console.out


def test_it_shows_each_task_and_its_end_and_acknowledges_it(worker, new_task, queue):
    console = worker()
    new_task("first.")
    new_task("second")
    console.wait_for_line(DONE, count=2)
    queue.wait_for_counts(0, 0)
    assert console.out == [
        " [*] Waiting for messages. To exit press CTRL+C",
        " [x] Received first.",
        " [x] Done",
        " [x] Received second",
        " [x] Done",
    ]


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("Grüße, 世界 🐇".encode(), "Grüße, 世界 🐇"),
        (b"\xff\xfe", r"\xff\xfe"),
        (b"a\n [x] Done", r"a\n [x] Done"),
        (b"a\r [x] Done", r"a\r [x] Done"),
        (b"\x1b[2Jx\x07\x9b", r"\x1b[2Jx\x07\x9b"),
        ("x\u202eevil\u2028".encode(), r"x\u202eevil\u2028"),
        ("\U000e0001".encode(), r"\U000e0001"),
        ("ü\x1b".encode(), r"ü\x1b"),
        (b"\0", r"\x00"),
        (b"", ""),
    ],
)
def test_no_body_forges_a_line_or_drives_the_terminal(worker, queue, body, shown):
    console = worker()
    queue.publish(body)
    console.wait_for_line(DONE)
    assert console.out[1:] == [f" [x] Received {shown}", " [x] Done"]
    queue.publish(b"next")
    console.wait_for_line(DONE, count=2)  # and no body kills the worker


@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
    ids=["PYTHONIOENCODING", "LC_ALL"],
)
def test_a_terminal_that_cannot_show_a_character_shows_its_escape(worker, queue, env):
    console = worker(env=env)
    queue.publish("Grüße 世".encode())
    console.wait_for_line(DONE)
    assert console.out[1] == r" [x] Received Gr\xfc\xdfe \u4e16"


def test_dots_are_counted_as_bytes_whatever_surrounds_them(worker, queue):
    console = worker()
    queue.publish(b"\xff.\xfe")
    started = console.wait_for_line(RECEIVED).at
    assert console.wait_for_line(DONE).at - started >= 0.95


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help(open_console, word):
    console = open_console(*script("worker.py"), word, url="unusable")
    assert console.wait() == 0
    assert "AMQP_URL" in "\n".join(console.out)
    assert console.err == []


def test_the_broker_tells_workers_apart(worker, broker, queue):
    console = worker()
    name = f"worker.py {socket.gethostname()} {console.process.pid}"
    wait_until(
        lambda: name in broker.ctl("list_connections", "client_properties"),
        f"{name} in rabbitmqctl list_connections",
    )


# --- Heartbeats while it works ---


@pytest.mark.parametrize(
    "work",
    [
        "time.sleep(9)",
        "end = time.monotonic() + 9\nwhile time.monotonic() < end: pass",
    ],
    ids=["sleeping", "burning the CPU"],
)
def test_a_task_of_many_heartbeats_is_worked_once(altered_worker, broker, queue, work, orderly):
    """Nine seconds at a heartbeat of one: a broker that misses two closes the connection."""
    missed = broker.log().count("missed heartbeats")
    console = altered_worker(work, url=broker.url(query="heartbeat=1"))
    queue.publish(b"long")
    console.wait_for_line(DONE)
    queue.wait_for_counts(0, 0)
    assert console.err == []
    assert len([line for line in console.out if "Received" in line]) == 1
    assert broker.log().count("missed heartbeats") == missed
    console.ctrl_c()
    console.wait()
    orderly(console)


# --- How it ends ---


def ended_within(console, seconds, *signals):
    """Send `signals`, and assert that the worker ends with status 0 within `seconds`."""
    started = time.monotonic()
    for signum in signals:
        console.signal(signum)
    assert console.wait() == 0, console.transcript
    assert time.monotonic() - started < seconds, console.transcript
    assert "Traceback" not in "\n".join(console.err)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_idle_it_ends_at_once(worker, queue, orderly, signum):
    console = worker()
    ended_within(console, 1, signum)
    orderly(console)
    assert console.err == []


def test_ctrl_c_ends_it_in_mid_task_and_the_task_goes_to_another(busy, worker, queue, orderly):
    console = busy(30)
    ended_within(console, 1, signal.SIGINT)
    orderly(console)
    assert console.err == [COMES_AGAIN]
    assert " [x] Done" not in console.out
    worker().wait_for_line(r" \[x\] Received in hand\.+", timeout=5)


def test_sigterm_finishes_and_acknowledges_the_task_in_hand_and_takes_no_other(
    busy, queue, orderly
):
    console = busy(2)
    console.signal(signal.SIGTERM)
    assert console.wait() == 0, console.transcript
    orderly(console)
    assert console.out[1:] == [" [x] Received in hand..", " [x] Done"]
    assert console.err == []
    wait_until(lambda: queue.ready() == 1, "only the other task is left")
    method, _, body = queue.do(lambda channel: channel.basic_get("task_queue", auto_ack=True))
    assert (body, method.redelivered) == (b"waits", False)


def test_ctrl_c_that_the_work_swallows_ends_it_after_the_task(altered_worker, queue):
    console = altered_worker("try:\n    time.sleep(2)\nexcept BaseException:\n    pass")
    queue.publish(b"task")
    console.wait_for_line(RECEIVED)
    console.ctrl_c()
    assert console.wait() == 0
    assert console.out[-1] == " [x] Done"
    wait_until(lambda: queue.ready() == 0, "it is acknowledged")


def test_sigterm_waits_for_a_slow_network_to_take_the_acknowledgement(worker, broker, queue):
    proxy = Proxy(broker.port)
    try:
        console = worker(url=broker.url(port=proxy.port))
        queue.publish(b"task.")
        console.wait_for_line(RECEIVED)
        console.signal(signal.SIGTERM)
        with proxy.slow(30):  # bytes per second: longer than Ctrl+C would wait
            assert console.wait() == 0
        assert console.err == []
        wait_until(lambda: queue.consumers() == 0, "the broker has seen its end")
        assert queue.ready() == 0
    finally:
        proxy.close()


def pending(console):
    """Whether a signal waits to be taken by the process (as Linux tells)."""
    status = Path(f"/proc/{console.process.pid}/status").read_text()
    return any(int(mask, 16) for mask in re.findall(r"^(?:Shd|Sig)Pnd:\t(\w+)", status, re.M))


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_it_at_once(busy, queue, orderly, second):
    console = busy(30)
    console.signal(signal.SIGTERM)
    if second == signal.SIGTERM:  # of two that are pending together one would be dropped
        wait_until(lambda: not pending(console), "the first SIGTERM has been taken")
    ended_within(console, 1, second)
    orderly(console)
    wait_until(lambda: queue.ready() == 2, "both tasks are back")


def test_signals_go_to_the_thread_that_works(worker, queue):
    """A signal taken by the connection's thread would leave a sleep in the work to its end.

    The system picks that thread when two signals come at once on a loaded machine: too rarely
    for a test to wait for it, so the masks of the threads are read (as Linux tells them).
    """
    process = worker().process.pid
    for thread in Path(f"/proc/{process}/task").iterdir():
        blocked = int(re.search(r"^SigBlk:\t(\w+)", (thread / "status").read_text(), re.M)[1], 16)
        for signum in (signal.SIGINT, signal.SIGTERM):
            assert bool(blocked >> (signum - 1) & 1) == (thread.name != str(process))


def test_a_signal_ends_it_while_it_waits_to_connect_again(worker, queue):
    console = worker(waiting=False, url=f"amqp://127.0.0.1:{free_ports(1)[0]}")
    console.wait_for_line(AGAIN, count=2)
    ended_within(console, 1, signal.SIGTERM)


# --- How it comes back ---


def test_pauses_grow_and_are_jittered(worker, queue):
    """Nothing listens: of the pauses each is told, and kept, and longer than the one before."""
    console = worker(waiting=False, url=f"amqp://127.0.0.1:{free_ports(1)[0]}")
    last = console.wait_for_line(AGAIN, count=4)
    pauses = [float(line.split()[-2]) for line in console.err]
    for pause, low in zip(pauses, (1, 2, 4, 8), strict=True):
        assert low <= pause <= 1.5 * low + 0.1
    assert pauses != [1, 2, 4, 8]  # which jitter leaves as they are once in a million
    first = console.wait_for_line(AGAIN)
    assert sum(pauses[:3]) - 0.3 <= last.at - first.at
    assert all("127.0.0.1" in line and "start RabbitMQ" in line for line in console.err)


@pytest.mark.parametrize("fault", ["stop", "kill"])
def test_it_waits_for_a_broker_that_goes_away_and_comes_back(running_broker, worker, queue, fault):
    idle = worker()
    getattr(running_broker, fault)()
    line = idle.wait_for_line(AGAIN)
    assert str(running_broker.port) in line.text
    late = worker(waiting=False)  # a broker that is not up yet is waited for, too
    late.wait_for_line(AGAIN)
    running_broker.start()
    late.wait_for_line(WAITING, timeout=60)
    idle.wait_for_line(WAITING, count=2, timeout=60)
    for number in range(2):
        queue.publish(b"task %d" % number)
    for console in (idle, late):
        console.wait_for_line(DONE)
    running_broker.ctl("close_all_connections", "test")  # the pauses start over
    line = wait_until(
        lambda: next(
            (text for text in idle.err if "CONNECTION_FORCED" in text and "test" in text), 0
        ),
        "the closed connection is told",
    )
    assert 1 <= float(line.split()[-2]) <= 1.6


def test_a_finished_task_that_cannot_be_acknowledged_is_told_as_coming_again(
    running_broker, altered_worker, queue, tmp_path
):
    finish = tmp_path / "finish"
    console = altered_worker(f"while not os.path.exists({str(finish)!r}):\n    time.sleep(0.1)")
    queue.publish(b"task")
    console.wait_for_line(RECEIVED)
    running_broker.kill()
    finish.touch()
    running_broker.start()
    console.wait_for_line(re.escape(COMES_AGAIN))
    assert " [x] Done" in console.out
    console.wait_for_line(WAITING, count=2, timeout=60)
    assert len([line for line in console.err if re.fullmatch(AGAIN, line)]) >= 1


def test_a_deleted_queue_is_declared_again(worker, queue):
    console = worker()
    queue.delete()
    assert "was the queue deleted?" in console.wait_for_line(AGAIN).text
    console.wait_for_line(WAITING, count=2)
    queue.publish(b"task")
    console.wait_for_line(DONE)


def test_an_overdue_acknowledgement_is_told_and_it_consumes_again(broker, worker, queue):
    """RabbitMQ closes the channel of a worker that takes longer than consumer_timeout."""
    broker.set("consumer_timeout", 1000)
    broker.set("channel_tick_interval", 500)
    try:
        console = worker()
        queue.publish(b"too long....")
        line = console.wait_for_line(AGAIN)
        assert "PRECONDITION_FAILED - " in line.text
        assert COMES_AGAIN in console.err
    finally:
        broker.set("consumer_timeout", 1800000)
        broker.set("channel_tick_interval", 60000)
    console.wait_for_line(WAITING, count=2)


def test_a_task_that_raises_goes_back_and_is_told_and_tried_without_haste(altered_worker, queue):
    console = altered_worker('if body == b"bad":\n    raise MemoryError("no room\\nleft")')
    queue.publish(b"bad")
    first = console.wait_for_line(r"worker\.py: cannot do the task: MemoryError: no room left; .*")
    second = console.wait_for_line(r"worker\.py: cannot do the task: .*", count=2)
    assert second.at - first.at >= 1
    assert " [x] Done" not in console.out
    console.ctrl_c()
    assert console.wait() == 0
    assert queue.take()[0] == b"bad"


def test_what_the_work_raises_is_not_taken_for_a_fault_of_the_connection(altered_worker, queue):
    console = altered_worker('raise ConnectionRefusedError("the database")')
    queue.publish(b"task")
    told = r"worker\.py: cannot do the task: ConnectionRefusedError: the database; trying .*"
    console.wait_for_line(told)


def test_what_is_hopeless_at_the_start_is_retried_once_it_has_worked(broker, worker, queue):
    broker.ctl("add_user", "passing", "old")
    try:
        broker.ctl("set_permissions", "passing", ".*", ".*", ".*")
        console = worker(url=broker.url("passing:old"))
        broker.ctl("change_password", "passing", "new")
        broker.ctl("close_all_connections", "changed")
        console.wait_for_line(r".*login refused.*trying again.*")
        broker.ctl("change_password", "passing", "old")
        console.wait_for_line(WAITING, count=2)
    finally:
        broker.ctl("delete_user", "passing")


# --- When its output is gone ---


def test_a_reader_that_goes_away_ends_it_and_the_task_comes_again(broker, queue, open_console):
    """As with `python worker.py | head -n 1`."""
    command = f"{' '.join(script('worker.py'))} | head -n 1"
    console = open_console("bash", "-c", command)
    console.wait_for_line(WAITING)
    wait_until(lambda: queue.consumers() == 1, "it consumes")
    queue.publish(b"task")
    console.wait()
    assert console.err == [
        COMES_AGAIN,
        "worker.py: cannot write to standard output: BrokenPipeError: [Errno 32] Broken pipe",
    ]
    assert queue.take()[0] == b"task"
