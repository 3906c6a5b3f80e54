"""What .github/service.md has its reader type; Docker's part of it is in test_compose.py."""

import re
import shlex
import shutil
import sys
from functools import partial

import pika
import pytest
import trustme

from tests.harness.brokers import run
from tests.harness.consoles import ROOT
from tests.harness.pages import JOBS, NOT_TYPED, SERVICE, blocks, commands, edited, typed
from tests.harness.scripts import DONE, WORKER, received
from tests.harness.waiting import wait_until
from worker import ADVICE

INSTALL, BACK, OLD_PAIR = blocks(SERVICE, "sh")
[UNIT], [SENDER] = blocks(SERVICE, "ini"), blocks(JOBS, "ini")
CONSOLES = {
    "second kind": typed("cp --preserve"),
    "sender": typed("cp -r"),
    "two hours": typed("TimeoutStopSec=150min") + typed("90-timeout.conf"),
    "patient": typed("heartbeat=60"),
    "take": typed("take.py\n"),
    "take parked": typed("take.py parked"),
    "send lines": typed("< FILE"),
    "send": typed('"$(cat FILE)"'),
    "rest": typed("> rest.txt"),
}
RABBITMQ = [
    one
    for one in commands(SERVICE, "sudo rabbitmqctl", "sudo rabbitmq-diagnostics")
    if one not in NOT_TYPED
]
SET_UP = [one for one in RABBITMQ if one in SERVICE.split("### systemd")[0] or "images" in one]
TYPED = sum(CONSOLES.values(), RABBITMQ)

# What a test leaves out of a console: other machines and what needs a network or systemd; and where
# the user's files are.
ELSEWHERE = re.compile(r"^.*(rabbitmqctl|systemctl|-m venv|pip install).*\n", re.MULTILINE)
PLACES = re.compile(r"sudo (--preserve\S+ )?|/etc/(\w+/|conf\.d/)*|/opt/(worker/)?(\.venv/bin/)?")


def here(*names):
    """Return what to type of these consoles where all is in one folder."""
    lines = [line for name in names for line in CONSOLES[name]]
    return in_folder("\n".join(lines) + "\n")


def in_folder(text):
    return PLACES.sub("", ELSEWHERE.sub("", text))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here; CI has it")
def test_the_units_are_such_as_systemd_takes(tmp_path):
    """But for the place of the scripts, which is here."""
    here = {"/opt/%p-1/.venv/bin/python": sys.executable, "/opt/%p-1": str(ROOT)}
    (tmp_path / "worker@.service").write_text(edited(UNIT, here))
    for name in ("1", "mails"):
        (tmp_path / f"worker@{name}.service").symlink_to("worker@.service")
    (tmp_path / "worker@mails.service.d").mkdir()
    here = {"/opt/%p/.venv/bin/python": sys.executable, "/opt/%p/send_jobs.py": "%i"}
    (tmp_path / "worker@mails.service.d/sender.conf").write_text(edited(SENDER, here))
    verify = "systemd-analyze verify ./worker@1.service ./worker@mails.service 2>&1"
    assert run("bash", "-c", verify, cwd=tmp_path) == ""


def test_versions_are_installed_changed_and_left_again(folder, type_in):
    def paste(text, status=0):
        assert type_in(in_folder(text)).wait() == status

    def is_version(name, unit_now):
        assert (folder / "worker@.service").read_text() == unit_now
        assert (folder / "worker").samefile(folder / name)

    (folder / "worker@.service").write_text(UNIT)
    paste(INSTALL)
    is_version("worker-1", UNIT)
    paste(INSTALL, status=1)  # it is there already
    paste(edited(INSTALL, {"version=1": "version=2"}))
    is_version("worker-2", edited(UNIT, {"%p-1": "%p-2"}))
    assert (folder / "worker/take.py").exists()
    paste(BACK, status=2)  # without a number
    paste(edited(BACK, {"version=NUMBER": "version=1"}))
    is_version("worker-1", UNIT)


def test_the_files_of_a_second_kind_of_long_tasks_and_of_a_bad_network_are_written(folder, type_in):
    (folder / "worker@.service").write_text(UNIT)
    (folder / "worker@mails.service.d").mkdir()
    (folder / "worker@mails.service.d/sender.conf").write_text(SENDER)
    (folder / "worker.env").write_text("AMQP_URL=amqp://one/jobs,amqps://two/jobs\n")
    assert type_in(here("two hours", "patient", "second kind", "sender")).wait() == 0
    assert (folder / "images@.service").read_text() == edited(UNIT, {"30min": "150min"})
    patient = "AMQP_URL=amqp://one/images?heartbeat=60,amqps://two/images?heartbeat=60\n"
    assert (folder / "images.env").read_text() == patient
    assert (folder / "images@images.service.d/sender.conf").read_text() == SENDER
    assert (folder / "90-timeout.conf").read_text() == "consumer_timeout = 7200000\n"


def test_an_old_certificate_is_put_back_only_if_it_is_a_pair_and_the_new_one_is_kept(
    folder, type_in
):
    """Also through a link, as certbot's."""
    authority = trustme.CA()
    for name in ("new", "OLD", "other"):
        pair = authority.issue_cert("rabbitmq.example")
        pair.cert_chain_pems[0].write_to_path(folder / f"{name}.crt")
        pair.private_key_pem.write_to_path(folder / f"{name}.key")
    (folder / "CERTFILE").symlink_to("new.crt")
    shutil.copy(folder / "new.key", folder / "KEYFILE")
    assert type_in(in_folder(edited(OLD_PAIR, {"OLD.key": "other.key"}))).wait() == 1
    assert (folder / "CERTFILE").is_symlink()
    assert type_in(in_folder(OLD_PAIR)).wait() == 0
    for name, suffix in {"CERTFILE": "crt", "KEYFILE": "key"}.items():
        [kept] = folder.glob(f"{name}.*")
        assert kept.read_bytes() == (folder / f"new.{suffix}").read_bytes()
        assert (folder / name).read_bytes() == (folder / f"OLD.{suffix}").read_bytes()


