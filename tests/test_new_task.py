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

from tests.harness.scripts import NEW_TASK, confirmed
from tests.harness.waiting import wait_until

TRACEBACK = "Traceback (most recent call last):"
LOCALES = {
    "C.UTF-8": {"LC_ALL": "C.UTF-8"},
    "C": {"LC_ALL": "C"},
    "ASCII": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


def drain(queue):
    """Take every task off the queue; return their bodies in order."""

    def get_all(channel):
        gets = iter(lambda: channel.basic_get("task_queue", auto_ack=True)[2], None)
        return list(gets)

    return queue.do(get_all)


def numbered(tmp_path, count):
    """Return `count` numbered tasks, and a file with one of them on each line."""
    tasks = [b"task %d" % number for number in range(count)]
    path = tmp_path / "tasks"
    path.write_bytes(b"\n".join(tasks))
    return tasks, path


# --- One task, from words ---


def test_a_task_goes_through_the_default_exchange_and_is_persistent(new_task, queue):
    console = new_task("First", "message.")
    assert (console.out, console.err) == ([" [x] Sent First message."], [])
    method, properties, body = queue.do(lambda ch: ch.basic_get("task_queue", auto_ack=True))
    assert (method.exchange, method.routing_key, body) == ("", "task_queue", b"First message.")
    assert properties.delivery_mode == pika.DeliveryMode.Persistent.value == 2
    assert drain(queue) == []


def test_the_queue_is_durable_and_has_no_arguments(new_task, queue, broker):
    new_task()
    columns = ("durable", "auto_delete", "exclusive", "name", "arguments")
    rows = broker.ctl("list_queues", *columns, "--no-table-headers").splitlines()
    [row] = [row for row in rows if "\ttask_queue\t" in row]
    *flags, _, arguments = row.split("\t")
    assert flags == ["true", "false", "false"]
    # RabbitMQ 4 adds the type that it chose.
    assert re.fullmatch(r'(\[(\{"x-queue-type","\w+"\})?\])?', arguments)
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
    assert drain(queue) == [task.encode() for task in tasks.values()]


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_help_as_the_first_word_alone(new_task, queue, word):
    """It tells usage, environment, exit status and an example, and sends nothing."""
    console = new_task(word, "me")
    shown = "\n".join(console.out)
    for expected in ("python new_task.py First message.", "AMQP_URL", "Exit status", "--help"):
        assert expected in shown
    assert console.err == []
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="no queue 'task_queue'"):
        queue.ready()


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
    assert drain(queue) == list(tasks)


# --- A task for each line of standard input ---


def test_a_dash_sends_each_line_of_standard_input(new_task, queue, tmp_path):
    """Bytes verbatim without the line end; blank lines are skipped."""
    lines = [
        (b"one\n", b"one"),
        (b"\n", None),
        (b" \t \r\n", None),
        (b"  two  \r\n", b"  two  "),
        (b"--help\n", b"--help"),
        (b"-\n", b"-"),
        (b"caf\xe9 \xff\x00\x1b.\n", b"caf\xe9 \xff\x00\x1b."),
        (b"in\rside\r\r\n", b"in\rside\r"),
        (b"x\x0b\x0c\x85\xe2\x80\xa8y\n", b"x\x0b\x0c\x85\xe2\x80\xa8y"),  # no line ends, these
        (b"last without an end", b"last without an end"),
    ]
    (tmp_path / "in").write_bytes(b"".join(line for line, _ in lines))
    with (tmp_path / "in").open("rb") as stdin:
        console = new_task("-", stdin=stdin)
    tasks = [task for _, task in lines if task]
    assert drain(queue) == tasks
    assert len(console.out) == len(tasks)
    assert console.out[:2] == [" [x] Sent one", " [x] Sent   two  "]
    assert console.err == []


def test_all_lines_go_over_one_connection_named_after_the_process(
    new_task, broker, orderly, tmp_path
):
    tasks, path = numbered(tmp_path, 50)
    with path.open("rb") as stdin:
        console = new_task("-", stdin=stdin)
    assert len(console.out) == len(tasks)
    name = rf"client-provided name: .?new_task\.py {socket.gethostname()} {console.process.pid}\b"
    wait_until(lambda: re.search(name, broker.log()), "the connection's name is in the log")
    assert len(re.findall(name, broker.log())) == 1
    orderly(console)


