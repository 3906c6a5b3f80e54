"""Whatever fails, both scripts say so in one line, and why.

Most tests end in `told`: one line that starts with the program's name and says what failed, at
which host and port, and why, without a traceback or a password. It comes within 30 seconds.
"""

import contextlib
import re
import socket
import socketserver
import subprocess
import threading
import time

import pika
import pytest

from tests.harness.scripts import NEW_TASK, NOBODY, SECRET, WAITING, WORKER, confirmed, told
from tests.harness.waiting import wait_until


@pytest.fixture(scope="module")
def powerless(broker):
    """A user who may log in, and may do nothing else: user:password."""
    broker.ctl("add_user", "powerless", SECRET)
    broker.ctl("set_permissions", "powerless", "^$", "^$", "^$")
    yield f"powerless:{SECRET}"
    broker.ctl("delete_user", "powerless")


# --- Where nothing can be sent to or consumed from ---


def test_a_broker_that_does_not_let_us_in(start, broker, program, powerless):
    reasons = {
        f"amqp://u:{SECRET}@{NOBODY}/": "nothing listens there; start RabbitMQ",
        f"amqp://u:{SECRET}@:1/": "nothing listens there; start RabbitMQ",
        f"amqp://u:{SECRET}@no-such-host.invalid:1/": "unknown host",
        f"amqp://u:{SECRET}@rabbit..example:1/": "unknown host",
        f"amqp://u:{SECRET}@[fe80::1]:1/": "Invalid argument|No route|unreachable",
        broker.url(f"guest:{SECRET}"): "login refused; check the user and password in AMQP_URL",
        broker.url(f"{SECRET}\udce9:{SECRET}\udce9"): "login refused",  # a byte that is not UTF-8
        broker.url(powerless, vhost="lost"): "NOT_ALLOWED - vhost lost not found",
        broker.url(powerless): "ACCESS_REFUSED - .*access to queue 'task_queue'",
    }
    consoles = [start(program, url=url) for url in reasons]
    for console, (url, why) in zip(consoles, reasons.items(), strict=True):
        parameters = pika.URLParameters(url)
        told(console, why, f" {parameters.host}:{parameters.port}: ")


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
    line = f"{program}: cannot use AMQP_URL; write amqp://user:password@host:port/vhost"
    for console in [start(program, url=url) for url in unusable]:
        assert console.wait() == 1
        assert console.err == [line]


def test_a_file_that_the_url_names_and_that_cannot_be_read_ends_both(start, program):
    """When they start; later it is a fault like others: test_tls.py."""
    url = f"amqps://guest:{SECRET}@localhost:1/?ssl_options={{'ca_certs': '/no/file'}}"
    console = start(program, url=url)
    assert console.wait() == 1
    told = rf"{program}: cannot read a file that AMQP_URL names: .*No such file.*"
    assert re.fullmatch(told, *console.err)


# --- Several URLs ---


def test_a_broker_that_fails_is_left_for_another(new_task, broker):
    """Blanks around a URL do no harm. Of ten scripts, some will try a bad one first."""
    urls = f" amqp://{NOBODY}/ , amqp://no-such-host.invalid:1/ , {broker.url()} "
    for _ in range(10):
        assert new_task("task", url=urls).err == []


def test_a_worker_takes_them_in_turn(worker, broker):
    """Beside a silent one, each has at most one failure; tried at random, one in four has more."""
    with listener(None) as place:
        urls = f"amqp://{place}/?stack_timeout=4,{broker.url()}"
        workers = [worker(url=urls, waiting=False) for _ in range(10)]
        for one in workers:
            one.wait_for_line(WAITING, timeout=60)
            assert len(one.err) <= 1


# --- Both scripts' connections ---


def test_a_connection_is_named_after_script_host_and_process(start, broker, program, powerless):
    """RabbitMQ logs that, and no password."""
    console = start(program, url=broker.url(powerless))
    told(console, "ACCESS_REFUSED")
    name = f"{program} {socket.gethostname()} {console.process.pid}"
    wait_until(lambda: name in broker.log(), "it is in the log")
    assert SECRET not in "".join(line for line in broker.log().splitlines() if name in line)


