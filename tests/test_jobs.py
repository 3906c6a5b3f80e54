"""README.md's table of jobs: its programs, as the page has them, with what breaks their work."""

import contextlib
import re
import socketserver
import sqlite3
import threading

import pytest

from tests.harness.pages import USE, block, edited
from tests.harness.scripts import received_line
from tests.harness.waiting import wait_until

DEFERS = 2  # mails, before the server takes one


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
def sql(folder):
    """Run a statement; of one of the page, its first words are enough."""

    def run(words, **edits):
        [statement] = re.findall(f"`({re.escape(words)}[^`]*)`", " ".join(USE.split())) or [words]
        with contextlib.closing(sqlite3.connect(folder / "jobs.db")) as database, database:
            return database.execute(edited(statement, edits)).fetchall()

    return run


@pytest.fixture
def jobs(folder, mail_server, sql, start):
    """The folder with the table and its programs: return how to add an image.

    The table is one of SQLite, a job that failed is tried again at once, and resize.py runs its
    data as Python.
    """
    host, port = mail_server.server_address
    mail = {'"mail.shop.example"': f'"{host}", {port}'}
    sqlite = {
        "import psycopg": "import sqlite3",
        "psycopg.connect()": 'sqlite3.connect("jobs.db")',
        "%s": "?",
        "60 * 4**tries": "-10",
    }
    table = {"BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY": "INTEGER PRIMARY KEY AUTOINCREMENT"}
    (folder / "kinds.py").write_text(edited(block("python", "smtplib"), mail))
    (folder / "jobs.py").write_text(edited(block("python", "TRIES = "), sqlite))
    (folder / "send_jobs.py").write_text(edited(block("python", "from jobs"), {"%s": "?"}))
    (folder / "resize.py").write_text("exec(input())")
    with contextlib.closing(sqlite3.connect(folder / "jobs.db")) as database:
        database.executescript(edited(block("sql", "CREATE TABLE jobs"), table))
    return lambda data: sql(f"INSERT INTO jobs (kind, data) VALUES ('image', '{data}')")


def test_a_job_is_tried_until_it_is_done_or_given_up_and_none_blocks_another(
    own_work, queue, folder, jobs, sql, start, mail_server
):
    jobs("exit(1)")
    jobs("pass")
    worker = own_work("from jobs import work", folder)
    senders = [start("send_jobs.py", kind, cwd=folder) for kind in ("mail", "image", "image")]
    worker.wait_for_line(r"cannot do the task: job 2 \(image\), try 5 of 5: CalledProcessError.*")
    wait_until(lambda: len(sql("SELECT * FROM jobs")) == 1, "the others are done")
    [(number, kind, error)] = wait_until(lambda: sql("SELECT number, kind, error"), "it is kept")
    assert (number, kind) == (2, "image") and "CalledProcessError" in error
    assert [b"Tea!" in mail for mail in mail_server.mails] == [True] * (DEFERS + 1)
    (folder / "resize.py").write_text("")
    sql("UPDATE jobs SET tries = 0")
    wait_until(lambda: not sql("SELECT * FROM jobs"), "it is done when that is mended")
    assert worker.err == [] and not any(sender.lines for sender in senders)


def test_a_job_in_hand_is_not_begun_again_until_it_counts_as_lost(
    own_work, queue, folder, jobs, sql, start
):
    """It kills its worker, and what else is to be done goes on."""
    sql("DELETE FROM jobs")
    jobs("import time; time.sleep(999)")
    start("send_jobs.py", "image", cwd=folder)
    first = own_work("from jobs import work", folder)
    first.wait_for_line(received_line("2"))
    second = own_work("from jobs import work", folder)
    first.kill()
    second.wait_for_line("job 2 is not to be done now")
    (folder / "resize.py").write_text("")
    jobs("")
    wait_until(lambda: len(sql("SELECT * FROM jobs")) == 1, "the next one is done")
    [(tries,)] = sql("SELECT tries FROM jobs")
    assert tries == 1
    sql("UPDATE jobs SET begin_at = 0, send_at = 0 WHERE number = 2")  # as after LONGEST
    wait_until(lambda: not sql("SELECT * FROM jobs"), "it is done")


def test_an_emptied_queue_is_filled_again_from_the_table(queue, folder, jobs, sql, start, own_work):
    sql("DELETE FROM jobs")
    jobs("pass")
    sender = start("send_jobs.py", "image", cwd=folder)
    wait_until(lambda: sql("SELECT * FROM jobs WHERE send_at > 0"), "it is sent")
    assert queue.take_all() == [b"2"]
    sql("UPDATE jobs SET send_at = 0 WHERE number = 2")  # as after an hour
    worker = own_work("from jobs import work", folder)
    wait_until(lambda: not sql("SELECT * FROM jobs"), "it is done")
    queue.publish(b"2", b"no number")
    for number in (2, 0):
        worker.wait_for_line(f"job {number} is not to be done now")
    assert worker.err == sender.lines == []
