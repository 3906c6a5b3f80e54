"""new_task.py sends what is typed, or each line of standard input."""

import re
import subprocess
import time

import pika
import pytest

from tests.harness.scripts import ANY_REASON, NEW_TASK, assert_told, confirmed
from tests.harness.waiting import wait_until

UTF_8 = {"LC_ALL": "C.UTF-8"}
ASCII = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
LONG = [b"task %d" % number for number in range(300_000)]  # more than is sent in a test


@pytest.fixture
def sending(start):
    """Start `new_task.py -` with a long input, and wait until it is in the middle of it."""

    def start_sending():
        console = start(NEW_TASK, "-", stdin=b"\n".join(LONG))
        console.wait_for_line(r" \[x\] Sent .*", count=200)
        return console

    return start_sending


def assert_interrupted(console):
    """Press Ctrl+C, and assert that the script ends and says so; return its line."""
    console.ctrl_c()
    assert console.wait(5) == 130
    [line] = console.err
    assert line.startswith("new_task.py: interrupted (tasks confirmed: ")
    return line


# --- One task, from words ---


def test_a_task_goes_through_the_default_exchange_and_is_persistent(new_task, queue):
    console = new_task("First", "message.")
    assert (console.out, console.err) == ([" [x] Sent First message."], [])
    method, properties, body = queue.take()
    assert (method.exchange, method.routing_key, body) == ("", "task_queue", b"First message.")
    assert properties.delivery_mode == pika.DeliveryMode.Persistent.value == 2
    assert queue.ready() == 0
    queue.declare()  # RabbitMQ refuses one that is not the same: durable, without arguments


def test_words_are_words(new_task, queue):
    tasks = {
        (): "Hello World!",
        ("",): "Hello World!",  # as in the tutorial
        ("-", "and", "words"): "- and words",
        ("-h", "300", "resize"): "-h 300 resize",
        ("two  spaces", "", " x "): "two  spaces   x ",
        ("naïve", "日本語", "🐇..."): "naïve 日本語 🐇...",
    }
    for words, task in tasks.items():
        console = new_task(*words, env=UTF_8)
        assert (console.out, console.err) == ([f" [x] Sent {task}"], [])
    assert queue.take_all() == [task.encode() for task in tasks.values()]


def test_the_bytes_typed_are_the_bytes_sent(new_task, queue):
    """What the terminal cannot show, or would obey, is shown escaped."""
    tasks = {
        "café".encode(): r"caf\xe9",
        b"\xff \xf0\x9f": r"\xff \xf0\x9f",  # half a character
        b"forge\n [x] Done\x1b[2J\r": r"forge\n [x] Done\x1b[2J\r",
    }
    for typed, shown in tasks.items():
        assert new_task(typed, env=ASCII).out == [f" [x] Sent {shown}"]
    assert queue.take_all() == list(tasks)


# --- A task for each line of standard input ---


def test_a_dash_sends_each_line_of_standard_input(new_task, queue, orderly):
    """Bytes verbatim without the line end, over one connection; blank lines are skipped."""
    lines = {
        b"one\n": b"one",
        b"\n": None,
        b" \t \r\n": None,
        b"  two  \r\n": b"  two  ",
        b"-\n": b"-",
        b"caf\xe9 \xff\x00\x1b.\n": b"caf\xe9 \xff\x00\x1b.",
        b"in\rside\n": b"in\rside",
        b"last without an end": b"last without an end",
    }
    console = new_task("-", stdin=b"".join(lines))
    tasks = [task for task in lines.values() if task]
    assert queue.take_all() == tasks
    assert len(console.out) == len(tasks)
    assert console.err == []
    orderly(console)


def test_it_reads_to_the_end_before_it_connects(start_alone):
    """Where nothing listens, too, it waits for the end. AMQP_URL is looked at before."""
    console = start_alone(NEW_TASK, "-", stdin=subprocess.PIPE)
    console.type("task\n" * 100_000)  # more than fits in between: this returns when it reads
    assert_interrupted(console)
    assert start_alone(NEW_TASK, "-", stdin=subprocess.PIPE, url="unusable").wait() == 1


# --- Cut short ---


def test_interrupted_it_says_how_many_were_confirmed(sending, queue):
    console = sending()
    assert_counted(assert_interrupted(console), console, queue)


def test_so_it_does_when_rabbitmq_crashes(sending, own_broker, queue):
    console = sending()
    own_broker.kill_when_settled()
    line = assert_told(console, ANY_REASON, since=time.monotonic())
    own_broker.start()
    assert_counted(line, console, queue)


def assert_counted(line, console, queue):
    """Assert that what `line` counts is in the queue, and at most one more, on its way then."""
    in_queue = queue.take_all()
    assert in_queue == LONG[: len(in_queue)]
    assert confirmed(line) <= len(in_queue) <= confirmed(line) + 1
    assert confirmed(line) - 1 <= len(console.out) <= confirmed(line)


def test_a_task_that_no_queue_takes_is_not_told_as_sent(sending, queue):
    console = sending()
    queue.delete()
    assert confirmed(assert_told(console, "UnroutableError")) == len(console.out)


def test_ctrl_c_ends_it_at_once_while_no_name_server_answers(start_alone, tmp_path):
    """pika looks names up in a thread, for which Python's own end would wait."""
    asked = tmp_path / "asked"
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, socket, time\n"
        "def wait(*_, **__):\n"
        f"    pathlib.Path({str(asked)!r}).touch()\n"
        "    time.sleep(60)\n"
        "socket.getaddrinfo = wait\n"
    )
    here = {"PYTHONPATH": str(tmp_path)}
    console = start_alone(NEW_TASK, "task", url="amqp://rabbit.example", env=here)
    wait_until(asked.exists, "it asks the name server")
    assert_interrupted(console)


def test_when_all_is_confirmed_a_broker_that_dies_is_no_failure(new_task, proxy):
    """It is no longer there for a goodbye."""
    proxy.fatal = b"\0\x14\0\x28"  # channel.close, with which a goodbye begins
    console = new_task("task", url=proxy.url)
    assert (console.out, console.err) == ([" [x] Sent task"], [])


def test_the_next_broker_gets_the_rest_of_a_file(start, proxy, queue):
    """The task that was on its way may be there twice. Here the next is the same one again."""
    tasks = LONG[:2000]
    console = start(NEW_TASK, "-", stdin=b"\n".join(tasks), url=f"{proxy.url},{proxy.url}")
    console.wait_for_line(r" \[x\] Sent .*", count=200)
    proxy.reset()
    assert console.wait() == 0
    [line] = console.err
    sent, count = queue.take_all(), confirmed(line)
    assert sent[:count] == tasks[:count]
    assert sent[-len(tasks[count:]) :] == tasks[count:]
    assert len(sent) in (len(tasks), len(tasks) + 1)
    assert len(console.out) == len(tasks)


# --- Standard streams that cannot be used ---


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("python new_task.py task > /dev/full", "No space left on device"),
        ("python new_task.py - 0> /dev/null", "Bad file descriptor"),
    ],
)
def test_a_stream_that_cannot_be_used_is_told_in_a_line(type_in, command, fault):
    console = type_in(command)
    assert console.wait() == 1
    [line] = console.err
    assert re.fullmatch(rf"new_task\.py: cannot read .* or write .*: .*{fault}.*", line)


def test_where_there_is_no_console_it_sends_and_shows_nothing(type_in, queue):
    console = type_in("python new_task.py task >&-")
    assert (console.wait(), console.err) == (0, [])
    assert queue.take_all() == [b"task"]
