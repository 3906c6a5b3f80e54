"""new_task.py sends what is typed, or each line of standard input."""

import fcntl
import re
import shlex
import socket
import subprocess
import sys
import termios
import time

import pika
import pytest

from tests.harness.scripts import ANY_REASON, NEW_TASK, assert_told, confirmed
from tests.harness.waiting import wait_until

LOCALES = {
    "C.UTF-8": {"LC_ALL": "C.UTF-8"},
    "C": {"LC_ALL": "C"},
    "ASCII": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}
LONG = [b"task %d" % number for number in range(300_000)]  # more than is sent in a test
INTERRUPTED = r"new_task\.py: interrupted \(tasks confirmed: \d+\)"


@pytest.fixture
def sending(start):
    """Start `new_task.py -` with a long input, and wait until it is in the middle of it."""

    def start_sending(**options):
        console = start(NEW_TASK, "-", stdin=b"\n".join(LONG), **options)
        console.wait_for_line(r" \[x\] Sent .*", count=200)
        return console

    return start_sending


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
        ("-x", "--all"): "-x --all",
        ("--all", "-"): "--all -",
        ("-", "and", "words"): "- and words",
        ("-h", "300", "resize"): "-h 300 resize",
        ("--", "--help"): "-- --help",
        ("two  spaces", "", " x "): "two  spaces   x ",
        ("naïve", "日本語", "🐇..."): "naïve 日本語 🐇...",
    }
    for words, task in tasks.items():
        console = new_task(*words, env=LOCALES["C.UTF-8"])
        assert (console.out, console.err) == ([f" [x] Sent {task}"], [])
    assert queue.take_all() == [task.encode() for task in tasks.values()]


@pytest.mark.parametrize("locale", LOCALES)
def test_the_bytes_typed_are_the_bytes_sent(new_task, queue, locale):
    """Under any locale; what the terminal cannot show, or would obey, is shown escaped."""
    cafe = r"caf\xe9" if locale == "ASCII" else "café"
    tasks = {
        b"caf\xe9 \xff\xfe": r"caf\xe9 \xff\xfe",
        "café".encode(): cafe,
        b"\xed\xb2\x80 \xf0\x9f": r"\xed\xb2\x80 \xf0\x9f",  # surrogates, half a character
        b"forge\n [x] Done\x1b[2J\r": r"forge\n [x] Done\x1b[2J\r",
    }
    for typed, shown in tasks.items():
        console = new_task(typed, env=LOCALES[locale])
        assert (console.out, console.err) == ([f" [x] Sent {shown}"], [])
    assert queue.take_all() == list(tasks)


# --- A task for each line of standard input ---


def test_a_dash_sends_each_line_of_standard_input(new_task, queue, orderly):
    """Bytes verbatim without the line end, over one connection; blank lines are skipped."""
    lines = {
        b"one\n": b"one",
        b"\n": None,
        b" \t \r\n": None,
        b"  two  \r\n": b"  two  ",
        b"--help\n": b"--help",
        b"-\n": b"-",
        b"caf\xe9 \xff\x00\x1b.\n": b"caf\xe9 \xff\x00\x1b.",
        b"in\rside\n": b"in\rside",
        b"x\x0b\x0c\x85\xe2\x80\xa8y\n": b"x\x0b\x0c\x85\xe2\x80\xa8y",  # no line ends, these
        b"last without an end": b"last without an end",
    }
    console = new_task("-", stdin=b"".join(lines))
    tasks = [task for task in lines.values() if task]
    assert queue.take_all() == tasks
    assert len(console.out) == len(tasks)
    assert console.out[:2] == [" [x] Sent one", " [x] Sent   two  "]
    assert console.err == []
    orderly(console)


def test_an_empty_input_sends_nothing(new_task, queue):
    assert new_task("-", stdin=b"\n").out == []
    assert queue.ready() == 0


def test_it_reads_to_the_end_before_it_connects(start, broker, queue):
    """Nothing is sent if Ctrl+C comes before the end. AMQP_URL is looked at before."""
    console = start(NEW_TASK, "-", stdin=subprocess.PIPE)
    console.type("task\n")
    unread = bytearray(4)

    def it_has_read():
        fcntl.ioctl(console.stdin, termios.FIONREAD, unread)
        return not any(unread)

    wait_until(it_has_read, "it has read the line")
    assert str(console.process.pid) not in broker.ctl("list_connections", "client_properties")
    interrupted_at_once(console)
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
        queue.ready()
    assert start(NEW_TASK, "-", stdin=subprocess.PIPE, url="unusable").wait() == 1


# --- Cut short ---


