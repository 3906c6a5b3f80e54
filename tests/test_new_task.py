"""new_task.py sends what is typed, or each line of standard input."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time

import pika
import pytest

from tests.harness.scripts import NEW_TASK, confirmed, told
from tests.harness.waiting import wait_until

TRACEBACK = "Traceback (most recent call last):"
LOCALES = {
    "C.UTF-8": {"LC_ALL": "C.UTF-8"},
    "C": {"LC_ALL": "C"},
    "ASCII": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.fixture
def stream(start, queue):
    """Start `new_task.py -`, type a task into it, and wait until that is sent."""

    def start_stream(**options):
        console = start(NEW_TASK, "-", stdin=subprocess.PIPE, **options)
        console.type("before\n")
        console.wait_for_line(r" \[x\] Sent before")
        return console

    return start_stream


# --- One task, from words ---


def test_a_task_goes_through_the_default_exchange_and_is_persistent(new_task, queue):
    console = new_task("First", "message.")
    assert (console.out, console.err) == ([" [x] Sent First message."], [])
    method, properties, body = queue.take()
    assert (method.exchange, method.routing_key, body) == ("", "task_queue", b"First message.")
    assert properties.delivery_mode == pika.DeliveryMode.Persistent.value == 2
    assert queue.ready() == 0


def test_the_queue_is_durable_and_has_no_arguments(new_task, queue):
    new_task()
    queue.declare()  # RabbitMQ refuses one that is not the same


def test_words_are_words(new_task, queue):
    tasks = {
        (): "Hello World!",
        ("",): "Hello World!",  # as in the tutorial
        ("fix", "--all", "-x"): "fix --all -x",
        ("-x",): "-x",
        ("--all", "-"): "--all -",
        ("-", "and", "words"): "- and words",
        ("fix", "--help"): "fix --help",
        ("fix", "-h"): "fix -h",
        ("--helpful",): "--helpful",
        ("--", "--help"): "-- --help",
        ("two  spaces", "", " x "): "two  spaces   x ",
        ("naïve", "日本語", "🐇..."): "naïve 日本語 🐇...",
    }
    for words, task in tasks.items():
        console = new_task(*words, env=LOCALES["C.UTF-8"])
        assert (console.out, console.err) == ([f" [x] Sent {task}"], [])
    assert queue.take_all() == [task.encode() for task in tasks.values()]


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_help_as_the_first_word_alone(new_task, word):
    """It tells usage, environment, exit status and an example, and sends nothing."""
    console = new_task(word, "me", url="unusable")
    shown = "\n".join(console.out)
    for expected in ("python new_task.py First message.", "AMQP_URL", "Exit status", "--help"):
        assert expected in shown
    assert console.err == []


@pytest.mark.parametrize("locale", LOCALES)
def test_the_bytes_typed_are_the_bytes_sent(new_task, queue, locale):
    """Under any locale; what the terminal cannot show, or would obey, is shown escaped."""
    cafe = r"caf\xe9" if locale == "ASCII" else "café"
    tasks = {
        b"caf\xe9 \xff\xfe": r"caf\xe9 \xff\xfe",
        "café".encode(): cafe,
        b"\xed\xb2\x80 \xf0\x9f": r"\xed\xb2\x80 \xf0\x9f",  # surrogates, half a character
        b"forge\n [x] Done\x1b[2J\r": r"forge\n [x] Done\x1b[2J\r",
        "café\t\\".encode(): cafe + "\\t\\",
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
        b"in\rside\r\r\n": b"in\rside\r",
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


def test_a_long_input_takes_no_more_memory_than_a_short_one(stream, queue):
    """96 MB of tasks and 32 MB of blank lines, against one task."""
    console = stream()
    short = int(console.status("VmHWM"))  # KiB
    console.type(f"{'x' * 65_535}\n" * 1500)
    console.type(f"{' ' * 65_535}\n" * 500)
    console.type("after\n")
    console.wait_for_line(r" \[x\] Sent after")
    assert int(console.status("VmHWM")) < short + 24_000
    assert queue.ready() == 1502


def test_each_line_is_told_at_once_and_only_when_confirmed(stream, queue):
    """Also through a pipe; a task that RabbitMQ did not take is not told as sent."""
    console = stream()
    queue.delete()
    console.type("two\nthree\n")
    assert confirmed(told(console, "UnroutableError")) == 1
    assert console.out == [" [x] Sent before"]


@pytest.mark.parametrize("drip", ["", "."], ids=["stalls", "drips"])
def test_an_input_that_lasts_longer_than_heartbeats_allow_is_sent(stream, broker, queue, drip):
    """Whether it stops in the middle of a line, or comes a little at a time."""
    url = broker.url(query="heartbeat=1")
    console = stream(url=url)
    console.type(".")
    # A second client that says nothing either shows when RabbitMQ has lost patience.
    logged = len(broker.log())
    mute = pika.BlockingConnection(pika.URLParameters(url))
    wait_until(
        lambda: console.type(drip) or "missed heartbeats from client" in broker.log()[logged:],
        "RabbitMQ closed the silent connection",
        poll=0.2,
    )
    with pytest.raises(pika.exceptions.AMQPConnectionError):
        mute.channel()
    console.type("after\n")
    console.stdin.close()
    assert console.wait() == 0
    first, last = queue.take_all()
    assert (first, last.lstrip(b".")) == (b"before", b"after")


def test_an_input_that_another_program_made_non_blocking_is_read_to_its_end(start):
    """Nothing yet is not the end."""
    reader, writer = os.pipe()
    with open(reader, "rb") as stdin, open(writer, "wb", buffering=0) as tasks:
        os.set_blocking(reader, False)
        console = start(NEW_TASK, "-", stdin=stdin)
        tasks.write(b"one\ntw")
        console.wait_for_line(r" \[x\] Sent one")
        tasks.write(b"o\n")
        console.wait_for_line(r" \[x\] Sent two")
    assert console.wait() == 0
    assert console.err == []


# --- Cut short ---


@pytest.mark.parametrize("cut_by", ["Ctrl+C", "a crash of RabbitMQ"])
def test_cut_short_it_says_how_many_were_confirmed(start, running_broker, queue, cut_by):
    """Those are in the queue, and at most the one that was on its way."""
    tasks = [b"task %d" % number for number in range(300_000)]
    console = start(NEW_TASK, "-", stdin=b"\n".join(tasks))
    console.wait_for_line(r" \[x\] Sent .*", count=200)
    if cut_by == "Ctrl+C":
        console.ctrl_c()
        assert console.wait() == 130
        [line] = console.err
        assert line.startswith("new_task.py: interrupted")
    else:
        running_broker.kill()
        line = told(console, r"\w+ \w+", since=time.monotonic())
        running_broker.start()
    in_queue = queue.take_all()
    assert in_queue == tasks[: len(in_queue)]
    assert confirmed(line) <= len(in_queue) <= confirmed(line) + 1
    assert confirmed(line) - 1 <= len(console.out) <= confirmed(line)


def interrupted_at_once(console):
    """Press Ctrl+C, and assert that the script ends at once and says so."""
    pressed = time.monotonic()
    console.ctrl_c()
    assert console.wait() == 130
    assert time.monotonic() - pressed < 1
    assert re.fullmatch(r"new_task\.py: interrupted \(tasks confirmed: [01]\)", *console.err)


def test_ctrl_c_ends_it_at_once_while_it_waits_for_input(stream):
    interrupted_at_once(stream())


def test_ctrl_c_ends_it_at_once_while_the_broker_is_silent(start):
    """It does not go on to the next one."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"amqp://127.0.0.1:{silent.getsockname()[1]}"
        console = start(NEW_TASK, "task", url=f"{url},{url}")
        client, _ = silent.accept()
        interrupted_at_once(console)
        client.close()


