"""The READMEs' commands and transcripts, run and compared, so that they cannot rot.

Those for Docker are run in test_compose.py, those for the cluster in test_cluster.py, the one for a
client's certificate in test_tls.py.
"""

import contextlib
import os
import re
import shlex
import shutil
import sqlite3
import sys

import pika
import pytest

import worker
from tests.harness.brokers import run
from tests.harness.consoles import ROOT
from tests.harness.readmes import block, blocks, commands, edited, steps
from tests.harness.scripts import DONE, NEW_TASK, NOBODY, WAITING, WORKER, assert_told
from tests.harness.waiting import wait_until

README, TESTS_README = ((ROOT / name).read_text() for name in ("README.md", "tests/README.md"))
SCRIPTS = {name: (ROOT / name).read_text() for name in (NEW_TASK, WORKER)}


@pytest.fixture
def typed(start):
    """Type the commands of a console, and compare what each shows."""

    def type_all(console):
        for command, lines in steps(console):
            program = start(*command.split()[1:])
            assert program.wait() == 0
            assert program.out == lines

    return type_all


# --- The tutorial's chapters ---


def test_five_tasks_show_what_the_page_shows(workers, typed):
    first, _ = workers(2)
    assert f"$ python worker.py\n{first.out[0]}\n" in blocks("README.md", "console")
    typed(block("console", "First message."))
    expected = block("text", "Third message...").splitlines()
    wait_until(lambda: len(first.out) >= len(expected), "the first worker's lines")
    assert first.out == expected


@pytest.mark.parametrize("chapter", ["A long one", "Heavy"])
def test_what_is_typed_shows_what_the_page_shows(typed, chapter):
    """What the workers make of such tasks is in test_tutorial.py."""
    typed(block("console", chapter))


def test_a_kept_task_shows_what_the_page_shows(worker, typed):
    """But for the restart, which is in test_compose.py."""
    restart = "$ docker compose restart --timeout 60\n$ python worker.py\n"
    publish, shown = block("console", "Kept").split(restart)
    typed(publish)
    console = worker()
    console.wait_for_line(DONE)
    assert console.out == shown.splitlines()


def test_each_line_of_a_file_is_sent(open_console, queue, tmp_path):
    tasks = tmp_path / "tasks.txt"
    tasks.write_text("from a file\nand another\n")
    [(command, _)] = steps(block("console", "tasks.txt"))
    here = {"python": shlex.quote(sys.executable), "tasks.txt": shlex.quote(str(tasks))}
    assert open_console("bash", "-c", edited(command, here)).wait() == 0
    assert queue.take_all() == [b"from a file", b"and another"]


def test_a_line_of_code_in_the_text_is_in_the_scripts():
    found = re.findall(r"`((?:ch|channel|delivery_mode)\b[.=][^`]+)`", README)
    assert len(found) == 5
    for line in found:
        assert line in "".join(SCRIPTS.values())


# --- One's own work, and one's own program ---


@pytest.fixture
def own_work(open_console, tmp_path):
    """worker.py with the README's work() in place of its own, in a folder of its own."""
    imports, work = block("python", "def work").split("\n\n\n")
    [as_it_is] = re.findall(r"^def work\(.*?\n\n\n", SCRIPTS[WORKER], re.DOTALL | re.MULTILINE)
    text = edited(
        SCRIPTS[WORKER], {as_it_is: f"{work}\n\n", "import os\n": f"{imports}\nimport os\n"}
    )
    (tmp_path / WORKER).write_text(text)
    console = open_console(sys.executable, WORKER, cwd=tmp_path)
    console.wait_for_line(WAITING)
    return console


def test_no_task_stops_the_work_of_the_readme(own_work, queue, tmp_path):
    """What is no order is kept; while the database is locked, which passes, a task is retried."""
    order = re.search(r"`(\{\"id\".*?\})`", README)[1].encode()
    rejected = [
        b"no JSON",
        b"",
        b"\xff",
        b"[" * 100_000,
        b"[1]",
        b'{"id": 1}',
        b'{"id": [], "item": "tea"}',
        b'{"id": 1e999999999, "item": {}}',
        b'{"id": 99999999999999999999, "item": "tea"}',
        b'{"id": 1, "item": "\\ud800"}',
    ]
    queue.publish(*rejected, order, order)
    own_work.wait_for_line(DONE, count=len(rejected) + 2)
    assert len(own_work.err) == len(rejected)
    assert all(line.startswith("rejected: ") for line in own_work.err)
    with contextlib.closing(sqlite3.connect(tmp_path / "orders.db")) as database:
        assert database.execute("SELECT * FROM orders").fetchall() == [(7, "tea")]
        kept = {body for (body,) in database.execute("SELECT * FROM rejected")}
        assert kept == set(rejected)
        database.execute("BEGIN EXCLUSIVE")
        queue.publish(order.replace(b"7", b"8"))
        own_work.wait_for_line(" *sqlite3.OperationalError: database is locked")
        database.rollback()
    own_work.wait_for_line(DONE, count=len(rejected) + 3)


def test_the_lines_that_send_from_ones_own_program_confirm(broker, queue):
    """Or raise what the README says."""
    names = {}
    exec(block("python", "def send"), names)
    send = names["send"]
    send(broker.url(), b"from a program")
    _, properties, body = queue.take()
    assert (body, properties.delivery_mode) == (b"from a program", 2)
    with broker.alarm(), pytest.raises(pika.exceptions.AMQPError):
        send(broker.url(), b"in an alarm")
    with pytest.raises(pika.exceptions.AMQPError):
        send(f"amqp://{NOBODY}", b"nobody listens")
    with pytest.raises(OSError):
        send("amqp://no-such-host.invalid", b"no such host")


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


