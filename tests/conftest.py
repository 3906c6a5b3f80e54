"""The fixtures: a broker for the whole run, a clean queue and consoles for each test."""

import logging
import os
import re
import signal
import sys
import textwrap

import pytest

from tests.harness import brokers
from tests.harness.consoles import ROOT, Console
from tests.harness.scripts import NEW_TASK, RECEIVED, TUTORIAL, WAITING, WORKER
from tests.harness.waiting import wait_until

# A shell that starts us in the background has us ignore Ctrl+C, and our consoles would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.default_int_handler)  # then, too, all that runs is ended
os.environ.pop("PYTHONUNBUFFERED", None)  # it would hide a flush that is missing

if brokers.choose() is not brokers.DockerBroker:
    collect_ignore = ["test_compose.py"]

logging.getLogger("pika").setLevel(logging.CRITICAL)  # it reports each look at a broker that boots


@pytest.fixture(scope="session")
def broker():
    """The broker of this run; TEST_BROKER says which kind."""
    chosen = brokers.choose()()
    try:
        chosen.start()
        yield chosen
    finally:
        chosen.close()


def pytest_report_header():
    return f"broker: {brokers.choose().__name__}"


@pytest.fixture
def queue(broker):
    """A task queue that is not there yet, looked at from outside the scripts."""
    look = Queue(broker)
    look.delete()
    return look


class Queue:
    """`task_queue`, through a connection of the tests' own for every look."""

    def __init__(self, broker):
        self.broker = broker

    def do(self, action):
        """Return `action(channel)` on a channel that is closed thereafter."""
        with self.broker.connect() as connection:
            return action(connection.channel())

    def delete(self):
        self.do(lambda channel: channel.queue_delete("task_queue"))

    def declare(self, durable=True, **arguments):
        self.do(lambda ch: ch.queue_declare("task_queue", durable=durable, arguments=arguments))

    def publish(self, body):
        """Put `body` (bytes) into the queue as any producer may."""
        self.do(lambda channel: channel.basic_publish("", "task_queue", body))

    def ready(self):
        """Return how many tasks wait for a worker (at once, while rabbitmqctl lags)."""
        return self.do(
            lambda channel: channel.queue_declare("task_queue", passive=True).method.message_count
        )

    def consumers(self):
        return self.do(
            lambda channel: channel.queue_declare("task_queue", passive=True).method.consumer_count
        )

    def take(self):
        """Take one task off; return (body, properties), or None when there is none."""

        def get(channel):
            method, properties, body = channel.basic_get("task_queue", auto_ack=True)
            return (body, properties) if method else None

        return self.do(get)

    def counts(self):
        """Return (ready, unacknowledged) as `rabbitmqctl list_queues` shows them."""
        shown = self.broker.ctl(
            "list_queues", "name", "messages_ready", "messages_unacknowledged", "--no-table-headers"
        )
        rows = {
            row.split("\t")[0]: row.split("\t")[1:] for row in shown.splitlines() if "\t" in row
        }
        ready, unacknowledged = rows["task_queue"]
        return int(ready), int(unacknowledged)

    def wait_for_counts(self, ready, unacknowledged):
        wait_until(
            lambda: self.counts() == (ready, unacknowledged),
            f"{ready} ready and {unacknowledged} unacknowledged in rabbitmqctl list_queues",
            timeout=60,
        )


@pytest.fixture
def open_console(broker, queue):
    """Start programs that talk to the broker; all are ended with the test."""
    opened = []

    def start(*argv, url=None, env=None, **options):
        console = Console(*argv, env={"AMQP_URL": url or broker.url(), **(env or {})}, **options)
        opened.append(console)
        return console

    yield start
    for console in opened:
        console.close()
    for console in opened:  # pytest shows this with a test that failed
        print(console.transcript)


@pytest.fixture
def worker(open_console):
    """Start `python worker.py`, and wait until it waits for messages (unless `waiting=False`)."""

    def start(*words, waiting=True, **options):
        console = open_console(*WORKER, *words, **options)
        if waiting:
            console.wait_for_line(WAITING)
        return console

    return start