def test_a_long_input_takes_no_more_memory_than_a_short_one(open_console, queue, tmp_path):
    """96 MB of tasks and 32 MB of blank lines, against one task."""
    measure = (
        "import resource as r, subprocess as s, sys;"
        "print(s.run(sys.argv[1:], stdout=s.DEVNULL).returncode,"
        "r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))"
    )

    def peak(count, blank):
        with path.open("wb") as file:
            for _ in range(count):
                file.write(line)
            for _ in range(blank):
                file.write(b" " * 65_535 + b"\n")
        with path.open("rb") as stdin:
            console = open_console(sys.executable, "-c", measure, *NEW_TASK, "-", stdin=stdin)
            assert console.wait(90) == 0
        status, size = console.out[0].split()
        assert status == "0", console.transcript
        assert queue.ready() == count
        queue.delete()
        return int(size)

    line, path = b"x" * 65_535 + b"\n", tmp_path / "tasks"
    assert peak(1500, 500) < peak(1, 0) + 24_000_000


def test_each_line_is_told_at_once_and_only_when_confirmed(start_new_task, queue):
    """Also through a pipe; a task that RabbitMQ did not take is not told as sent."""
    console = start_new_task("-", stdin=subprocess.PIPE)
    console.stdin.write(b"one\n")
    console.stdin.flush()
    console.wait_for_line(r" \[x\] Sent one")
    queue.delete()
    console.stdin.write(b"two\nthree\n")
    console.stdin.flush()
    assert console.wait() == 1
    assert console.out == [" [x] Sent one"]
    [fault] = console.err
    assert re.fullmatch(
        r"new_task\.py: cannot send to .*: UnroutableError: .* \(tasks confirmed: 1\)", fault
    )


@pytest.mark.parametrize("drip", [b"", b"."], ids=["stalls", "ends no line"])
def test_an_input_that_lasts_longer_than_heartbeats_allow_is_sent(
    start_new_task, broker, queue, drip
):
    """Whether nothing comes, or a little at a time and no line end."""
    console = start_new_task("-", stdin=subprocess.PIPE, url=broker.url(query="heartbeat=1"))
    say(console, b"before\n")
    console.wait_for_line(r" \[x\] Sent before")
    # A second client that says nothing either shows when RabbitMQ has lost patience.
    before = broker.log().count("missed heartbeats from client")
    mute = pika.BlockingConnection(pika.URLParameters(broker.url(query="heartbeat=1")))

    def impatient():
        say(console, drip)
        return broker.log().count("missed heartbeats from client") > before

    wait_until(impatient, "RabbitMQ closed the silent connection", poll=0.2)
    with pytest.raises(pika.exceptions.AMQPConnectionError):
        mute.channel()
    say(console, b"after\n")
    console.stdin.close()
    assert console.wait() == 0, console.transcript
    first, last = drain(queue)
    assert (first, last.lstrip(b".")) == (b"before", b"after")


def say(console, data):
    """Type `data` (bytes) into a console's standard input."""
    console.stdin.write(data)
    console.stdin.flush()


def test_an_input_that_another_program_made_non_blocking_is_read_to_its_end(start_new_task):
    """Nothing yet is not the end."""
    reader, writer = os.pipe()
    with open(reader, "rb") as stdin, open(writer, "wb", buffering=0) as tasks:
        os.set_blocking(reader, False)
        console = start_new_task("-", stdin=stdin)
        tasks.write(b"one\ntw")
        console.wait_for_line(r" \[x\] Sent one")
        tasks.write(b"o\n")
        console.wait_for_line(r" \[x\] Sent two")
    assert console.wait() == 0
    assert console.err == []


# --- Cut short ---


def counted(console, status, queue, tasks):
    """Assert that the confirmed tasks, and at most the one on its way, are in the queue."""
    assert console.wait() == status, console.transcript
    [fault] = console.err
    assert fault.startswith(f"new_task.py: {'interrupted' if status == 130 else 'cannot send to '}")
    in_queue = drain(queue)
    assert in_queue == tasks[: len(in_queue)]
    assert confirmed(fault) <= len(in_queue) <= confirmed(fault) + 1
    assert confirmed(fault) - 1 <= len(console.out) <= confirmed(fault)


@pytest.fixture
def halfway(start_new_task, tmp_path):
    """Start `new_task.py -` with many tasks; return it and them when some are sent."""

    def start():
        tasks, path = numbered(tmp_path, 300_000)
        with path.open("rb") as stdin:
            console = start_new_task("-", stdin=stdin)
        console.wait_for_line(r" \[x\] Sent .*", count=200)
        return console, tasks

    return start


def test_cut_short_by_ctrl_c_it_says_how_many_were_confirmed(halfway, queue):
    console, tasks = halfway()
    console.ctrl_c()
    counted(console, 130, queue, tasks)


def test_cut_short_by_a_crash_of_the_broker_it_says_how_many_were_confirmed(
    halfway, running_broker, queue
):
    console, tasks = halfway()
    running_broker.kill()
    console.wait()
    running_broker.start()
    counted(console, 1, queue, tasks)


