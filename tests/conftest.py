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
from tests.harness.proxy import Proxy
from tests.harness.queues import Queue
from tests.harness.readmes import edited
from tests.harness.scripts import NEW_TASK, RECEIVED, SECRET, TUTORIAL, WAITING, WORKER
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


@pytest.fixture
def queue(broker):
    """A task queue that is not there yet, looked at from outside the scripts."""
    look = Queue(broker)
    look.delete()
    return look


@pytest.fixture
def open_console(broker, queue):
    """Start programs that talk to the broker; all are ended with the test."""
    opened = []

    def open_one(*argv, url=None, env=None, **options):
        console = Console(*argv, env={"AMQP_URL": url or broker.url(), **(env or {})}, **options)
        opened.append(console)
        return console

    yield open_one
    for console in opened:
        console.close()
    for console in opened:  # pytest shows this with a test that failed
        print(console)


@pytest.fixture(params=[NEW_TASK, WORKER])
def program(request):
    """Run the test for each of the scripts."""
    return request.param


@pytest.fixture
def start(open_console):
    """Start `python PROGRAM WORDS`, as a user does, and leave it running."""
    return lambda program, *words, **options: open_console(
        sys.executable, program, *words, **options
    )


@pytest.fixture
def worker(start):
    """Start `python worker.py`, and wait until it waits for messages (unless `waiting=False`)."""

    def start_worker(waiting=True, **options):
        console = start(WORKER, **options)
        if waiting:
            console.wait_for_line(WAITING)
        return console

    return start_worker


@pytest.fixture
def workers(worker, queue):
    """Start `count` workers that get tasks in this order: each consumes before the next starts."""

    def start_workers(count):
        started = []
        while len(started) < count:
            started.append(worker())  # which shows that it waits a moment before it consumes
            wait_until(lambda: queue.consumers() == len(started), "it consumes")
        return started

    return start_workers


@pytest.fixture
def worker_of(start, tmp_path):
    """Start worker.py with `lines` as its work(), as a program that imports it and has its own.

    What stands at the `top` of that program is run first. It waits for messages then.
    """

    def start_own(lines, top="", **options):
        program = tmp_path / "own.py"
        program.write_text(
            f"import asyncio, os, sys, time\nimport worker\n{top}\ndef work(body):\n"
            + textwrap.indent(lines, "    ")
            + "\nworker.work = work\nif __name__ == '__main__':\n    worker.main()\n"
        )
        console = start(program, env={"PYTHONPATH": str(ROOT)}, **options)
        console.wait_for_line(WAITING)
        return console

    return start_own


@pytest.fixture
def busy(worker, queue):
    """A worker with a task of `seconds` in hand, and a second task that waits."""

    def start_busy(seconds):
        console = worker()
        queue.publish(b"in hand" + b"." * seconds)
        console.wait_for_line(RECEIVED)
        queue.publish(b"waits")
        return console

    return start_busy


@pytest.fixture
def new_task(start):
    """Run `python new_task.py WORDS` until it ends well; return its console."""

    def send(*words, **options):
        console = start(NEW_TASK, *words, **options)
        assert console.wait() == 0
        return console

    return send


@pytest.fixture
def powerless(broker):
    """A user who may log in, and may do nothing else: user:password."""
    broker.ctl("add_user", "powerless", SECRET)
    broker.ctl("set_permissions", "powerless", "^$", "^$", "^$")
    yield f"powerless:{SECRET}"
    broker.ctl("delete_user", "powerless")


@pytest.fixture
def proxy(broker):
    """A way to the broker that can be cut; `proxy.url` leads through it, with short heartbeats."""
    proxy = Proxy(broker.port)
    proxy.url = broker.url(port=proxy.port, query="heartbeat=2")
    yield proxy
    proxy.close()


@pytest.fixture
def silent_name_server(tmp_path):
    """The environment of a program that waits for each name it looks up.

    `asked` in `tmp_path` holds the name and the port, once it has asked.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, socket, time\n"
        "def wait(host, port, *_, **__):\n"
        f"    pathlib.Path({str(tmp_path / 'asked')!r}).write_text(f'{{host}}:{{port}}')\n"
        "    time.sleep(60)\n"
        "socket.getaddrinfo = wait\n"
    )
    return {"PYTHONPATH": str(tmp_path)}


@pytest.fixture
def quorum_url(broker):
    """The URL of a vhost in which a queue is a quorum queue unless it is declared otherwise."""
    broker.ctl("add_vhost", "quorum", "--default-queue-type", "quorum")
    broker.ctl("set_permissions", "--vhost", "quorum", "guest", ".*", ".*", ".*")
    yield broker.url(vhost="quorum")
    broker.ctl("delete_vhost", "quorum")


@pytest.fixture
def tutorials(start, tmp_path):
    """Start the tutorial's own `role` with `words`, altered by `edits` (old text: new text)."""

    def start_edited(role, *words, edits=None, **options):
        program = tmp_path / f"{role}.py"
        program.write_text(edited(TUTORIAL[role].read_text(), edits or {}))
        console = start(program, *words, **options)
        if role == "worker":
            console.wait_for_line(WAITING)
        else:
            console.wait()
        return console

    return start_edited


@pytest.fixture
def orderly(broker):
    """Assert that a program which has ended had one connection, and closed it as AMQP wants it."""

    def check(console):
        # The first line is logged at any end; the second says whether it was a sudden one.
        closing = rf"closing AMQP connection .* {console.process.pid}[,)].*\n.*\n?"
        [lines] = wait_until(lambda: re.findall(closing, broker.log()), "its end is logged")
        assert "client unexpectedly closed TCP connection" not in lines

    return check


@pytest.fixture
def running_broker(broker):
    """The broker, for tests that stop it: it runs again when they end.

    After a kill it is a new one, unless it is the cluster: RabbitMQ 4.0 was then seen to lose the
    tasks of a queue, and to give it those of a deleted one of its name. (The fixture `queue`
    deletes it in each test; users seldom do.)
    """
    yield broker
    broker.renew()
