"""Whatever fails, both scripts say so in one line, and why.

Every row ends in `told`: one line that starts with the program's name and says what failed, at
which host and port, and why, without a traceback or a password. It comes within 30 seconds.
"""

import contextlib
import re
import socket
import subprocess
import threading
import time

import pika
import pytest

from tests.harness.brokers import free_ports
from tests.harness.scripts import (
    BOTH,
    NEW_TASK,
    SECRET,
    WAITING,
    WORKER,
    confirmed,
    told,
    within_30_seconds,
)
from tests.harness.waiting import wait_until

USER = f"powerless:{SECRET}"  # may log in, and may do nothing else


@pytest.fixture(scope="module", autouse=True)
def powerless(broker):
    """A user without a single permission in the vhost /."""
    broker.ctl("add_user", *USER.split(":"))
    try:
        broker.ctl("set_permissions", "powerless", "^$", "^$", "^$")
        yield
    finally:
        broker.ctl("delete_user", "powerless")


@pytest.fixture
def start(open_console):
    """Start one of the scripts; new_task.py gets a word, or whatever `words` says."""

    def start(program, *words, **options):
        words = words or (("task",) if program is NEW_TASK else ())
        return open_console(*program, *words, **options)

    return start


# --- Where nothing can be sent to or consumed from ---


@BOTH
def test_a_broker_that_does_not_let_us_in(start, broker, program):
    free = free_ports(1)[0]
    reasons = {
        f"amqp://u:{SECRET}@127.0.0.1:{free}/": "nothing listens there; start RabbitMQ",
        f"amqp://u:{SECRET}@:{free}/": "nothing listens there; start RabbitMQ",
        f"amqp://u:{SECRET}@no-such-host.invalid:1/": "unknown host",
        f"amqp://u:{SECRET}@rabbit..example:1/": "unknown host",
        f"amqp://u:{SECRET}@[fe80::1]:1/": "Invalid argument|No route|unreachable",
        broker.url(f"guest:{SECRET}"): "login refused; check the user and password in AMQP_URL",
        broker.url(f"{SECRET}\udce9:{SECRET}\udce9"): "login refused",  # a byte that is not UTF-8
        broker.url(USER, vhost="lost"): "NOT_ALLOWED - vhost lost not found",
        broker.url(USER): "ACCESS_REFUSED - .*access to queue 'task_queue'",
    }
    consoles = [start(program, url=url) for url in reasons]
    for console, (url, why) in zip(consoles, reasons.items(), strict=True):
        parameters = pika.URLParameters(url)
        told(console, why, f" {parameters.host}:{parameters.port}: ")
        within_30_seconds(console, console.started)


@BOTH
def test_an_unusable_url_ends_both(start, program):
    unusable = [
        "localhost",
        "127.0.0.1:1",
        "rabbit.example/vhost",  # pika would take it for a vhost on localhost
        "ftp://guest:s3cret@localhost/",
        "amqp://guest:s3cret/pa@localhost:1/",  # urllib quotes what it takes for the port
        "amqp://guest:s3cret@localhost:100000/",
        "amqp://guest@localhost:1/",
        "amqp://guest:s3cret@[::1/",
        "amqp://guest:s3cret@localhost:1/?hearbeat=5",
        "amqp://guest:s3cret@localhost:1/?ssl_options=s3cret",
        "amqp://guest:guest@127.0.0.1:1/,amqp://guest:s3cret@localhost:port/",
        "amqp://admin:2024/s3cret@localhost/",  # pika would take these for a host and its port
        "amqp://admin:2024?s3cret@localhost/",
        "amqp://admin:2024#s3cret@localhost/",
        "amqp://localhost/team/jobs",  # and these for another vhost
        "amqp://localhost//",
        "amqp://localhost/team#jobs",
        "http://localhost/",
        "amqp://localhost, rabbit.example",  # a scheme is missing
        "amqp://localhost/, rabbit.example",
    ]
    name = program[-1].rpartition("/")[2]
    line = f"{name}: cannot use AMQP_URL; write amqp://user:password@host:port/vhost"
    for console in [start(program, url=url) for url in unusable]:
        assert console.wait() == 1, console.transcript
        assert console.err == [line], console.transcript