@pytest.fixture
def workers(worker, queue):
    """Start `count` workers that get tasks in this order: each consumes before the next starts."""

    def start(count):
        started = []
        while len(started) < count:
            started.append(worker())  # which shows that it waits a moment before it consumes
            wait_until(lambda: queue.consumers() == len(started), "it consumes")
        return started

    return start


@pytest.fixture
def worker_of(open_console, tmp_path):
    """Start worker.py with `lines` as its work(), as a program that imports it and has its own.

    What stands at the `top` of that program is run first. It waits for messages then.
    """

    def start(lines, top="", **options):
        program = tmp_path / "own.py"
        program.write_text(
            f"import asyncio, os, sys, time\nimport worker\n{top}\ndef work(body):\n"
            + textwrap.indent(lines, "    ")
            + "\nworker.work = work\nif __name__ == '__main__':\n    worker.main()\n"
        )
        env = {"PYTHONPATH": str(ROOT)}
        console = open_console(sys.executable, str(program), env=env, **options)
        console.wait_for_line(WAITING)
        return console

    return start


@pytest.fixture
def busy(worker, queue):
    """A worker with a task of `seconds` in hand, and a second task that waits."""

    def start(seconds, **options):
        console = worker(**options)
        queue.publish(b"in hand" + b"." * seconds)
        console.wait_for_line(RECEIVED)
        queue.publish(b"waits")
        return console

    return start


@pytest.fixture
def start_new_task(open_console):
    """Start `python new_task.py WORDS` and leave it running."""
    return lambda *words, **options: open_console(*NEW_TASK, *words, **options)


@pytest.fixture
def new_task(start_new_task):
    """Run `python new_task.py WORDS` until it ends well; return its console."""

    def send(*words, status=0, **options):
        console = start_new_task(*words, **options)
        assert console.wait() == status, console.transcript
        return console

    return send


@pytest.fixture
def silent_name_server(tmp_path):
    """The environment of a program that waits for each name it looks up.

    When it asks, there is a file `asked` in `tmp_path`.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, socket, time\n"
        "def wait(*_, **__):\n"
        f"    pathlib.Path({str(tmp_path / 'asked')!r}).touch()\n"
        "    time.sleep(60)\n"
        "socket.getaddrinfo = wait\n"
    )
    return {"PYTHONPATH": str(tmp_path)}


@pytest.fixture
def quorum_url(broker):
    """The URL of a vhost in which a queue is a quorum queue unless it is declared otherwise."""
    broker.ctl("add_vhost", "quorum", "--default-queue-type", "quorum")
    try:
        broker.ctl("set_permissions", "--vhost", "quorum", "guest", ".*", ".*", ".*")
        yield broker.url(vhost="quorum")
    finally:
        broker.ctl("delete_vhost", "quorum")


@pytest.fixture
def tutorials(open_console, tmp_path):
    """Start the tutorial's own `role` with `words`, altered by `edits` (old text: new text)."""

    def start(role, *words, edits=None, **options):
        text = TUTORIAL[role].read_text()
        for old, new in (edits or {}).items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / f"{role}.py").write_text(text)
        console = open_console(sys.executable, str(tmp_path / f"{role}.py"), *words, **options)
        if role == "worker":
            console.wait_for_line(WAITING)
        else:
            console.wait()
        return console

    return start


@pytest.fixture
def orderly(broker):
    """Assert that a program which has ended had closed its connection as AMQP wants it."""

    def check(console):
        # The first line is logged at any end; the second says whether it was a sudden one.
        closing = rf"closing AMQP connection .* {console.process.pid}[,)].*\n.*\n?"
        lines = wait_until(lambda: re.search(closing, broker.log()), "its end is logged")[0]
        assert "client unexpectedly closed TCP connection" not in lines

    return check


@pytest.fixture
def running_broker(broker):
    """The broker, for tests that stop it: it runs again when they end.

    After a kill it is a new one: RabbitMQ 4.0 was then seen to give a queue the tasks of a deleted
    one of its name, and to lose its own. The fixture `queue` deletes; users seldom do.
    """
    yield broker
    broker.renew()