# --- Something else listens there ---


@contextlib.contextmanager
def listener(answer=b""):
    """Listen on a port of 127.0.0.1; send each client `answer` and hang up. None: stay silent."""
    ended = threading.Event()

    def serve(client, *_):
        if answer is None:
            ended.wait()
        else:
            client.recv(8)
            client.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            ended.set()
            server.shutdown()


def test_a_listener_that_is_no_rabbitmq(start, program):
    answers = [
        b"",  # it hangs up
        b"AMQP\0\0\x09\1",  # another version
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\1\0\0\0\0\0\xff",  # half a frame
        b"\x01" * 99,  # noise
    ]
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(listener(answer)) for answer in answers]
        consoles = [start(program, url=f"amqp://u:{SECRET}@{place}/") for place in places]
        for console, place in zip(consoles, places, strict=True):
            told(console, r"\w+ \w+", place)


# --- No answer ---


def test_a_listener_that_never_answers(start, program, tmp_path):
    """Its name has two addresses, as localhost has on many machines."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "once = socket.getaddrinfo\n"
        "socket.getaddrinfo = lambda *given, **named: once(*given, **named) * 2\n"
    )
    with listener(None) as place:
        env = {"PYTHONPATH": str(tmp_path)}
        console = start(program, url=f"amqp://u:{SECRET}@{place}/", env=env)
        told(console, "no AMQP answer", place)


def test_no_answer_to_a_publish_in_an_alarm(start, broker, queue):
    """Ctrl+C ends it at once meanwhile."""
    with broker.alarm():
        blocked = start(NEW_TASK)
        patient = start(NEW_TASK, url=broker.url(query="blocked_connection_timeout=120"))
        wait_until(
            lambda: broker.ctl("list_connections", "state").count("blocked") == 2,
            "both wait for the end of the alarm",
        )
        pressed = time.monotonic()
        patient.ctrl_c()
        assert patient.wait() == 130
        assert time.monotonic() - pressed < 1
        told(blocked, "RabbitMQ is short of memory or disk", f"127.0.0.1:{broker.port}")
        assert blocked.out == patient.out == []


def test_a_broker_that_freezes_before_or_after_the_connection_is_made(start, broker, queue):
    """Idle, in the middle of a publish, and not yet connected."""
    idle, publishing = (start(NEW_TASK, "-", stdin=subprocess.PIPE) for _ in range(2))
    worker = start(WORKER)
    for console in (idle, publishing):
        console.type("one\n")
        console.wait_for_line(r" \[x\] Sent one")
    wait_until(lambda: worker.out.count(" [x] Done") == 2, "both are done")
    with broker.frozen():
        frozen, place = time.monotonic(), f"127.0.0.1:{broker.port}"
        publishing.type("two\n")
        late = [start(NEW_TASK), start(WORKER)]
        for console in late:
            told(console, "no AMQP answer", place)
        for console in (idle, publishing):
            assert confirmed(told(console, r"\w+ \w+", place, frozen)) == 1
        told(worker, r"\w+ \w+", place, frozen)
    assert idle.out == publishing.out == [" [x] Sent one"]


# --- A queue, a task or a broker that will not do ---


@pytest.mark.parametrize(
    "other",
    [{"auto_delete": True}, {"arguments": {"x-queue-type": "quorum"}}],
    ids=["auto-delete", "quorum"],
)
def test_a_task_queue_of_another_kind(start, broker, queue, program, other):
    queue.declare(**other)
    why = "task_queue is there with other properties"
    told(start(program), why, f"127.0.0.1:{broker.port}")


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


def test_a_task_larger_than_the_broker_takes(start, broker, queue):
    with size_limit(broker, 100_000):
        console = start(NEW_TASK, "-", stdin=b"small\n" + b"x" * 200_000 + b"\nnever\n")
        assert confirmed(told(console, "larger than configured max size")) == 1
    assert console.out == [" [x] Sent small"]
    assert queue.take_all() == [b"small"]