@BOTH
@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_that_the_url_names_and_that_cannot_be_read_ends_both(
    start, program, tmp_path, content
):
    """When they start; later it is a fault like others: test_tls.py."""
    if content:
        (tmp_path / "file").write_text(content)
    url = f"amqps://guest:{SECRET}@localhost:1/?ssl_options={{'ca_certs': '{tmp_path}/file'}}"
    console = start(program, url=url)
    assert console.wait() == 1, console.transcript
    [line] = console.err
    name = program[-1].rpartition("/")[2]
    why = "NO_CERTIFICATE" if content else "No such file or directory"
    assert re.fullmatch(rf"{name}: cannot read a file that AMQP_URL names: .*{why}.*", line)


# --- Several URLs ---


def test_a_broker_that_fails_is_left_for_another(new_task, worker, broker):
    """Blanks around a URL do no harm. Of ten scripts, some will try a bad one first."""
    bad = f"amqp://127.0.0.1:{free_ports(1)[0]}/ , amqp://no-such-host.invalid:1/"
    urls = f" {bad} , {broker.url()} "
    for _ in range(10):
        assert new_task("task", url=urls).err == []
    workers = [worker(url=urls, waiting=False) for _ in range(10)]
    wait_until(
        lambda: any(one.err and re.fullmatch(WAITING, one.out[0]) for one in workers if one.out),
        "a worker that failed with one waits for messages of another",
        timeout=60,
    )
    shown = [line for one in workers for line in one.err]
    assert all(re.search("nothing listens|unknown host", line) for line in shown)


def test_a_worker_takes_them_in_turn(worker, broker):
    """Beside a silent one, each has at most one failure; tried at random, one in four has more."""
    with listener(None) as place:
        urls = f"amqp://{place}/?stack_timeout=4,{broker.url()}"
        workers = [worker(url=urls, waiting=False) for _ in range(10)]
        for one in workers:
            one.wait_for_line(WAITING, timeout=60)
            assert len(one.err) <= 1, one.transcript


def test_new_task_names_the_one_it_tried_last_when_none_takes_it(start, broker):
    """With the reason that is its own."""
    login = broker.url(f"guest:{SECRET}")
    console = start(NEW_TASK, url=f"amqp://u:{SECRET}@127.0.0.1:{free_ports(1)[0]},{login}")
    line = told(console, "nothing listens there|login refused").text
    assert ("login refused" in line) == (f":{broker.port}:" in line)


# --- Both scripts' connections ---


@BOTH
def test_the_connection_is_named_after_script_host_and_process(start, broker, program):
    console = start(program, *(["-"] if program is NEW_TASK else []), stdin=subprocess.PIPE)
    expected = f"{program[-1].rpartition('/')[2]} {socket.gethostname()} {console.process.pid}"
    wait_until(
        lambda: (
            f'"connection_name","{expected}"' in broker.ctl("list_connections", "client_properties")
        ),
        f"{expected} in rabbitmqctl list_connections",
    )


# --- Something else listens there ---


@contextlib.contextmanager
def listener(answer=b""):
    """Listen on a port of 127.0.0.1; send each client `answer` and hang up. None: stay silent."""

    def serve():
        with contextlib.suppress(OSError):  # the end
            while True:
                client = server.accept()[0]
                clients.append(client)
                if answer is not None:
                    with client:
                        client.recv(8)
                        client.sendall(answer)

    clients, server = [], socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
        for client in clients:
            client.close()


@BOTH
def test_a_listener_that_is_no_rabbitmq(start, program):
    answers = {
        "hangs up": b"",
        "another AMQP": b"AMQP\0\0\x09\1",
        "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
        "half a frame": b"\1\0\0\0\0\0\xff",
        "noise": b"\x01" * 99,
    }
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(listener(answer)) for answer in answers.values()]
        consoles = [start(program, url=f"amqp://u:{SECRET}@{place}/") for place in places]
        for console, place in zip(consoles, places, strict=True):
            told(console, r"\w+ \w+", place)
            within_30_seconds(console, console.started)


# --- No answer: these take their time, and so run at once ---


