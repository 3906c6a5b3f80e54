"""README.md's commands, transcripts and code, run and compared, so that they cannot rot.

Docker's part of the second half is in test_compose.py, the URL with a client's certificate in
test_tls.py, and the cluster's manual in test_cluster.py.
"""

import contextlib
import os
import re
import shlex
import shutil
import sqlite3
import sys
from pathlib import Path

import pika
import pytest

from tests.harness.brokers import run
from tests.harness.consoles import ROOT
from tests.harness.readmes import block, blocks, commands, edited, steps
from tests.harness.scripts import DONE, FAILED, NEW_TASK, WAITING, WORKER, received
from tests.harness.waiting import wait_until
from worker import ADVICE

README = (ROOT / "README.md").read_text()
LEARN, USE = README.split("\n## Use it\n")

# What the tests do not run, and why.
NOWHERE = r"""
Other systems:
py -m venv .venv
.venv\Scripts\activate
.venv\Scripts\Activate.ps1
Set-ExecutionPolicy -Scope Process RemoteSigned
set RABBITMQ_PORT=5673
$env:RABBITMQ_PORT = "5673"
brew install rabbitmq
brew services start rabbitmq
brew services restart rabbitmq
brew services stop rabbitmq
brew uninstall rabbitmq
choco install rabbitmq
net stop RabbitMQ
net start RabbitMQ

They change this machine, or need systemd to run on it:
sudo apt-get install rabbitmq-server
sudo apt-get purge rabbitmq-server
sudo systemctl restart rabbitmq-server
sudo systemctl stop rabbitmq-server
sudo useradd --system worker
sudo systemctl enable --now worker@1 worker@2
sudo systemctl start worker@1 worker@2
sudo systemctl daemon-reload
sudo systemctl restart worker@1
sudo systemctl restart 'worker@*'
sudo systemctl stop --no-block 'worker@*'
sudo systemctl kill --signal KILL worker@1
sudo systemctl kill --signal KILL 'worker@*'
sudo journalctl --unit worker@1 --lines 20 --follow
sudo journalctl --unit 'worker@*' --lines 50 --output with-unit

.ci/run runs the demo and the tests, and these make an environment as the others do:
tests/demo
tests/run
python3 -m venv .venv
. .venv/bin/activate
pip install -r requirements.txt

The tests come in as guest, have the folder, and only look:
rabbitmqctl delete_user guest
git clone ADDRESS
df -h
openssl s_client -connect HOST:5671 -CAfile /etc/ca.pem -showcerts </dev/null
""".splitlines()
RABBITMQ = [
    command
    for command in commands("README.md", "rabbitmqctl ", "rabbitmq-diagnostics ")
    if command not in NOWHERE
]
TAKE, PARKED, AGAIN, REST = (
    [command for command, _ in steps(block("console", text))]
    for text in ("sed -n", "take.py parked_tasks", "< FILE", "grep -a")
)


def here(commands, url=""):
    """Return what to type where all files are in one folder, and RabbitMQ at `url`."""
    text = re.sub(r"sudo |/etc/|/opt/worker/(\.venv/bin/)?", "", "\n".join(commands))
    return re.sub(r"amqps://\S+", url, text)