def test_ctrl_c_ends_it_at_once_while_no_name_server_answers(start, silent_name_server, tmp_path):
    """pika looks names up in a thread, for which Python's own end would wait."""
    console = start(NEW_TASK, "task", url="amqp://rabbit.example", env=silent_name_server)
    wait_until((tmp_path / "asked").exists, "it asks the name server")
    interrupted_at_once(console)


def test_when_all_is_confirmed_a_broker_that_dies_is_no_failure(stream, running_broker):
    """It is no longer there for a goodbye."""
    console = stream()
    with running_broker.frozen():
        console.stdin.close()
        assert console.wait() == 0
    assert console.err == []


# --- Standard streams that cannot be written, or are too long ---


@pytest.fixture
def shell(open_console, queue):
    """Start a command of bash, in which `new_task` is the script."""
    function = f'new_task() {{ {shlex.quote(sys.executable)} {NEW_TASK} "$@"; }}\n'
    return lambda command: open_console("bash", "-c", function + command)


def test_an_input_too_large_for_the_memory_is_told(shell):
    """A gigabyte without a line end, and a process that may have a third of it."""
    zeros = "head -c 1000000000 /dev/zero"
    console = shell(f"ulimit -v 300000; {zeros} | {{ new_task -; echo status $? >&2; }}")
    console.wait_for_line("status 1")
    assert (console.err[0], console.err[-2]) == (TRACEBACK, "MemoryError")


STALLS = "{ echo task; sleep 600; }"


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("yes | head -n 1000 | { new_task -; echo status $? >&2; } | head -n 1", "BrokenPipeError"),
        ("new_task task > /dev/full; echo status $? >&2", "OSError"),
        (f"{STALLS} | {{ new_task - > /dev/full; echo status $? >&2; }}", "OSError"),
        ("new_task - <&-; echo status $? >&2", "AttributeError"),
    ],
    ids=["no reader", "a full disk", "a full disk, while the input stalls", "no input"],
)
def test_a_stream_that_cannot_be_used_is_told_as_python_tells_it(shell, command, error):
    console = shell(command)
    console.wait_for_line(r"status [1-9]\d*")
    assert console.err[0] == TRACEBACK
    assert any(line.startswith(error) for line in console.err)
    assert not any("cannot send" in line for line in console.err)


def test_it_ends_though_its_line_cannot_be_written(shell, running_broker):
    """RabbitMQ dies while the input stalls, and standard error is full."""
    console = shell(f"{STALLS} | {{ exec 3>&2; new_task - 2> /dev/full; echo status $? >&3; }}")
    console.wait_for_line(r" \[x\] Sent task")
    running_broker.kill()
    console.wait_for_line(r"status [1-9]\d*")


def test_where_there_is_no_console_it_sends_and_shows_nothing(shell, queue):
    """A fault does not get into standard output, either."""
    console = shell(
        "new_task task >&-; echo status $?\n"
        "AMQP_URL=amqp://localhost:1 new_task 2>&-; echo status $?"
    )
    assert console.wait() == 0
    assert (console.out, console.err) == (["status 0", "status 1"], [])
    assert queue.take_all() == [b"task"]


NOTEBOOK = """import runpy, sys, types
sys.stdout = types.SimpleNamespace(write=sys.stdout.write, flush=sys.stdout.flush)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_runs_where_standard_output_is_not_pythons_own(start, queue):
    """As in IDLE and notebooks."""
    console = start("-c", NOTEBOOK, NEW_TASK, "task")
    assert console.wait() == 0
    assert console.out == [" [x] Sent task"]
