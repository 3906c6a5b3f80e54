"""Section 1 of the contract: new_task.py sends what is typed, or each line of standard input."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pika
import pytest
from consoles import script
from waiting import wait_until

NEW_TASK = script("new_task.py")

INTERRUPTED = (130, -signal.SIGINT)  # a shell shows both as 130
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


@pytest.mark.parametrize(
    ("words", "task"),
    [
        ((), "Hello World!"),
        (("",), "Hello World!"),  # as in the tutorial
        (("fix", "--all", "-x"), "fix --all -x"),
        (("-x",), "-x"),
        (("--all", "-"), "--all -"),
        (("-", "and", "words"), "- and words"),
        (("fix", "--help"), "fix --help"),
        (("fix", "-h"), "fix -h"),
        (("--helpful",), "--helpful"),
        (("--", "--help"), "-- --help"),
        (("two  spaces", "", " x "), "two  spaces   x "),
        (("naïve", "日本語", "🐇..."), "naïve 日本語 🐇..."),
    ],
)
def test_words_are_words(new_task, queue, words, task):
    console = new_task(*words, env=LOCALES["C.UTF-8"])
    assert (console.out, console.err) == ([f" [x] Sent {task}"], [])
    assert drain(queue) == [task.encode()]


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
@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (b"caf\xe9 \xff\xfe", r"caf\xe9 \xff\xfe"),
        ("café".encode(), ("café", r"caf\xe9")),
        (b"\xed\xb2\x80 \xf0\x9f", r"\xed\xb2\x80 \xf0\x9f"),  # surrogates, half a character
        (b"forge\n [x] Done\x1b[2J\r", r"forge\n [x] Done\x1b[2J\r"),
        ("café\t\\".encode(), ("café\\t\\", r"caf\xe9\t" + "\\")),
    ],
    ids=["latin-1", "utf-8", "broken", "control", "both"],
)
def test_the_bytes_typed_are_the_bytes_sent(new_task, queue, locale, typed, shown):
    """Under any locale; what the terminal cannot show, or would obey, is shown escaped."""
    console = new_task(typed, env=LOCALES[locale])
    if isinstance(shown, tuple):
        shown = shown[locale == "ASCII"]
    assert (console.out, console.err) == ([f" [x] Sent {shown}"], [])
    assert drain(queue) == [typed]


def test_an_ascii_terminal_shows_the_rest_escaped(new_task, queue):
    console = new_task("naïve 🐇", env={"PYTHONIOENCODING": "ascii"})
    assert console.out == [r" [x] Sent na\xefve \U0001f407"]
    assert drain(queue) == ["naïve 🐇".encode()]


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


def test_no_lines_are_no_tasks(new_task, queue):
    assert new_task("-").out == []  # /dev/null
    assert queue.ready() == 0


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
        r"new_task\.py: cannot send .*the queue was deleted.*\(1 .*confirmed\)", fault
    )


def test_an_input_that_stalls_for_longer_than_heartbeats_allow_goes_on(
    start_new_task, broker, queue
):
    console = start_new_task("-", stdin=subprocess.PIPE, url=broker.url(query="heartbeat=1"))
    console.stdin.write(b"before\n")
    console.stdin.flush()
    console.wait_for_line(r" \[x\] Sent before")
    # A second client that says nothing either shows when RabbitMQ has lost patience.
    before = broker.log().count("missed heartbeats from client")
    mute = pika.BlockingConnection(pika.URLParameters(broker.url(query="heartbeat=1")))
    wait_until(
        lambda: broker.log().count("missed heartbeats from client") > before,
        "RabbitMQ closed the silent connection",
    )
    with pytest.raises(pika.exceptions.AMQPConnectionError):
        mute.channel()
    console.stdin.write(b"after\n")
    console.stdin.close()
    assert console.wait() == 0, console.transcript
    assert drain(queue) == [b"before", b"after"]


# --- Cut short ---


@pytest.mark.parametrize("cut", ["Ctrl+C", "kill -9 of the broker"])
def test_cut_short_it_says_how_many_were_confirmed(
    start_new_task, running_broker, queue, tmp_path, cut
):
    """That many, and at most the one on its way, are in the queue: go on from there."""
    tasks, path = numbered(tmp_path, 300_000)
    with path.open("rb") as stdin:
        console = start_new_task("-", stdin=stdin)
    console.wait_for_line(r" \[x\] Sent .*", count=200)
    if cut == "Ctrl+C":
        console.ctrl_c()
        assert console.wait() == 130
    else:
        running_broker.kill()
        assert console.wait() == 1
        running_broker.start()
    [fault] = console.err
    confirmed = int(re.fullmatch(r"new_task\.py: .* \((\d+) tasks confirmed\)", fault)[1])
    in_queue = drain(queue)
    assert in_queue == tasks[: len(in_queue)]
    assert confirmed <= len(in_queue) <= confirmed + 1
    assert confirmed - 1 <= len(console.out) <= confirmed


def test_input_that_another_program_made_non_blocking_is_not_taken_for_its_end(
    start_new_task, queue
):
    reader, writer = os.pipe()
    with open(reader) as stdin, open(writer, "wb", buffering=0) as tasks:
        os.set_blocking(reader, False)
        tasks.write(b"one\n")
        console = start_new_task("-", stdin=stdin)
        console.wait_for_line(r" \[x\] Sent one")
        tasks.write(b"two\n")
        console.wait_for_line(r" \[x\] Sent two")
    assert console.wait() == 0


@pytest.mark.parametrize("word", ["task", "-"])
def test_ctrl_c_at_any_moment_of_a_run_is_no_traceback(open_console, queue, tmp_path, word):
    """But for one from Python's own start, which lasts until the script's first import is done."""
    (tmp_path / "tasks").write_bytes(b"task\n")
    first_import = Path(NEW_TASK[1]).read_text().splitlines().index("import signal") + 1
    for delay in range(0, 200, 8):
        with (tmp_path / "tasks").open("rb") as stdin:
            console = open_console(*NEW_TASK, word, stdin=stdin)
        time.sleep(delay / 1000)  # the moment is what is tested
        console.ctrl_c()
        status = console.wait()
        shown = "\n".join(console.err)
        frames = [int(line) for line in re.findall(r'new_task\.py", line (\d+)', shown)]
        first = next(iter(console.lines), None)
        if first and first.stream == "err" and not first.text.startswith("new_task.py: "):
            assert all(line <= first_import for line in frames), f"{delay} ms\n{shown}"
            continue  # Python's own start tells it, and then ends or goes on
        assert status in (0, *INTERRUPTED), console.transcript
        assert len(console.err) <= 1, console.transcript
        if status == 0:
            assert console.out == [" [x] Sent task"]


def test_ctrl_c_ends_it_at_once_while_it_waits_for_input_or_for_the_broker(start_new_task, queue):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"amqp://guest:guest@127.0.0.1:{silent.getsockname()[1]}"
        for console in (
            start_new_task("-", stdin=subprocess.PIPE),
            start_new_task("task", url=url),
        ):
            if console.stdin:
                console.stdin.write(b"one\n")
                console.stdin.flush()
                console.wait_for_line(r" \[x\] Sent one")
            else:
                client, _ = silent.accept()
            pressed = time.monotonic()
            console.ctrl_c()
            assert console.wait() in INTERRUPTED
            assert time.monotonic() - pressed < 1
            assert "Traceback" not in console.transcript
        client.close()


# --- Standard input and output that are not there ---


def shell(open_console, command, **options):
    """Run `command` in a shell, with $NEW_TASK as the script, whose status comes last on stderr."""
    console = open_console("sh", "-c", command, env={"NEW_TASK": shlex.join(NEW_TASK)}, **options)
    console.wait()
    assert "Traceback" not in console.transcript
    assert "Exception ignored" not in console.transcript
    *faults, status = console.err
    return faults, int(status)


@pytest.mark.parametrize(
    "command",
    [
        "yes | head -n 1000 | { eval $NEW_TASK -; echo $? >&2; } | head -n 1",
        "echo y | eval $NEW_TASK - > /dev/full; echo $? >&2",
        "eval $NEW_TASK one task > /dev/full; echo $? >&2",
    ],
    ids=["a reader that goes away", "a full disk", "a full disk, one task"],
)
def test_an_output_that_cannot_be_written_is_one_line_and_status_1(open_console, command):
    faults, status = shell(open_console, command)
    assert (len(faults), status) == (1, 1)
    assert re.match(r"new_task\.py: cannot write to standard output: .*\w", faults[0])


@pytest.mark.parametrize("words", ["one task", "--help"])
def test_a_closed_output_is_no_traceback(open_console, words):
    faults, status = shell(open_console, f"eval $NEW_TASK {words} >&-; echo $? >&2")
    assert (faults, status) == ([], 0) or (len(faults), status) == (1, 1)


def test_a_closed_input_is_told(open_console, queue):
    faults, status = shell(open_console, "eval $NEW_TASK - <&-; echo $? >&2")
    assert (len(faults), status) == (1, 1)
