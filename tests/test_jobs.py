""".github/jobs.md: its programs as they stand there, with what breaks their work.

(Skipped where there is no PostgreSQL of Debian's; CI has it.)
"""

import contextlib
import os
import re
import shutil
import signal
import socketserver
import tempfile
import threading
from pathlib import Path

import pytest

from tests.harness.brokers import run
from tests.harness.consoles import Console
from tests.harness.pages import JOBS, block, edited, steps, typed
from tests.harness.scripts import received_line
from tests.harness.waiting import wait_until

FOUND = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
pytestmark = pytest.mark.skipif(not FOUND, reason="no PostgreSQL here; CI has it")

EXPORT = typed("PGHOST=")[-1]
SENDER = "python send_jobs.py images"

DEFERS = 2  # mails, before the server takes one


@pytest.fixture(scope="module")
def postgres():
    """A PostgreSQL of these tests alone: return the folder of its socket."""
    as_user = "setpriv --reuid=postgres --regid=postgres --clear-groups".split()
    as_user = [] if os.getuid() else as_user  # it does not run as root
    folder = Path(tempfile.mkdtemp())
    if as_user:
        shutil.chown(folder, "postgres")
    data = folder / "data"
    initdb = FOUND[-1].with_name("initdb")
    run(*as_user, initdb, "--auth=trust", "--username=postgres", "--no-sync", data, cwd=folder)
    server = (FOUND[-1], "-D", data, "-k", folder, "-F", "-c", "listen_addresses=")
    with contextlib.closing(Console(*as_user, *server, cwd=folder)) as console:
        console.wait_for_line(".*ready to accept connections")
        yield folder
        console.signal(signal.SIGINT)  # its fast shutdown, which leaves no shared memory
        console.wait()
    shutil.rmtree(folder)


class MailServer(socketserver.StreamRequestHandler):
    """It defers the first mails, and then says yes to all."""

    def handle(self):
        self.wfile.write(b"220 here\r\n")
        for line in self.rfile:
            if line.upper() == b"DATA\r\n":
                self.wfile.write(b"354 go on\r\n")
                self.server.mails.append(b"".join(iter(self.rfile.readline, b".\r\n")))
                is_taken = len(self.server.mails) > DEFERS
                self.wfile.write(b"250 taken\r\n" if is_taken else b"451 later\r\n")
            else:
                self.wfile.write(b"250 yes\r\n")


@pytest.fixture
def mail_server():
    """A mail server on `server_address`; `mails` holds what it was offered."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), MailServer) as server:
        server.mails = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def sql(postgres):
    """Run a statement; of one of the operator's, its first words are enough. Return its rows."""

    import psycopg  # it needs libpq, which comes with PostgreSQL

    def run_one(words, **edits):
        operators = block("sql", "to_timestamp")
        [statement] = re.findall(f"^{re.escape(words)}.*", operators, re.MULTILINE) or [words]
        with psycopg.connect(host=postgres, user="postgres") as database:
            cursor = database.execute(edited(statement, edits))
            return cursor.fetchall() if cursor.description else []

    return run_one


@pytest.fixture
def jobs(folder, mail_server, sql, postgres, monkeypatch):
    """The folder with the table and its programs: return how to add an image.

    A job that failed is tried again at once, and resize.py runs its data as Python.
    """
    host, port = mail_server.server_address
    mail = {
        '"mail.shop.example"': f'"{host}", {port}',
        "    server.starttls(context=ssl.create_default_context())\n": "",
    }
    (folder / "kinds.py").write_text(edited(block("python", "smtplib"), mail))
    (folder / "jobs.py").write_text(edited(block("python", "TRIES = "), {"60 * 4**tries": "-10"}))
    (folder / "send_jobs.py").write_text(block("python", "from jobs"))
    (folder / "resize.py").write_text("exec(input())")
    sql("DROP TABLE IF EXISTS jobs; DROP ROLE IF EXISTS worker")
    for statements in ("CREATE TABLE jobs", "reader@"):
        sql(block("sql", statements))
    for name, value in {"HOST": postgres, "USER": "worker", "DATABASE": "postgres"}.items():
        monkeypatch.setenv(f"PG{name}", str(value))
    return lambda data: sql(f"INSERT INTO jobs (kind, data) VALUES ('images', '{data}')")


