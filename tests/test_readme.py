"""The READMEs' commands and transcripts, run and compared, so that they cannot rot.

Those for Docker are run in test_compose.py, those for the cluster in test_cluster.py, the one for a
client's certificate in test_tls.py.
"""

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys

import pika
import pytest

from tests.harness.brokers import free_ports, run
from tests.harness.consoles import ROOT
from tests.harness.readmes import block, blocks, commands, steps
from tests.harness.scripts import DONE, FAILED, WAITING, received, received_line
from tests.harness.waiting import wait_until

README = (ROOT / "README.md").read_text()
SCRIPTS = {name: (ROOT / name).read_text() for name in ("new_task.py", "worker.py")}


@pytest.fixture
def typed(open_console):
    """Type the commands of a console, and compare what each shows."""

    def run(console):
        for command, lines in steps(console):
            _, name, *words = command.split()
            program = open_console(sys.executable, ROOT / name, *words)
            assert program.wait() == 0, program.transcript
            assert program.out == lines

    return run


# --- The tutorial's chapters ---


def test_five_tasks_are_dispatched_in_turn(workers, typed):
    first, _ = workers(2)
    assert f"$ python worker.py\n{first.out[0]}\n" in blocks("README.md", "console")
    typed(block("console", "First message."))
    expected = block("text", "Third message...").splitlines()
    wait_until(lambda: len(first.out) >= len(expected), "the first worker's lines")
    assert first.out == expected


def test_the_long_task_of_a_worker_that_gets_ctrl_c_goes_to_the_other(workers, typed):
    both = workers(2)
    typed(block("console", "A long one"))
    one = wait_until(lambda: next(filter(received, both), None), "a worker has it")
    one.ctrl_c()
    [other] = [worker for worker in both if worker is not one]
    other.wait_for_line(received_line("A long one.........."))


def test_a_task_is_kept_while_rabbitmq_restarts(running_broker, worker, typed):
    """But for Docker's line, which is run in test_compose.py."""
    console = block("console", "Kept")
    publish, shown = console.split("$ docker compose restart --timeout 60\n$ python worker.py\n")
    typed(publish)
    running_broker.restart()
    assert worker().wait_for_line(DONE)
    assert shown.splitlines()[1:] == [" [x] Received Kept", " [x] Done"]


def test_the_light_tasks_are_done_beside_the_heavy_one(workers, typed):
    both = workers(2)
    typed(block("console", "Heavy"))
    wait_until(lambda: sum(len(received(one)) for one in both) == 3, "all are received")
    assert sorted(map(received, both)) == [["Heavy.........."], ["Light", "Light"]]


def test_each_line_of_a_file_is_sent(worker, open_console, tmp_path):
    """With the folder of the scripts as a reader has it."""
    [(command, _)] = steps(block("console", "tasks.txt"))
    (tmp_path / "tasks.txt").write_text("from a file\nand another\n")
    shutil.copy(ROOT / "new_task.py", tmp_path)
    console = worker()
    line = re.sub("^python", sys.executable, command)
    sent = open_console("bash", "-c", line, cwd=tmp_path)
    assert sent.wait() == 0, sent.transcript
    for task in ("from a file", "and another"):
        console.wait_for_line(received_line(task))


def test_a_line_of_code_in_the_text_is_in_the_scripts():
    found = re.findall(r"`((?:ch|channel|delivery_mode)\b[.=][^`]+)`", README)
    assert len(found) == 5
    for line in found:
        assert any(line in text for text in SCRIPTS.values()), line


# --- One's own work, and one's own program ---


@pytest.fixture
def own_work(open_console, tmp_path):
    """worker.py with the README's work() in place of its own, in a folder of its own."""
    imports, work = block("python", "def work").split("\n\n\n")
    text = re.sub(r"def work\(.*?\n\n\n", lambda _: work + "\n\n", SCRIPTS["worker.py"], flags=re.S)
    (tmp_path / "worker.py").write_text(text.replace("import os\n", f"{imports}\nimport os\n"))
    console = open_console(sys.executable, "worker.py", cwd=tmp_path)
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
    for body in (*rejected, order, order):
        queue.publish(body)
    own_work.wait_for_line(DONE, count=len(rejected) + 2)
    assert len(own_work.err) == len(rejected)
    assert all(line.startswith("rejected: ") for line in own_work.err)
    with contextlib.closing(sqlite3.connect(tmp_path / "orders.db")) as database:
        assert database.execute("SELECT * FROM orders").fetchall() == [(7, "tea")]
        kept = {body for (body,) in database.execute("SELECT * FROM rejected")}
        assert kept == set(rejected)
        database.execute("BEGIN EXCLUSIVE")
        queue.publish(order.replace(b"7", b"8"))
        assert "locked" in own_work.wait_for_line(FAILED).text
        database.rollback()
    own_work.wait_for_line(DONE, count=len(rejected) + 3)