def test_the_permissions_are_enough_and_needed(broker, new_task, worker, start):
    lines = steps(block("console", "set_permissions")) + steps(block("console", "set_user_tags"))
    for command, _ in lines:
        broker.ctl(*shlex.split(command)[1:])
    new_task("allowed", url=broker.url("producer:PASSWORD"))
    console = worker(url=broker.url("worker:PASSWORD"))
    console.wait_for_line(DONE)
    assert console.err == []
    assert_told(start(WORKER, url=broker.url("producer:PASSWORD")), "ACCESS_REFUSED")


# --- What can go wrong ---


def test_each_advice_of_the_scripts_has_a_row():
    for advice in worker.ADVICE.values():
        assert re.search(
            rf"^\| `\w+\.py: [^`]* HOST:PORT: {re.escape(advice)}", README, re.MULTILINE
        )


def test_the_words_of_each_row_are_those_that_the_tests_see():
    """Each row's line is put together from the scripts' own words and what a test waits for."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_[!r]*.py"))
    known = "".join(SCRIPTS.values()) + tests.replace("\\", "")  # as they are regular expressions
    rows = re.findall(r"^\| `((?:worker|new_task)\.py: [^`]+)` \|", README, re.MULTILINE)
    assert len(rows) > 20
    framing = (
        r"^worker\.py: (cannot consume from HOST:PORT: )?|^new_task\.py: cannot send to HOST:PORT: "
        "|; trying again$"
    )
    for row in rows:
        for words in re.split(r"[ :]*\.\.\.[ :]*", re.sub(framing, "", row)):
            assert words in known


# --- All commands, names, links ---

# What runs nowhere here: other systems, and what changes this one.
NOWHERE = {
    "py -m venv .venv",
    r".venv\Scripts\activate",
    'cmd /c "python new_task.py - < tasks.txt"',
    "brew install rabbitmq && brew services start rabbitmq",
    "sudo apt-get install rabbitmq-server",
    "sudo rabbitmq-plugins enable rabbitmq_management",
    "sudo systemctl restart rabbitmq-server",
    "sudo systemctl enable --now worker@1 worker@2",
    "sudo systemctl stop --no-block 'worker@*'",
    "sudo systemctl start worker@1 worker@2",
    "sudo systemctl kill --signal KILL worker@1",
    "sudo systemctl status --lines 20 'worker@*'",
    "sudo systemctl restart 'worker@*'",
    "docker restart --time 0 NAME",  # run with a name in test_compose.py
    "sudo useradd --system worker",
    "docker run -p 5672:5672",  # the tutorial's
    "docker run --env-file",  # a part of one
}
# How the commands begin that tests or .ci/run run.
RUN = (
    r"docker compose |python3 -m venv|\. \.venv/bin/activate|pip install -r|export AMQP_URL="
    r"|python (worker|new_task)\.py|RABBITMQ_PORT=|tests/(demo|run)$"
    r"|rabbitmqctl (add_user|set_permissions|set_user_tags|--quiet list_queues)"
)


def test_each_command_is_run_or_in_the_list_of_those_that_cannot_be():
    typed = [command for console in blocks("README.md", "console") for command, _ in steps(console)]
    programs = r"(sudo|brew|py|docker|cmd|tests/\w+|python3?|pip|rabbitmqctl|export) "
    named = [one for one in commands("README.md", "") if re.match(programs, one)]
    assert {one for one in typed + named if not re.match(RUN, one)} <= NOWHERE
    for command in NOWHERE:
        assert command in " ".join(README.split())


def test_a_queue_is_looked_at_and_deleted(broker, queue):
    """Docker's words before rabbitmqctl are run in test_compose.py."""
    queue.declare()
    [look] = commands("README.md", "rabbitmqctl --quiet list_queues")
    assert "task_queue\t0\t0\t0\n" in broker.ctl(*look.split()[2:])
    [delete] = commands("README.md", "docker compose exec rabbitmq rabbitmqctl delete_queue")
    broker.ctl(*delete.split()[5:])
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
        queue.ready()


def test_the_commands_that_install_are_runnable(tmp_path):
    """In a folder with copies of the scripts alone; Docker's line is run in test_compose.py."""
    for name in (NEW_TASK, WORKER, "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    install, _ = block("console", "python3 -m venv").replace("$ ", "").split("docker")
    helps = "python worker.py --help\npython new_task.py --help"
    shown = run("bash", "-ec", install + helps, cwd=tmp_path)
    assert "usage: worker.py" in shown and "Usage: python new_task.py" in shown


@pytest.mark.parametrize("command", commands("tests/README.md", "tests/run "))
def test_a_command_that_runs_tests_selects_some(command):
    outside = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    run("bash", "-c", f"{command} --collect-only --quiet", env=outside)


@pytest.mark.parametrize("tool", ["soak", "bench"])
def test_the_long_run_and_the_benchmark_take_the_arguments_of_the_readme(tool):
    """Arguments are looked at in their order, and all that stand before --help must be valid."""
    found = commands("tests/README.md", f"tests/{tool} ")
    assert found
    for command in found:
        run(sys.executable, "-m", f"tests.tools.{tool}", *command.split()[1:], "--help")


def test_the_names_in_the_readmes_are_there():
    """Files, and the sections that links lead to."""
    folders = [ROOT / name for name in (".", "tests", "tests/harness", "tests/tools")]
    for name in re.findall(r"`([\w/-]+\.(?:py|txt|yml))`", README + TESTS_README):
        assert any((folder / name).exists() for folder in folders), name
    titles = re.findall(r"^#+ (.*)$", README + TESTS_README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\((?:tests/README\.md)?#([^)]*)\)", README)) <= anchors
    assert (ROOT / re.search(r"!\[.*?\]\((.*?)\)", README)[1]).exists()
