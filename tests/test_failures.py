"""Section 3 of the contract: whatever fails, both scripts say so in one line, and why.

Every row ends in `told`, which holds for all: one line on standard error that starts with the
program's name and says what failed, at which host and port and why; no traceback, no password;
exit status 1 within 30 seconds. The worker tries again when there is hope: then its first line
is looked at, and that it is still there.
"""

import contextlib
import re
import signal
import socket
import subprocess
import threading
import time

import pytest
from brokers import free_ports
from consoles import script
from waiting import wait_until

NEW_TASK, WORKER = script("new_task.py"), script("worker.py")
SCRIPTS = pytest.mark.parametrize("program", [NEW_TASK, WORKER], ids=["new_task.py", "worker.py"])
SECRET = "s3cret"
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


def told(console, why, *places, retried=False):
    """Assert that `console` told its failure in one line, as `why` says; return the line."""
    name = "new_task.py" if NEW_TASK[-1] in console.process.args else "worker.py"
    if retried:
        line = console.wait_for_line(rf"{re.escape(name)}: .* trying again in [\d.]+ s", 32)
        assert console.process.poll() is None, console.transcript
        console.ctrl_c()
        assert console.wait() == 0, console.transcript
    else:
        assert console.wait() == 1, console.transcript
        line = next(line for line in console.lines if line.stream == "err")
    assert console.err == [line.text], console.transcript
    assert re.match(rf"{re.escape(name)}: cannot .*(AMQP_URL|:\d+): .*({why})", line.text), (
        console.transcript
    )
    for place in places:
        assert place in line.text, console.transcript
    assert SECRET not in line.text and "Traceback" not in line.text
    return line


def within_30_seconds(console, since):
    line = next(line for line in console.lines if line.stream == "err")
    assert line.at - since < 30, console.transcript


def port_of(url):
    return re.search(r"\d+(?=/)", url.rpartition("@")[2])[0]


# --- Where nothing can be sent to or consumed from ---


@SCRIPTS
@pytest.mark.parametrize(
    ("url", "why", "hopeless"),
    [
        ("amqp://u:s3cret@127.0.0.1:{free}/", "nothing listens there; start RabbitMQ", False),
        ("amqp://u:s3cret@no-such-host.invalid:1/", "unknown host", False),
        ("amqp://guest:s3cret@127.0.0.1:{port}/%2F", "login refused; check the user", True),
        ("amqp://nobody:s3cret@127.0.0.1:{port}/%2F", "login refused; check the user", True),
        ("amqp://powerless:s3cret@127.0.0.1:{port}/lost", "vhost.*check the vhost", True),
        ("amqp://powerless:s3cret@127.0.0.1:{port}/%2F", "task_queue.*permissions", True),
    ],
    ids=["refused", "unknown host", "password", "user", "vhost", "permissions"],
)
def test_a_broker_that_does_not_let_us_in(start, broker, program, url, why, hopeless):
    url = url.format(port=broker.port, free=free_ports(1)[0])
    console = start(program, url=url)
    place = url.rpartition("@")[2].partition("/")[0]
    told(console, why, place, retried=program is WORKER and not hopeless)
    within_30_seconds(console, console.started)


@SCRIPTS
def test_a_network_without_a_way_there_is_told_in_the_systems_words(start, program):
    """A link-local address that lacks its interface: nothing leaves this machine."""
    console = start(program, url=f"amqp://u:{SECRET}@[fe80::1]:1/")
    told(console, "Invalid argument|No route|unreachable", retried=program is WORKER)


@SCRIPTS
@pytest.mark.parametrize(
    "url",
    [
        "localhost",
        "127.0.0.1:1",
        "ftp://guest:s3cret@localhost/",
        "amqp://guest:s3cret/pa@localhost:1/",  # urllib quotes what it takes for the port
        "amqp://guest:12/s3cret@localhost:1/",  # or takes it for one
        "amqp://guest:12#s3cret@localhost:1/",
        "amqp://guest:s3cret@localhost:100000/",
        "amqp://guest:s3cret@localhost:port/",
        "amqp://guest@localhost:1/",
        "amqp://guest:s3cret@[::1/",
        "amqp://guest:s3cret@localhost:1/?hearbeat=5",
        "amqp://guest:s3cret@localhost:1/?heartbeat=soon",
        "amqp://guest:s3cret@localhost:1/?heartbeat=1&heartbeat=2",
        "amqp://guest:s3cret@localhost:1/?ssl_options=s3cret",
        "amqp://guest:guest@127.0.0.1:1/,amqp://guest:s3cret@localhost:port/",
    ],
)
def test_an_unusable_url(start, program, url):
    console = start(program, url=url)
    line = told(console, "write amqp://user:password@host:port/vhost")
    assert "12" not in line.text


@SCRIPTS
def test_a_url_without_a_host_means_this_machine(start, program):
    port = free_ports(1)[0]
    console = start(program, url=f"amqp://u:{SECRET}@:{port}/")
    told(console, "nothing listens", f"localhost:{port}", retried=program is WORKER)