@pytest.fixture
def worker(own_work, folder):
    return lambda: own_work("from jobs import work", folder)


@pytest.fixture
def sender(start, folder):
    return lambda kind: start("send_jobs.py", kind, cwd=folder)


def test_the_first_try_shows_what_the_page_says(
    queue, folder, jobs, sql, own_work, type_in, postgres
):
    (folder / "resize.py").write_text(re.search("`(print.*)`", JOBS)[1])
    sql(block("sql", "tea.png"))
    here = EXPORT.replace("localhost", str(postgres))
    type_in(f"{here}; exec {SENDER}")
    [(_, shown)] = steps(block("console", "Resized"))
    console = own_work("from jobs import work", folder)
    console.wait_for_line(shown[-1].replace("[", r"\["))
    assert console.out == shown


def test_a_job_is_tried_until_it_is_done_or_given_up_and_none_blocks_another(
    queue, folder, jobs, sql, worker, sender, mail_server
):
    """What is hopeless is tried once."""
    jobs("exit(1)")
    jobs("pass")
    jobs("exit(65)")
    console = worker()
    senders = [sender(kind) for kind in ("mails", "images", "images")]
    wait_until(lambda: len(sql("SELECT number, kind, error")) == 2, "two are given up")
    wait_until(lambda: len(sql("SELECT * FROM jobs")) == 2, "the others are done")
    assert sql("SELECT number, tries FROM jobs ORDER BY number") == [(2, 5), (4, 1)]
    assert all("resize.py" in error for *_, error in sql("SELECT number, kind, error"))
    assert [b"Tea!" in mail for mail in mail_server.mails] == [True] * (DEFERS + 1)
    (folder / "resize.py").write_text("")
    sql("UPDATE jobs SET tries = 0")
    wait_until(lambda: not sql("SELECT * FROM jobs"), "it is done when that is mended")
    assert console.err == [] and not any(sender.lines for sender in senders)


def test_a_job_in_hand_is_not_begun_again_until_it_counts_as_lost(
    queue, folder, jobs, sql, worker, sender
):
    """It kills its worker, and what else is to be done goes on. It is given up as others are."""
    sql("DELETE FROM jobs", **{"= 7": "= 1"})
    jobs("import time; time.sleep(999)")
    sender("images")
    first = worker()
    first.wait_for_line(received_line("2"))
    second = worker()
    first.kill()
    second.wait_for_line("job 2 is not to be done now")
    jobs("pass")
    wait_until(lambda: len(sql("SELECT * FROM jobs")) == 1, "the next one is done")
    assert sql("SELECT tries FROM jobs") == [(1,)]
    sql("UPDATE jobs SET tries = 5, begin_at = 0, send_at = 0 WHERE number = 2")  # after LONGEST
    second.wait_for_line(r"cannot do the task: job 2 .*died.*")
    wait_until(lambda: sql("SELECT number, kind, error"), "it is given up")


def test_an_emptied_queue_is_filled_again_from_the_table(queue, jobs, sql, worker, sender):
    """What the operator's page asks the table tells that its sender does not run."""
    sql("DELETE FROM jobs", **{"= 7": "= 1"})
    jobs("pass")
    failing, unsent = "SELECT number, kind, tries", "SELECT kind, count(*)"
    assert sql(failing) == sql(unsent) == []
    overdue = "UPDATE jobs SET send_at = send_at - 3600 WHERE number = 2"
    sql(overdue)
    assert sql(unsent) == [("images", 1)]
    console = sender("images")
    wait_until(lambda: sql(unsent) == [], "it is sent")
    assert queue.take_all() == [b"2"]
    sql(overdue)  # as after an hour
    other = worker()
    wait_until(lambda: not sql("SELECT * FROM jobs"), "it is done")
    queue.publish(b"2", b"no number")
    for number in (2, 0):
        other.wait_for_line(f"job {number} is not to be done now")
    assert other.err == console.lines == []