def test_no_answer_from_a_listener_and_none_to_a_publish_in_an_alarm(
    start, broker, queue, tmp_path
):
    """A worker is none the worse for an alarm, nor is a publisher that Ctrl+C ends.

    The listener's name has two addresses, as localhost has on many machines.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "once = socket.getaddrinfo\n"
        "socket.getaddrinfo = lambda *given, **named: once(*given, **named) * 2\n"
    )
    with broker.alarm(), listener(None) as place:
        given = {"url": f"amqp://u:{SECRET}@{place}/", "env": {"PYTHONPATH": str(tmp_path)}}
        silent = [start(NEW_TASK, **given), start(WORKER, **given)]
        patient_url = broker.url(query="blocked_connection_timeout=120")
        patient, worker = start(NEW_TASK, "patient", url=patient_url), start(WORKER)
        worker.wait_for_line(WAITING)
        wait_until(
            lambda: "blocked" in broker.ctl("list_connections", "state"),
            "the publisher waits for the end of the alarm",
        )
        blocked = start(NEW_TASK)
        pressed = time.monotonic()
        patient.ctrl_c()
        assert patient.wait() == 130
        assert time.monotonic() - pressed < 1
        for console in silent:
            told(console, "no AMQP answer", place)
            within_30_seconds(console, console.started)
        told(blocked, "RabbitMQ is short of memory or disk", f"127.0.0.1:{broker.port}")
        within_30_seconds(blocked, blocked.started)
        assert blocked.out == patient.out == worker.err == []


def test_a_broker_that_freezes_before_or_after_the_connection_is_made(start, broker, queue):
    """Idle, in the middle of a publish, and not yet connected."""
    idle, publishing = (start(NEW_TASK, "-", stdin=subprocess.PIPE) for _ in range(2))
    worker = start(WORKER)
    worker.wait_for_line(WAITING)
    for console in (idle, publishing):
        console.stdin.write(b"one\n")
        console.stdin.flush()
        console.wait_for_line(r" \[x\] Sent one")
    wait_until(lambda: worker.out.count(" [x] Done") == 2, "both are done")
    with broker.frozen():
        frozen = time.monotonic()
        publishing.stdin.write(b"two\n")
        publishing.stdin.flush()
        late = [start(NEW_TASK), start(WORKER)]
        place = f"127.0.0.1:{broker.port}"
        for console in late:
            told(console, "no AMQP answer", place)
        for console in (idle, publishing):
            assert confirmed(told(console, r"\w+ \w+", place).text) == 1
        told(worker, r"\w+ \w+", place)
        for console in (*late, idle, publishing, worker):
            within_30_seconds(console, frozen)


# --- A queue, a task or a broker that will not do ---


@BOTH
@pytest.mark.parametrize(
    "other",
    [{"auto_delete": True}, {"arguments": {"x-queue-type": "quorum"}}],
    ids=["auto-delete", "quorum"],
)
def test_a_task_queue_of_another_kind(start, broker, queue, program, other):
    queue.do(lambda channel: channel.queue_declare("task_queue", durable=True, **other))
    console = start(program)
    told(console, "task_queue is there with other properties", f"127.0.0.1:{broker.port}")
    within_30_seconds(console, console.started)


def test_a_full_queue_that_rejects(start, broker, queue, tmp_path):
    """What it took before it was full was confirmed, and no more was told as sent."""
    policy = '{"max-length": 2, "overflow": "reject-publish"}'
    (tmp_path / "tasks").write_bytes(b"1\n2\n3\n4\n")
    broker.ctl("set_policy", "full", "^task_queue$", policy, "--apply-to", "queues")
    try:
        with (tmp_path / "tasks").open("rb") as stdin:
            console = start(NEW_TASK, "-", stdin=stdin)
        line = told(console, "the queue is full", f"127.0.0.1:{broker.port}")
        assert confirmed(line.text) == len(console.out) == queue.ready() < 4
        one = start(NEW_TASK)
        told(one, "the queue is full", f"127.0.0.1:{broker.port}")
        assert one.out == []
    finally:
        broker.ctl("clear_policy", "full")


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


def test_a_task_larger_than_the_broker_takes(start, broker, queue, tmp_path):
    (tmp_path / "tasks").write_bytes(b"small\n" + b"x" * 200_000 + b"\nnever\n")
    with size_limit(broker, 100_000), (tmp_path / "tasks").open("rb") as stdin:
        several, one = start(NEW_TASK, "-", stdin=stdin), start(NEW_TASK, "x" * 110_000)
        place = f"127.0.0.1:{broker.port}"
        assert confirmed(told(several, "larger than configured max size", place).text) == 1
        told(one, "larger than", place)
    assert (several.out, one.out) == ([" [x] Sent small"], [])
    assert queue.ready() == 1