@pytest.mark.parametrize("first", ["amqp://127.0.0.1:{free}/", "amqp://no-such-host.invalid:1/"])
def test_several_urls_are_tried_in_order(new_task, start, broker, worker, first):
    first = first.format(free=free_ports(1)[0])
    assert new_task("task", url=f"{first},{broker.url()}").err == []
    console = worker(url=f"{first},{broker.url()}")
    told(console, "nothing listens|unknown host", first.rpartition("/")[0][7:], retried=True)


def test_new_task_names_all_urls_when_none_takes_it(start):
    refused = [f"amqp://u:{SECRET}@127.0.0.1:{port}/" for port in free_ports(2)]
    places = " or ".join(f"127.0.0.1:{port_of(url)}" for url in refused)
    told(start(NEW_TASK, url=",".join(refused)), "nothing listens there", places)


def test_a_worker_ends_only_when_none_of_its_urls_gives_hope(start, broker):
    """A wrong vhost is no reason to end while another URL may come back."""
    lost, down = broker.url(vhost="lost"), f"amqp://127.0.0.1:{free_ports(1)[0]}/"
    console = start(WORKER, url=f"{lost},{down}")
    console.wait_for_line(r".*check the vhost.*trying again.*", count=2)
    console = start(WORKER, url=f"{lost},{broker.url('guest:wrong')}")
    assert console.wait() == 1
    assert re.search("check the vhost.*trying again", console.err[0])
    assert console.err[1].endswith("check the user and password in AMQP_URL")


@SCRIPTS
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


@SCRIPTS
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"AMQP\0\0\x09\1",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\1\0\0\0\0\0\xff",
        b"\x01" * 99,
    ],
    ids=["hangs up", "another AMQP", "http", "half a frame", "noise"],
)
def test_a_listener_that_is_no_rabbitmq(start, program, answer):
    with listener(answer) as place:
        console = start(program, url=f"amqp://u:{SECRET}@{place}/")
        told(console, r"hung up|\w+ \w+", place, retried=program is WORKER)
        within_30_seconds(console, console.started)


# --- No answer: these take their time, and so run at once ---


def test_no_answer_from_a_listener_and_none_to_a_publish_in_an_alarm(start, broker, queue):
    """A worker is none the worse for an alarm, nor is a publisher that Ctrl+C ends."""
    with broker.alarm(), listener(None) as place:
        url = f"amqp://u:{SECRET}@{place}/"
        silent = [start(NEW_TASK, url=url), start(WORKER, url=url)]
        blocked, patient, worker = start(NEW_TASK), start(NEW_TASK, "patient"), start(WORKER)
        worker.wait_for_line(r" \[\*\] Waiting .*")
        for console in silent:
            told(console, "no answer", place, retried=console is silent[1])
            within_30_seconds(console, console.started)
        assert patient.process.poll() is None
        pressed = time.monotonic()
        patient.ctrl_c()
        assert patient.wait() in (130, -signal.SIGINT)  # a shell shows both as 130
        assert time.monotonic() - pressed < 1
        told(blocked, "memory or disk alarm", f"127.0.0.1:{broker.port}")
        within_30_seconds(blocked, blocked.started)
        assert blocked.out == patient.out == worker.err == []


def test_a_broker_that_freezes_before_or_after_the_connection_is_made(start, broker, queue):
    """Idle, in the middle of a publish, and not yet connected."""
    idle, publishing = (start(NEW_TASK, "-", stdin=subprocess.PIPE) for _ in range(2))
    worker = start(WORKER)
    worker.wait_for_line(r" \[\*\] Waiting .*")
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
            told(console, "no answer", place, retried=console is late[1])
        for console in (idle, publishing):
            told(console, r".*\w+ \w+.* \(1 tasks? confirmed\)", place)
        told(worker, r"\w+ \w+", place, retried=True)
        for console in (*late, idle, publishing, worker):
            within_30_seconds(console, frozen)


# --- A queue, a task or a broker that will not do ---


@SCRIPTS
@pytest.mark.parametrize(
    "other",
    [{"durable": False}, {"x-max-priority": 5}, {"x-queue-type": "quorum"}],
    ids=["not durable", "priorities", "quorum"],
)
def test_a_task_queue_of_another_kind(start, broker, queue, program, other):
    queue.declare(**other)
    console = start(program)
    told(console, "task_queue.*delete or rename the old queue", f"127.0.0.1:{broker.port}")
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
        confirmed = int(re.search(r"\((\d+) tasks? confirmed\)$", line.text)[1])
        assert confirmed == len(console.out) == queue.ready() < 4
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
        told(several, r"larger than.*\(1 tasks? confirmed\)", place)
        told(one, "larger than", place)
    assert (several.out, one.out) == ([" [x] Sent small"], [])
    assert queue.ready() == 1