def test_the_lines_that_send_from_ones_own_program_confirm(broker, queue, worker):
    """Or raise what the README says."""
    names = {}
    exec(block("python", "def send"), names)
    send = names["send"]
    send(broker.url(), b"from a program")
    body, properties = queue.take()
    assert (body, properties.delivery_mode) == (b"from a program", 2)
    with broker.alarm(), pytest.raises(pika.exceptions.AMQPError):
        send(broker.url(), b"in an alarm")
    with pytest.raises(pika.exceptions.AMQPError):
        send(f"amqp://127.0.0.1:{free_ports(1)[0]}", b"nobody listens")
    with pytest.raises(OSError):
        send("amqp://no-such-host.invalid", b"no such host")


# --- A service ---


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here; CI has it")
def test_the_unit_is_one_that_systemd_takes(tmp_path):
    """But for the place of the worker, which is here."""
    [unit] = blocks("README.md", "ini")
    unit = unit.replace("/opt/worker/.venv/bin/python", sys.executable).replace(
        "/opt/worker", str(ROOT)
    )
    (tmp_path / "worker@.service").write_text(unit)
    (tmp_path / "worker@1.service").symlink_to("worker@.service")
    verified = subprocess.run(
        ["systemd-analyze", "verify", "./worker@1.service"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (verified.stdout, verified.stderr, verified.returncode) == ("", "", 0)


def test_the_permissions_are_enough(broker, queue, new_task, worker):
    lines = [command for command, _ in steps(block("console", "set_permissions"))]
    lines += [command for command, _ in steps(block("console", "set_user_tags"))]
    users = {line.split()[2] for line in lines}
    assert users == {"worker", "producer"}
    try:
        for line in lines:
            broker.ctl(*(word.strip("'") for word in line.split()[1:]))
        new_task("allowed", url=broker.url("producer:PASSWORD"))
        console = worker(url=broker.url("worker:PASSWORD"))
        console.wait_for_line(DONE)
        assert console.err == []
    finally:
        for user in users:
            broker.ctl("delete_user", user)


# --- What can go wrong ---


def test_each_advice_of_the_scripts_has_a_row():
    advices = set(re.findall(r'^    "[^"]+": "([^"]+)",', SCRIPTS["worker.py"], re.MULTILINE))
    assert len(advices) == 7
    for advice in advices:
        starts = ("worker.py: cannot consume from", "new_task.py: cannot send to")
        rows = (f"| `{start} HOST:PORT: {advice}" for start in starts)
        assert any(row in README for row in rows), advice


def test_the_words_of_each_row_are_those_that_the_tests_see():
    """Each row's line is put together from the scripts' own words and what a test waits for."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_[!r]*.py"))
    known = "".join(SCRIPTS.values()) + tests.replace("\\", "")  # as they are regular expressions
    rows = re.findall(r"^\| `((?:worker|new_task)\.py: [^`]+)` \|", README, re.MULTILINE)
    assert len(rows) > 20
    unknown = []
    for row in rows:
        assert re.match(r"worker\.py: |new_task\.py: cannot send to HOST:PORT: ", row), row
        row = re.sub(r"^\w+\.py: (cannot (send to|consume from) HOST:PORT: )?", "", row)
        row = row.removesuffix("; trying again")
        parts = filter(None, re.split(r"[ :]*\.\.\.[ :]*", row))
        unknown += [words for words in parts if words not in known]
    assert not unknown


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
BY_CI = {"tests/demo", "tests/run"}


def test_each_command_is_run_by_a_test_or_in_the_list_of_those_that_cannot_be():
    """By its first words, which is how the tests find them."""
    programs = (
        r"(sudo|brew|py|docker|cmd|tests/\w+|python3?|pip|rabbitmqctl|export|\."
        r"|\w+_PORT=\S+) "
    )
    found = {command for command in commands("README.md", "") if re.match(programs, f"{command} ")}
    found = {one for one in found if " " in one or one in BY_CI}
    run_by_tests = (
        r"docker compose |python3 -m venv|\. \.venv/bin/activate|pip install -r|export AMQP_URL="
        r"|python (worker|new_task)\.py|RABBITMQ_PORT="
        r"|rabbitmqctl (add_user|set_permissions|set_user_tags|--quiet list_queues)"
    )
    left = {one for one in found - NOWHERE - BY_CI if not re.match(run_by_tests, one)}
    assert not left
    ci = (ROOT / ".ci/run").read_text()
    assert all(command in ci for command in BY_CI)
    assert {one for one in NOWHERE if one in " ".join(README.split())} == NOWHERE


def test_a_queue_is_looked_at_and_deleted(broker, queue):
    """Docker's words before rabbitmqctl are run in test_compose.py."""
    queue.declare()
    [look] = commands("README.md", "rabbitmqctl --quiet list_queues")
    assert "task_queue\t0\t0\t0\n" in broker.ctl(*look.split()[2:])
    [command] = commands("README.md", "docker compose exec rabbitmq rabbitmqctl delete_queue")
    broker.ctl(*command.split()[5:])
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
        queue.ready()


def test_the_commands_that_install_are_runnable(tmp_path):
    """In a folder with copies of the scripts alone; Docker's line is run in test_compose.py."""
    lines = [command for command, _ in steps(block("console", "python3 -m venv"))]
    lines = [line for line in lines if not line.startswith("docker")]
    for name in ("new_task.py", "worker.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    lines += ["python worker.py --help", "python new_task.py --help"]
    shown = run("bash", "-ec", "\n".join(lines), cwd=tmp_path)
    assert "usage: worker.py" in shown and "Usage: python new_task.py" in shown


@pytest.mark.parametrize("command", commands("tests/README.md", "tests/run "))
def test_a_command_that_runs_tests_selects_some(command):
    outside = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    run("bash", "-c", f"{command} --collect-only --quiet", env=outside)


@pytest.mark.parametrize("tool", ["soak", "bench"])
def test_the_long_run_and_the_benchmark_take_the_arguments_of_the_readme(tool):
    """Arguments are looked at in their order, and all that stand before --help must be valid."""
    for command in commands("tests/README.md", f"tests/{tool} "):
        run(sys.executable, "-m", f"tests.tools.{tool}", *command.split()[1:], "--help")


def test_the_names_in_the_readmes_are_there():
    """Settings, files, and the sections that links lead to."""
    tests = (ROOT / "tests/README.md").read_text()
    text = "".join(SCRIPTS.values()) + (ROOT / "docker-compose.yml").read_text()
    for name in re.findall(r"`([A-Z]+_[A-Z_]+)`", README):
        assert name in f"{text} SSL_CERT_FILE {README.split('## What can go wrong')[1]}", name
    folders = [ROOT, *(ROOT / "tests" / name for name in ("", "harness", "tools"))]
    for name in re.findall(r"`((?:tests/)?(?:test_)?\w+\.(?:py|txt|yml))`", README + tests):
        assert any((folder / name).exists() for folder in folders), name
    for command in re.findall(r"tests/(\w+)\b(?= |$|`)", README + tests, re.MULTILINE):
        assert (ROOT / "tests" / command).exists(), command
    anchors = {
        name: {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", page, re.MULTILINE)
        }
        for name, page in (("", README), ("tests/README.md", tests))
    }
    for name, anchor in re.findall(r"\]\((tests/README\.md|)#([^)]*)\)", README):
        assert anchor in anchors[name], anchor
    assert (ROOT / re.search(r"!\[.*?\]\((.*?)\)", README)[1]).exists()


def test_no_paragraph_is_a_wall():
    """At most 60 words a paragraph, 40 an item of a list, 30 a cell of a table."""
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    for part in re.split(r"\n{2,}|\n(?=- |\d\. )", prose):
        if part.startswith("|"):
            cells = [cell for row in part.splitlines() for cell in row.split(" | ")]
            assert max(len(cell.split()) for cell in cells) <= 30, part
        else:
            limit = 40 if re.match(r"- |\d\. ", part) else 60
            assert len(part.split()) <= limit, part