# --- What is typed on RabbitMQ's machine ---


@pytest.fixture
def rabbitmq(broker):
    """Run a command for RabbitMQ's machine; those that ask for a password get one."""

    def run_there(command):
        broker.tool(*shlex.split(command.removeprefix("sudo ")), typed="PASSWORD\n")

    return run_there


@pytest.fixture
def jobs(broker, rabbitmq):
    """The vhost `jobs`, and its users; return the URL of one of them."""
    try:
        for command in SET_UP:
            rabbitmq(command)
        yield lambda user, vhost="jobs": broker.url(f"{user}:PASSWORD", vhost)
    finally:
        for thing in ("vhost jobs", "vhost images", "user worker", "user producer", "user admin"):
            broker.ctl(*f"delete_{thing}".split())


def test_each_command_for_rabbitmq_is_taken_and_purge_empties_the_queue(jobs, rabbitmq, new_task):
    new_task("purged", url=jobs("producer"))
    with pika.BlockingConnection(pika.URLParameters(jobs("worker"))) as connection:
        look = partial(connection.channel().queue_declare, "task_queue", passive=True)
        assert look().method.message_count == 1
        for command in RABBITMQ:
            if command not in SET_UP:
                rabbitmq(command)
            if "purge_queue" in command:
                assert look().method.message_count == 0


def printed(words):
    """Return the line of the table's row that begins with `words`, as a regular expression."""
    [row] = re.findall(rf"^\| .*`({words}.*?)`.* \|", SERVICE, re.MULTILINE)
    return f".*{re.escape(row)}.*".replace(r"\ \.\.\.", ".*")


def test_in_the_vhost_a_task_that_kills_its_workers_is_parked_and_taken_off(
    jobs, own_work, type_in, folder, new_task, start
):
    """With the permissions, which are enough and needed."""
    worker, producer = jobs("worker"), jobs("producer")
    (folder / "worker.env").write_text(f"AMQP_URL={worker}\n")
    parked = here("take parked")
    assert type_in(parked).wait() == 0
    for task, url in {"deadly": producer, "other": worker}.items():
        new_task(task, url=url)
    deadly = "import os\ndef work(body): os.kill(os.getpid(), 9)"
    for _ in range(6):
        assert own_work(deadly, url=worker).wait() == -9
    console = own_work("def work(body): pass", url=worker)
    console.wait_for_line(DONE)
    assert received(console) == ["other"] and console.err == []
    type_in(parked).wait_for_line("parked_tasks-.*: deadly")
    start(WORKER, url=producer).wait_for_line(printed("ACCESS_REFUSED - ... access"))
    start(WORKER, url=jobs("worker", "%2F")).wait_for_line(printed("NOT_ALLOWED - access"))


# --- What can go wrong ---


def test_a_task_is_taken_off_into_a_file_and_sent_again(broker, queue, folder, type_in):
    """All of it, and only if it could be written."""
    body = b"x" * 163_910
    queue.declare()
    queue.publish(body, b"next")
    assert type_in(f"cd /proc && python {folder}/take.py").wait() == 1
    wait_until(lambda: queue.ready() == 2, "both are there")
    (folder / "worker.env").write_text(f"AMQP_URL={broker.url()}\n")
    taken = type_in(here("take"), url="unset")
    assert taken.wait() == 0
    name = taken.out[0].split(":")[0]
    assert (folder / name).read_bytes() == body
    assert queue.take_all() == [b"next"]
    again = edited(here("send lines"), {"FILE": name})
    assert type_in(again, url="unset").wait() == 0
    (folder / name).write_bytes(b"two\nlines")
    assert type_in(edited(here("send"), {"FILE": name})).wait() == 0
    assert queue.take_all() == [body, b"two\nlines"]


def test_the_rest_of_a_file_is_what_is_to_be_sent(queue, folder, type_in):
    lines = [b"\xff" * number for number in range(1, 514)] + [b"\0"]
    (folder / "tasks.txt").write_bytes(b"\n \n\n".join(lines))
    rest = edited(here("rest"), {"> rest.txt": "| python new_task.py -"})
    assert type_in(rest).wait() == 0
    assert queue.take_all() == lines[512:]


def test_rows_of_the_table_are_what_is_printed(broker, queue, start):
    """Those of the scripts' advice, and what RabbitMQ refuses. Others need faults."""
    queue.declare(arguments={"x-queue-type": "quorum"})
    tls = broker.url().replace("amqp", "amqps")
    urls = {
        "PRECONDITION_FAILED - inequivalent": broker.url(),
        "WRONG_VERSION_NUMBER": tls,
        "NOT_ALLOWED - vhost": broker.url(vhost="nowhere"),
        "cannot read a file": tls + "?ssl_options={'cafile': '/no/file'}",
    }
    for words, url in urls.items():
        start(WORKER, url=url).wait_for_line(printed(words))
    for advice in ADVICE.values():
        assert f"`{advice}`" in SERVICE