def test_an_input_too_large_for_the_memory_is_told(open_console):
    """A gigabyte without a line end, and a process that may have a third of it."""
    limited = "ulimit -v 300000; head -c 1000000000 /dev/zero | { eval $NEW_TASK -; echo $? >&2; }"
    faults, status = shell(open_console, limited)
    assert (faults[0], faults[-1], status) == (TRACEBACK, "MemoryError", 1)


def interrupted_at_once(console):
    """Press Ctrl+C, and assert that the script ends at once and says so."""
    pressed = time.monotonic()
    console.ctrl_c()
    assert console.wait() == 130
    assert time.monotonic() - pressed < 1
    assert re.fullmatch(r"new_task\.py: interrupted \(tasks confirmed: [01]\)", *console.err)


def test_ctrl_c_ends_it_at_once_while_it_waits_for_input(start_new_task, queue):
    console = start_new_task("-", stdin=subprocess.PIPE)
    say(console, b"one\n")
    console.wait_for_line(r" \[x\] Sent one")
    interrupted_at_once(console)


def test_ctrl_c_ends_it_at_once_while_the_broker_is_silent(start_new_task):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"amqp://guest:guest@127.0.0.1:{silent.getsockname()[1]}"
        console = start_new_task("task", url=url)
        client, _ = silent.accept()
        interrupted_at_once(console)
        client.close()


def test_ctrl_c_ends_it_at_once_while_no_name_server_answers(
    start_new_task, silent_name_server, tmp_path
):
    """pika looks names up in a thread, for which Python's own end would wait."""
    console = start_new_task("task", env=silent_name_server)
    wait_until((tmp_path / "asked").exists, "it asks the name server")
    interrupted_at_once(console)


def test_when_all_is_confirmed_a_broker_that_dies_is_no_failure(
    start_new_task, running_broker, queue
):
    """It is no longer there for a goodbye."""
    console = start_new_task("-", stdin=subprocess.PIPE)
    console.stdin.write(b"task\n")
    console.stdin.flush()
    console.wait_for_line(r" \[x\] Sent task")
    with running_broker.frozen():
        console.stdin.close()
        assert console.wait() == 0
    assert console.err == []


# --- Standard output or error that cannot be written ---


def shell(open_console, command):
    """Run `command` in a shell, with $NEW_TASK as the script, whose status comes last on stderr."""
    console = open_console("bash", "-c", command, env={"NEW_TASK": shlex.join(NEW_TASK)})
    status = int(console.wait_for_line(r"\d+").text)
    return console.err[:-1], status


STALLS = "{ echo task; sleep 600; }"


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("yes | head -n 1000 | { eval $NEW_TASK -; echo $? >&2; } | head -n 1", "BrokenPipeError"),
        ("eval $NEW_TASK task > /dev/full; echo $? >&2", "OSError"),
        (f"{STALLS} | {{ eval $NEW_TASK - > /dev/full; echo $? >&2; }}", "OSError"),
    ],
    ids=["a reader that goes away", "a full disk", "a full disk, while the input stalls"],
)
def test_an_output_that_cannot_be_written_is_told_as_python_tells_it(open_console, command, error):
    faults, status = shell(open_console, command)
    assert faults[0] == TRACEBACK
    assert status != 0
    assert any(line.startswith(error) for line in faults)
    assert not any("cannot send" in line for line in faults)


def test_it_ends_though_its_line_cannot_be_written(open_console, running_broker, start_new_task):
    """RabbitMQ dies while the input stalls, and standard error is full."""
    command = f"{STALLS} | {{ exec 3>&2; eval $NEW_TASK - 2> /dev/full; echo $? >&3; }}"
    console = open_console("bash", "-c", command, env={"NEW_TASK": shlex.join(NEW_TASK)})
    console.wait_for_line(r" \[x\] Sent task")
    running_broker.kill()
    assert console.wait_for_line(r"\d+").text != "0"


def test_where_there_is_no_console_it_sends_and_shows_nothing(open_console, queue):
    """A fault does not get into standard output, either."""
    sent = shell(open_console, "eval $NEW_TASK task >&-; echo $? >&2")
    assert sent == ([], 0)
    console = open_console(
        "bash",
        "-c",
        "AMQP_URL=amqp://localhost:1 eval $NEW_TASK task 2>&-; echo status $?",
        env={"NEW_TASK": shlex.join(NEW_TASK)},
    )
    assert console.wait() == 0
    assert console.out == ["status 1"]
    assert queue.take()[0] == b"task"


NOTEBOOK = """import runpy, sys, types
sys.stdout = types.SimpleNamespace(write=sys.stdout.write, flush=sys.stdout.flush)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_runs_where_standard_output_is_not_pythons_own(open_console, queue):
    """As in IDLE and notebooks."""
    console = open_console(sys.executable, "-c", NOTEBOOK, *NEW_TASK[1:], "task")
    assert console.wait() == 0, console.transcript
    assert console.out == [" [x] Sent task"]