@pytest.mark.parametrize("cut_by", ["Ctrl+C", "a crash of RabbitMQ"])
def test_cut_short_it_says_how_many_were_confirmed(sending, own_broker, queue, cut_by):
    """Those are in the queue, and at most the one that was on its way."""
    console = sending()
    if cut_by == "Ctrl+C":
        console.ctrl_c()
        assert console.wait() == 130
        [line] = console.err
        assert re.fullmatch(INTERRUPTED, line)
    else:
        own_broker.kill_when_settled()
        line = assert_told(console, ANY_REASON, since=time.monotonic())
        own_broker.start()
    in_queue = queue.take_all()
    assert in_queue == LONG[: len(in_queue)]
    assert confirmed(line) <= len(in_queue) <= confirmed(line) + 1
    assert confirmed(line) - 1 <= len(console.out) <= confirmed(line)


def test_a_task_that_no_queue_takes_is_not_told_as_sent(sending, queue):
    console = sending()
    queue.delete()
    assert confirmed(assert_told(console, "UnroutableError")) == len(console.out)


def interrupted_at_once(console):
    """Press Ctrl+C, and assert that the script ends at once and says so."""
    pressed = time.monotonic()
    console.ctrl_c()
    assert console.wait() == 130
    assert time.monotonic() - pressed < 2
    assert re.fullmatch(INTERRUPTED, *console.err)


def test_ctrl_c_ends_it_at_once_while_the_broker_is_silent(start_alone):
    """It does not go on to the next one."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"amqp://127.0.0.1:{silent.getsockname()[1]}"
        console = start_alone(NEW_TASK, "task", url=f"{url},{url}")
        client, _ = silent.accept()
        interrupted_at_once(console)
        client.close()


def test_ctrl_c_ends_it_at_once_while_no_name_server_answers(
    start_alone, silent_name_server, tmp_path
):
    """pika looks names up in a thread, for which Python's own end would wait."""
    console = start_alone(NEW_TASK, "task", url="amqp://rabbit.example", env=silent_name_server)
    wait_until((tmp_path / "asked").exists, "it asks the name server")
    interrupted_at_once(console)


def test_when_all_is_confirmed_a_broker_that_dies_is_no_failure(new_task, proxy):
    """It is no longer there for a goodbye."""
    proxy.fatal = b"\0\x14\0\x28"  # channel.close, with which a goodbye begins
    console = new_task("task", url=proxy.url)
    assert (console.out, console.err) == ([" [x] Sent task"], [])


# --- Several brokers ---


@pytest.fixture
def in_order(tmp_path):
    """The environment of a script that tries the brokers of AMQP_URL in their order."""
    (tmp_path / "sitecustomize.py").write_text("import random\nrandom.shuffle = lambda some: None")
    return {"PYTHONPATH": str(tmp_path)}


def test_the_next_broker_gets_the_task_whatever_the_first_one_lacks(
    new_task, broker, powerless, in_order
):
    """Whether it is not there, or lets the script connect and fails then."""
    lacking = ["amqp://127.0.0.1:1", "amqp://no-such-host.invalid", broker.url(powerless)]
    console = new_task("task", url=",".join([*lacking, broker.url()]), env=in_order)
    assert console.out == [" [x] Sent task"]
    whys = ["nothing listens there; start RabbitMQ", "unknown host", "ACCESS_REFUSED"]
    for line, why in zip(console.err, whys, strict=True):
        assert why in line
        assert confirmed(line) == 0


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


@pytest.fixture
def shell(open_console):
    """Start a command of bash, in which `new_task` is the script."""
    function = f'new_task() {{ {shlex.quote(sys.executable)} {NEW_TASK} "$@"; }}\n'
    return lambda command: open_console("bash", "-c", function + command)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("yes | head -n 9999 | { new_task -; echo status $? >&2; } | head -n 1", "Broken pipe"),
        ("new_task task > /dev/full; echo status $? >&2", "No space left on device"),
        ("new_task - 0> /dev/null; echo status $? >&2", "Bad file descriptor"),
    ],
    ids=["no reader", "a full disk", "no input"],
)
def test_a_stream_that_cannot_be_used_is_told_in_a_line(shell, queue, command, fault):
    console = shell(command)
    console.wait_for_line("status 1")
    line = console.err[0]
    assert re.fullmatch(rf"new_task\.py: cannot read .* or write .*: .*{fault}.*", line)
    assert console.err[1] == "status 1"
    assert confirmed(line) == (0 if "0>" in command else queue.ready())


def test_it_ends_though_its_line_cannot_be_written(shell):
    console = shell("AMQP_URL=amqp://localhost:1 new_task 2> /dev/full; echo status $?")
    console.wait_for_line(r"status [1-9]\d*")


def test_where_there_is_no_console_it_sends_and_shows_nothing(shell, queue):
    console = shell("new_task task >&-; echo status $? >&2")
    console.wait_for_line("status 0")
    assert queue.take_all() == [b"task"]


NOTEBOOK = """import runpy, sys, types
sys.stdout = types.SimpleNamespace(write=sys.stdout.write, flush=sys.stdout.flush)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_runs_where_standard_output_is_not_pythons_own(start):
    """As in IDLE and notebooks."""
    console = start("-c", NOTEBOOK, NEW_TASK, "task")
    assert console.wait() == 0
    assert console.out == [" [x] Sent task"]
