"""The fixtures: a broker, and a clean queue and consoles for each test."""

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest

from tests.harness import brokers
from tests.harness.consoles import ROOT, Console
from tests.harness.pages import USE, block, edited
from tests.harness.proxy import Proxy
from tests.harness.queues import Queue
from tests.harness.scripts import NEW_TASK, NOBODY, WAITING, WORKER
from tests.harness.waiting import wait_until

# A shell that starts us in the background has us ignore Ctrl+C, and our consoles would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.default_int_handler)  # then, too, all that runs is ended
os.environ.pop("PYTHONUNBUFFERED", None)  # it would hide a flush that is missing

logging.getLogger("pika").setLevel(logging.CRITICAL)  # it reports each look at a broker that boots


def pytest_xdist_auto_num_workers():
    """Five for two processors, since tests wait more than they compute; each has a broker."""
    return min(5 * len(os.sched_getaffinity(0)) // 2, 10)


# --- RabbitMQ; TEST_BROKER says which kind ---


def started():
    with contextlib.closing(brokers.choose()()) as broker:
        broker.start()
        yield broker


@pytest.fixture(scope="session")
def shared_broker():
    """The broker of all tests that leave it running."""
    yield from started()


@pytest.fixture
def own_broker():
    """A broker of this test alone, which may stop or kill it; its other fixtures have it, too."""
    yield from started()


@pytest.fixture
def broker(request):
    """The broker of this test."""
    own = "own_broker" in request.fixturenames
    return request.getfixturevalue("own_broker" if own else "shared_broker")


@pytest.fixture
def queue(broker):
    """A task queue that is not there yet, looked at from outside the scripts."""
    look = Queue(broker)
    look.delete()
    return look


# --- Programs ---


@pytest.fixture
def open_alone():
    """Open programs that need no broker; all are ended with the test."""
    opened = []

    def open_one(*argv, url=f"amqp://{NOBODY}", env=None, **options):
        opened.append(Console(*argv, env={"AMQP_URL": url, **(env or {})}, **options))
        return opened[-1]

    yield open_one
    for console in opened:
        console.close()
    for console in opened:  # pytest shows this with a test that failed
        print(console)


@pytest.fixture
def open_console(open_alone, broker, queue):
    """Open programs that talk to the broker, unless their `url` leads elsewhere."""
    return partial(open_alone, url=broker.url())


@pytest.fixture(params=[NEW_TASK, WORKER])
def program(request):
    """Run the test for each of the scripts."""
    return request.param


@pytest.fixture
def start_alone(open_alone):
    """Start `python PROGRAM WORDS`, as a user does, for a test that needs no broker."""
    return partial(open_alone, sys.executable)


@pytest.fixture
def start(open_console):
    """Start `python PROGRAM WORDS`, as a user does, and leave it running."""
    return partial(open_console, sys.executable)


@pytest.fixture
def worker(start):
    """Start `python worker.py`, and wait until it waits for messages."""

    def start_worker(**options):
        console = start(WORKER, **options)
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
def own_work(start, tmp_path_factory):
    """Start worker.py with `text` as its orders.py, as README.md says, in a folder of its own."""
    line = re.search("`(from orders import [^`]*)`", USE)[1]
    script = edited((ROOT / WORKER).read_text(), {f"# {line}": line})

    def start_own(text, folder=None, **options):
        folder = folder or tmp_path_factory.mktemp("own")
        (folder / "orders.py").write_text(text)
        (folder / WORKER).write_text(script)
        console = start(WORKER, cwd=folder, **options)
        console.wait_for_line(WAITING)
        return console

    return start_own


@pytest.fixture
def worker_of(own_work):
    """Start worker.py with `lines` as the body of its work(), below what stands at the `top`."""

    def start_own(lines, top="", **options):
        work = textwrap.indent(lines, "    ")
        return own_work(f"import os, time\n{top}\ndef work(body):\n{work}\n", **options)

    return start_own


@pytest.fixture
def new_task(start):
    """Run `python new_task.py WORDS` until it ends well; return its console."""

    def send(*words, **options):
        console = start(NEW_TASK, *words, **options)
        assert console.wait() == 0
        return console

    return send


@pytest.fixture
def folder(tmp_path):
    """A copy of the project as its user has it, with the pages' take.py."""
    for name in (NEW_TASK, WORKER, "docker-compose.yml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "take.py").write_text(block("python", "basic_get"))
    return tmp_path


@pytest.fixture
def type_in(open_console, folder, broker):
    """Type commands into a console of their own, in that folder, and leave them running."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**broker.shell_env, "PATH": path}
    return lambda typed, **options: open_console(
        "bash", "-c", typed, cwd=folder, env=env, **options
    )


@pytest.fixture
def proxy(broker):
    """A way to the broker that can be cut; `proxy.url` leads through it, with short heartbeats."""
    with contextlib.closing(Proxy(broker.port)) as proxy:
        proxy.url = broker.url(port=proxy.port, query="heartbeat=2")
        yield proxy


@pytest.fixture
def orderly(broker):
    """Assert that a program which has ended had one connection, and closed it as AMQP wants it."""

    def check(console):
        # The first line is logged at any end; the second says whether it was a sudden one.
        closing = rf"closing AMQP connection .* {console.process.pid}[,)].*\n.*\n?"
        [lines] = wait_until(lambda: re.findall(closing, broker.log()), "its end is logged")
        assert "client unexpectedly closed TCP connection" not in lines

    return check
