"""What the scripts' functions take and give: no RabbitMQ, and any system."""

import contextlib
import itertools
import re
import socket
import subprocess
import sys
import textwrap
import threading
import types
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pika
import pytest

import new_task
import worker

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [new_task, worker]
SECRET = "s3cret"  # the password in URLs that fail; no line may show it


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.SCRIPT)
def script(request):
    """Run the test for each of the scripts."""
    return request.param


@pytest.fixture
def brokers(monkeypatch):
    """Return what is made of an AMQP_URL."""

    def brokers_in(urls):
        monkeypatch.setenv("AMQP_URL", urls)
        return new_task.brokers()

    return brokers_in


# --- The two scripts beside the tutorial, and beside each other ---

LISTINGS = {
    new_task: """
        connection = connect(
        channel = connection.channel()
        channel.queue_declare(queue="task_queue", durable=True)
        message = " ".join(sys.argv[1:]) or "Hello World!"
        channel.basic_publish(
        exchange="",
        routing_key="task_queue",
        body=message,
        properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
        print(f" [x] Sent {
        connection.close()""",
    worker: """
        def consume(connection)
        channel = connection.channel()
        channel.queue_declare(queue="task_queue", durable=True)
        print(" [*] Waiting for messages. To exit press CTRL+C")
        channel.basic_qos(prefetch_count=1)
        def callback(ch, method, properties, body):
        print(f" [x] Received {
        print(" [x] Done")
        ch.basic_ack(delivery_tag=method.delivery_tag)
        channel.basic_consume(queue="task_queue", on_message_callback=callback)
        channel.start_consuming()""",
}


def parts(script):
    """Return what stands above the line where the tutorial ends, and the common part."""
    text = Path(script.__file__).read_text()
    above, below = text.split("\n# --- The tutorial ends here.")
    common = below.split("\n# --- The rest is the same in both scripts")[1]
    return above, common.split('\nif __name__ == "__main__":\n')[0]


def test_the_lines_of_the_tutorials_listing_stand_in_its_order(script):
    """Above the line where the tutorial ends; the worker's sleep is in work(), to be replaced."""
    lines = [line.strip() for line in parts(script)[0].splitlines()]
    assert 'time.sleep(body.count(b"."))' in lines or script is new_task
    rest = iter(lines)
    for expected in textwrap.dedent(LISTINGS[script]).strip().splitlines():
        assert any(line.startswith(expected) for line in rest), expected


def test_the_rest_is_the_same_in_both_scripts():
    """So a reader reads it once."""
    (_, one), (_, other) = map(parts, SCRIPTS)
    assert one == other
    assert "pika.BlockingConnection(" in one  # the line of the listings that connect() stands for


# --- AMQP_URL ---


def test_unset_or_empty_it_is_rabbitmq_on_this_machine(brokers, monkeypatch):
    assert brokers("") == [("localhost:5672", "amqp://localhost")]
    monkeypatch.delenv("AMQP_URL")
    assert new_task.brokers() == [("localhost:5672", "amqp://localhost")]


def test_it_may_name_several_brokers_in_any_order(brokers):
    """Blanks around a URL do no harm, and one may have commas of its own."""
    odd = "amqp://odd?client_properties={'one': 1, 'two': 2}"
    expected = {("one:5672", "amqp://one/"), ("two:1", "amqp://two:1"), ("odd:5672", odd)}
    seen = [tuple(brokers(f" amqp://one/ ,amqp://two:1, {odd} ")) for _ in range(100)]
    assert {frozenset(found) for found in seen} == {frozenset(expected)}
    assert len(set(seen)) > 1


def test_escapes_in_it_are_undone_and_parameters_override_the_defaults():
    url = "amqps://me%40home:%2F%3F%23@[::1]:1/a%2Fb?heartbeat=30"
    parameters = new_task.parameters_of(url)
    credentials = parameters.credentials
    assert (credentials.username, credentials.password) == ("me@home", "/?#")
    assert (parameters.host, parameters.port, parameters.virtual_host) == ("::1", 1, "a/b")
    assert (parameters.heartbeat, new_task.parameters_of("amqp://localhost").heartbeat) == (30, 8)