@pytest.fixture
def folder(tmp_path):
    """A copy of the project as its reader has it."""
    for name in (NEW_TASK, WORKER, "docker-compose.yml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "take.py").write_text(block("python", "basic_get"))
    return tmp_path


@pytest.fixture
def type_in(open_console, folder, broker):
    """Type a command into a console of its own, in that folder, and leave it running."""
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if hasattr(broker, "project"):
        env = {**broker.env, **env, "COMPOSE_PROJECT_NAME": broker.project}
    return lambda command, **options: open_console(
        "bash", "-c", command, cwd=folder, env=env, **options
    )


# --- The first half ---


def test_the_first_half_shows_what_it_says(own_broker, queue, type_in):
    """Typed from its first command to its last, but for Docker's where it has not the broker."""
    workers = []
    for console in (one for one in blocks("README.md", "console") if one in LEARN):
        if "list_queues" in console:
            queue.wait_for_counts(0, 0)
        if "Kept" in console:
            for worker in workers:
                worker.kill()
        for command, lines in steps(console):
            if command in NOWHERE or ("docker" in command and not hasattr(own_broker, "project")):
                continue
            typed = type_in(command)
            if command == "python worker.py":
                typed.wait_for_line(re.escape(lines[-1]))
                workers.append(typed)
            else:
                assert typed.wait() == 0
            assert typed.out == lines or not lines
        if "python worker.py" in console and len(workers) == 1:
            wait_until(queue.consumers, "it consumes")
            workers.append(type_in("python worker.py"))
            wait_until(lambda: queue.consumers() == 2, "both consume")
        if "First message." in console:
            workers[0].wait_for_line(DONE, count=3)
            assert workers[0].out == block("text", "Third message...").splitlines()


# --- One's own work, and one's own program ---


@pytest.fixture
def own_work(folder, type_in):
    """Start worker.py with `text` as its orders.py, as the README says."""

    def start_own(text, **options):
        (folder / "orders.py").write_text(text)
        [line] = commands("README.md", "from orders import")
        script = edited((ROOT / WORKER).read_text(), {f"# {line}": line})
        (folder / WORKER).write_text(script)
        console = type_in("python worker.py", **options)
        console.wait_for_line(WAITING)
        return console

    return start_own


def test_no_task_stops_the_work_of_the_readme(own_work, queue, folder):
    """What is no order is kept; while the database is locked, which passes, a task is retried."""
    console = own_work(block("python", "sqlite3"))
    order = re.search(r"`(\{\"id\".*?\})`", README)[1].encode()
    rejected = [
        b"no JSON",
        b"\xff",
        b"[" * 100_000,
        b"[1]",
        b'{"id": "1"}',
        b'{"id": 1, "item": "tea"}',
        b'{"id": "1", "item": "\\ud800"}',
    ]
    queue.publish(*rejected, order, order)
    console.wait_for_line(DONE, count=len(rejected) + 2)
    assert console.err == []
    with contextlib.closing(sqlite3.connect(folder / "orders.db")) as database:
        assert database.execute("SELECT * FROM orders").fetchall() == [("A7", "tea")]
        kept = {body for (body,) in database.execute("SELECT * FROM rejected")}
        assert kept == set(rejected)
        database.execute("BEGIN IMMEDIATE")
        queue.publish(order.replace(b"7", b"8"))
        console.wait_for_line(FAILED)
        database.rollback()
    console.wait_for_line(DONE, count=len(rejected) + 3)


def test_a_task_that_kills_its_process_or_hangs_is_given_up(own_work, queue, folder):
    """The process runs its task as Python."""
    (folder / "resize.py").write_text("import os, time\nexec(input())")
    console = own_work(edited(block("python", "subprocess"), {"1500": "5"}))
    queue.publish(b"os.kill(os.getpid(), 9)", b"time.sleep(99)", b"pass", b"exit(1)")
    console.wait_for_line(DONE, count=3)
    shown = r"given up: .*SIGKILL.*given up: .*timed out.*Received pass \[x\] Done"
    assert re.search(shown, "".join(console.out))
    console.wait_for_line(FAILED, count=2)


def test_the_lines_that_send_from_ones_own_program_confirm(broker, queue):
    """On a connection for each URL that they keep, and make anew when it was lost.

    In an alarm they raise.
    """
    names, url = {}, broker.url()
    exec(block("python", "threading"), names)
    send, kept = names["send"], vars(names["kept"])
    with broker.vhost("other") as other:
        send(other, b"elsewhere")
        send(url, b"from a program")
    _, properties, body = queue.take()
    assert (body, properties.delivery_mode) == (b"from a program", 2)
    channel = kept[url]
    queue.delete()
    send(url, b"into a new queue")
    assert kept[url] is channel
    broker.ctl("close_all_connections", "by a test")
    send(url, b"on a new connection")
    assert queue.take_all() == [b"into a new queue", b"on a new connection"]
    with broker.alarm(), pytest.raises(pika.exceptions.AMQPError):
        send(url, b"in an alarm")


# --- A service ---


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here; CI has it")
def test_the_unit_is_one_that_systemd_takes(tmp_path):
    """But for the place of the worker, which is here."""
    [unit] = blocks("README.md", "ini")
    python = {"/opt/worker/.venv/bin/python": sys.executable, "/opt/worker": str(ROOT)}
    (tmp_path / "worker@.service").write_text(edited(unit, python))
    (tmp_path / "worker@1.service").symlink_to("worker@.service")
    verify = "systemd-analyze verify ./worker@1.service 2>&1"
    assert run("bash", "-c", verify, cwd=tmp_path) == ""


@pytest.fixture
def url_of(broker, new_task):
    """Run each command for RabbitMQ's machine, as it comes; return the URL of a user of theirs.

    task_queue of the vhost has a task when it is emptied.
    """

    def url_of_user(user, vhost="jobs"):
        return broker.url(f"{user}:PASSWORD", vhost)

    try:
        for command in RABBITMQ:
            if "purge_queue" in command:
                new_task("purged", url=url_of_user("producer"))
            program, *words = shlex.split(command)
            if hasattr(broker, "project"):
                broker.compose("exec", "-T", "rabbitmq", program, *words)
            else:
                run(broker.bin / program, *words, env=broker.env, cwd=broker.folder)
        yield url_of_user
    finally:
        for thing in ("vhost jobs", "user worker", "user producer", "user admin"):
            broker.ctl(*f"delete_{thing}".split())


def printed(words):
    """Return the line of the table's row that begins with `words`, as a regular expression."""
    [row] = re.findall(rf"^\| .*`({words}.*?)`.* \|", USE, re.MULTILINE)
    return f".*{re.escape(row)}.*".replace(r"\ \.\.\.", ".*")


def test_in_the_vhost_a_task_that_kills_its_workers_is_parked_and_taken_off(
    url_of, own_work, type_in, new_task, start
):
    """With the permissions, which are enough and needed."""
    worker, producer = url_of("worker"), url_of("producer")
    parked = here(PARKED, worker)
    assert type_in(parked).wait() == 0
    for task in ("deadly", "other"):
        new_task(task, url=producer)
    deadly = "import os\ndef work(body): os.kill(os.getpid(), 9)"
    for _ in range(6):
        assert own_work(deadly, url=worker).wait() == -9
    console = own_work("def work(body): pass", url=worker)
    console.wait_for_line(DONE)
    assert received(console) == ["other"] and console.err == []
    type_in(parked).wait_for_line("parked_tasks-.*: deadly")
    start(WORKER, url=producer).wait_for_line(printed("ACCESS_REFUSED - ... access"))
    start(WORKER, url=url_of("worker", "%2F")).wait_for_line(printed("NOT_ALLOWED - access"))


# --- What can go wrong ---


def test_a_task_is_taken_off_into_a_file_and_sent_again(broker, queue, folder, type_in):
    """All of it, and only if it could be written."""
    body = b"x" * 163_910
    queue.declare()
    queue.publish(body, b"next")
    assert type_in(f"cd /proc && python {folder}/take.py").wait() == 1
    wait_until(lambda: queue.ready() == 2, "both are there")
    (folder / "worker.env").write_text(f"AMQP_URL={broker.url()}\n")
    taken = type_in(here(TAKE), url="unset")
    assert taken.wait() == 0
    name = taken.out[0].split(":")[0]
    assert (folder / name).read_bytes() == body
    assert queue.take_all() == [b"next"]
    again = edited(here(AGAIN, broker.url()), {"FILE": name})
    assert type_in(again, url="unset").wait() == 0
    assert queue.take_all() == [body]


def test_the_rest_of_a_file_is_sent(queue, folder, type_in):
    lines = [b"\xff" * number for number in range(1, 514)] + [b"\0"]
    (folder / "tasks.txt").write_bytes(b"\n \n\n".join(lines))
    assert type_in(here(REST)).wait() == 0
    assert queue.take_all() == lines[512:]


def test_rows_of_the_table_are_what_is_printed(broker, queue, start):
    """Those of the scripts' advice, and what RabbitMQ refuses. Others need faults."""
    queue.declare(arguments={"x-queue-type": "quorum"})
    tls = broker.url().replace("amqp", "amqps")
    urls = {
        "PRECONDITION_FAILED - inequivalent": broker.url(),
        "WRONG_VERSION_NUMBER": tls,
        "cannot read a file": tls + "?ssl_options={'cafile': '/no/file'}",
    }
    for words, url in urls.items():
        start(WORKER, url=url).wait_for_line(printed(words))
    for advice in ADVICE.values():
        assert f"`{advice}`" in USE


# --- All commands, names, links ---


def test_each_command_is_run_or_in_the_list_of_those_that_cannot_be():
    """The first half is typed above, and Docker's commands of the second in test_compose.py."""
    programs = (
        "sudo brew choco net py set python python3 pip git df openssl Set-ExecutionPolicy "
        "rabbitmqctl rabbitmq-diagnostics"
    )
    starts = [f"{program} " for program in programs.split()]
    named = commands("README.md", "$env:", ".venv\\", "tests/", *starts)
    consoles = [command for one in blocks("README.md", "console") for command, _ in steps(one)]
    known = [*NOWHERE, *RABBITMQ, *TAKE, *PARKED, *AGAIN, *REST]
    for command in named + consoles:
        assert command in known or f"\n$ {command}\n" in LEARN, command


def test_the_files_and_sections_that_links_lead_to_are_there():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        name, _, anchor = link.partition("#")
        path = ROOT / (name or "README.md")
        assert path.exists(), link
        if anchor:
            titles = re.sub(r"[^\w\n# -]", "", path.read_text().lower()).replace(" ", "-")
            assert re.search(f"^#+-{anchor}$", titles, re.MULTILINE), link