@pytest.mark.parametrize(
    "url",
    [
        "localhost",  # pika would take these for a vhost on localhost
        "http://localhost/",
        "amqp://guest:s3cret@localhost:100000/",
        "amqp://guest:s3cret@localhost:port/",
        "amqp://guest:s3cret@[::1/",
        "amqp://guest:s3cret@localhost:1/?hearbeat=5",
        "amqp://guest:s3cret@localhost:1/?ssl_options=s3cret",
        "amqp://guest:s3cret/pa@localhost:1/",  # the beginning of a password for the port
        "amqp://admin:2024/s3cret@localhost/",
        "amqp://admin:2024?s3cret@localhost/",
        "amqp://admin:2024#s3cret@localhost/",
        "amqp://guest:guest@localhost/,amqp://guest:s3cret@localhost:port/",
        "amqp://\udce9:s3cret@localhost/",  # not UTF-8
    ],
)
def test_one_that_pika_refuses_or_misreads_ends_the_script_and_is_not_shown(brokers, url):
    with pytest.raises(SystemExit) as ended:
        brokers(url)
    assert "cannot use AMQP_URL; write amqp://user:password@host:port/vhost" in ended.value.code
    assert SECRET not in ended.value.code


def test_a_file_that_it_names_and_that_is_not_there_ends_the_script(brokers):
    with pytest.raises(SystemExit, match="cannot read a file that AMQP_URL names: .*No such file"):
        brokers(f"amqps://guest:{SECRET}@localhost/?ssl_options={{'cafile': '/no/file'}}")


# --- Where nothing can be sent to or consumed from ---


def why_not(url):
    """Return how a connection that cannot be made is told."""
    with pytest.raises(pika.exceptions.AMQPConnectionError) as caught:
        new_task.connect(url)
    return new_task.reason(caught.value)


def test_a_host_without_rabbitmq_is_told_with_advice():
    nobody = f"amqp://u:{SECRET}@127.0.0.1:1/"
    assert why_not(nobody) == "nothing listens there; start RabbitMQ"
    unknown = f"amqp://u:{SECRET}@no-such-host.invalid:1/"
    assert why_not(unknown) == "unknown host, or no name server answers"


@pytest.mark.skipif(sys.platform != "linux", reason="others refuse when the queue is full")
def test_a_host_that_takes_no_connection_is_told_with_advice():
    """As one behind a firewall: here the queue of a listener is full."""
    with socket.socket() as full, contextlib.ExitStack() as others:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        while True:
            other = others.enter_context(socket.socket())
            other.settimeout(1)
            try:
                other.connect(full.getsockname())
            except TimeoutError:
                break
        url = f"amqp://u:{SECRET}@127.0.0.1:{full.getsockname()[1]}/?socket_timeout=2"
        assert why_not(url) == "no answer; is the host up, and no firewall in between?"


def test_something_that_is_silent_or_hangs_up_is_told_with_advice():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"amqp://u:{SECRET}@127.0.0.1:{listener.getsockname()[1]}/?stack_timeout=3"
        assert why_not(url) == "no AMQP answer; is RabbitMQ booting or frozen?"

        def hang_up():
            for _ in range(2):  # the connection of above, and the next
                client, _ = listener.accept()
                client.recv(8)
                client.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert why_not(url) == "no AMQP answer; wrong port, or is RabbitMQ booting?"
        thread.join()


def lose(*_):
    raise pika.exceptions.AMQPConnectionError


GROWING = [1, 2, 4, 8, 16, 20, 20]


@pytest.mark.parametrize(
    ("connect", "lasts", "pauses"),
    [
        (lose, 2, GROWING),
        (contextlib.nullcontext, 0.5, GROWING),  # dropped at once
        (contextlib.nullcontext, 2, [1] * 7),
    ],
)
def test_pauses_of_the_worker_grow_and_are_jittered(monkeypatch, connect, lasts, pauses):
    """They begin anew after a connection that lasts for more than a second."""
    waited = []

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == len(pauses):
            sys.exit()

    clock = types.SimpleNamespace(monotonic=partial(next, itertools.count(step=lasts)))
    fakes = {"connect": connect, "consume": lose, "wait": wait, "time": clock}
    for name, fake in fakes.items():
        monkeypatch.setattr(worker, name, fake)
    monkeypatch.setattr(worker, "set_up_output", lambda: None)  # it is pytest's
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        worker.main()
    jitter = [one / least for one, least in zip(waited, pauses, strict=True)]
    assert 1 <= min(jitter) < max(jitter) <= 1.5


# --- What is shown ---


def test_nothing_printed_forges_a_line_or_drives_the_terminal():
    bodies = {
        "Grüße, 世界 🐇 \\".encode(): "Grüße, 世界 🐇 \\",
        b"\xff\xfe": r"\xff\xfe",
        b"a\n [x] Done\r\t": r"a\n [x] Done\r\t",
        b"\x1b[2Jx\x07\x9b": r"\x1b[2Jx\x07\x9b",
        "x\u202eevil\u2028".encode(): r"x\u202eevil\u2028",
        "\U000e0001".encode(): r"\U000e0001",
        b"\0": r"\x00",
        b"": "",
        b"x" * 10_000: "x" * 1000,
    }
    for body, shown in bodies.items():
        assert new_task.printable(body) == shown


# --- Work that fails, or that only looks done ---


@pytest.fixture
def attempt(monkeypatch, capsys):
    """Have worker.py attempt a task with `work` as its work; return the lines that it shows."""

    def attempt_with(work, body=b"task"):
        monkeypatch.setattr(worker, "work", work)
        assert worker.attempt(body) is False
        return capsys.readouterr().err.splitlines()

    return attempt_with


class Mute(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    "error",
    [
        ValueError("forged\nworker.py: cannot do the task: other \x1b[2J"),
        KeyboardInterrupt(),
        SystemExit(0),
        UnicodeEncodeError("utf-8", "\udcff", 0, 1, "mine"),
        Mute(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_work_raises_is_told_with_its_traceback(attempt, error):
    """In which no line can pose as one of ours, or drive the terminal."""

    def work(body):
        raise error

    first, *lines = attempt(work)
    assert first == f"worker.py: cannot do the task: {type(error).__name__}"
    assert lines[0] == "  Traceback (most recent call last):"
    assert "      raise error" in lines
    assert any(re.match(rf"  [\w.]*{type(error).__name__}", line) for line in lines)
    assert all(line.startswith("  ") and line.isprintable() for line in lines)


def test_a_traceback_shows_the_cause_and_no_line_without_end(attempt):
    def work(body):
        try:
            {}[body]
        except KeyError as error:
            raise RuntimeError("x" * 10_000) from error

    lines = attempt(work)
    assert "  KeyError: b'task'" in lines
    assert max(map(len, lines)) == 1002


async def coroutine(body):
    pass


def generator(body):
    yield


async def async_generator(body):
    yield


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize(
    "work",
    [coroutine, generator, async_generator, lambda body: Future()],
)
def test_work_that_has_only_begun_when_it_returns_is_not_done(attempt, work):
    first, *_, last = attempt(work)
    assert first == "worker.py: cannot do the task: TypeError"
    assert "asyncio.run()" in last


# --- The scripts where nothing listens, on any system ---


def start(script, *words):
    argv = [sys.executable, script.__file__, *words]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_new_task_ends_where_nothing_listens(monkeypatch):
    monkeypatch.setenv("AMQP_URL", "amqp://localhost:1")
    sent = start(new_task, "task")
    told = "new_task.py: cannot send to localhost:1: nothing listens there; start RabbitMQ"
    assert sent.communicate(timeout=60) == ("", f"{told} (tasks confirmed: 0)\n")
    assert sent.returncode == 1


def test_the_worker_tries_again_where_nothing_listens(monkeypatch):
    monkeypatch.setenv("AMQP_URL", "amqp://localhost:1")
    told = "worker.py: cannot consume from localhost:1: nothing listens there; start RabbitMQ"
    with start(worker) as trying:
        lines = [trying.stderr.readline() for _ in range(2)]
        trying.kill()
    assert lines == [f"{told}; trying again\n"] * 2


def test_help_is_help_as_the_only_word(script):
    for word in ("-h", "--help"):
        shown, told = start(script, word).communicate(timeout=60)
        for expected in ("AMQP_URL", "Exit status", "Ctrl+C"):
            assert expected in shown
        assert told == ""
