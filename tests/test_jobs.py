""".github/jobs.md: its programs as they stand there, with what breaks their work.

(Skipped where there is no PostgreSQL of Debian's; CI has it.)
"""

import contextlib
import itertools
import json
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
from tests.harness.pages import JOBS, block, blocks, edited, steps, typed
from tests.harness.scripts import DONE, FAILED, received_line
from tests.harness.waiting import wait_until

FOUND = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
pytestmark = pytest.mark.skipif(not FOUND, reason="no PostgreSQL here; CI has it")

EXPORT = typed("PGHOST=")[-1]
LEFT = "SELECT number FROM jobs WHERE done_at IS NULL"
SENDER = "python send_jobs.py images"
STARTS = typed("mails.py 0")[0]
ALERT = typed("psql")[0]
TYPED = [ALERT, EXPORT, SENDER, STARTS]

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
    """It defers the first ones with tea, refuses a reader, and says nothing to what is lost."""

    def handle(self):
        self.wfile.write(b"220 here\r\n")
        for line in self.rfile:
            if line.upper() == b"DATA\r\n":
                self.wfile.write(b"354 go on\r\n")
                self.server.mails.append(b"".join(iter(self.rfile.readline, b".\r\n")))
                if b"Lost" in self.server.mails[-1]:
                    return
                is_taken = sum(b"Tea!" in mail for mail in self.server.mails) > DEFERS
                self.wfile.write(b"250 taken\r\n" if is_taken else b"451 later\r\n")
            elif b"nobody@" in line:
                self.wfile.write(b"550 unknown\r\n")
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
    """Run a statement, and return its rows."""
    import psycopg  # it needs libpq, which comes with PostgreSQL

    def run_one(statement):
        with psycopg.connect(host=postgres, user="postgres") as database:
            cursor = database.execute(statement)
            return cursor.fetchall() if cursor.description else []

    return run_one


def operators(words):
    """Return the operator's statement that begins with `words`."""
    [found] = re.findall(f"^{re.escape(words)}.*", "".join(blocks(JOBS, "sql")), re.MULTILINE)
    return found


@pytest.fixture
def jobs(folder, mail_server, sql, postgres, monkeypatch):
    """The folder with the table and its programs: return how to add a job.

    A job that failed is tried again at once, and images.py runs its data as Python.
    """
    host, port = mail_server.server_address
    mail = {
        '"mail.shop.example", 587': f'"{host}", {port}',
        "    server.starttls(context=ssl.create_default_context())\n": "",
        '    server.login("tea", os.environ["SMTP_PASSWORD"])\n': "",
    }
    (folder / "mails.py").write_text(edited(block("python", "smtplib"), mail))
    (folder / "images.py").write_text("exec(input())")
    quick = {"60 * 4**tries": "-10", '"1500"': '"5"'}
    (folder / "jobs.py").write_text(edited(block("python", "TRIES = "), quick))
    (folder / "send_jobs.py").write_text(block("python", "import run"))
    sql("DROP TABLE IF EXISTS jobs; DROP ROLE IF EXISTS worker")
    sql(block("sql", "CREATE TABLE jobs"))
    for name, value in {"HOST": postgres, "USER": "worker", "DATABASE": "postgres"}.items():
        monkeypatch.setenv(f"PG{name}", str(value))
    requests = itertools.count()
    return lambda data, kind="images": sql(
        "INSERT INTO jobs (request, kind, once, data) "
        f"VALUES ('{next(requests)}', '{kind}', {kind == 'mails'}, '{data}')"
    )


@pytest.fixture
def worker(own_work, folder):
    return lambda: own_work("from jobs import work", folder)


@pytest.fixture
def sender(start, folder):
    return lambda kind: start("send_jobs.py", kind, cwd=folder)


def test_the_first_try_shows_what_the_page_says(
    queue, folder, jobs, sql, own_work, type_in, postgres
):
    (folder / "images.py").write_text(re.search("`(print.*)`", JOBS)[1])
    for example in ("tea.png", "reader@"):
        sql(block("sql", example))
    here = EXPORT.replace("localhost", str(postgres))
    type_in(f"{here}; exec {SENDER}")
    [(_, shown)] = steps(block("console", "Resized"))
    console = own_work("from jobs import work", folder)
    console.wait_for_line(DONE)
    assert console.out == shown
    unsent = sql("SELECT kind FROM jobs WHERE send_at <= extract(epoch FROM now())")
    assert unsent == [("mails",)]  # it is another sender's


def test_a_job_is_tried_until_it_is_done_or_given_up_and_none_blocks_another(
    queue, folder, jobs, sql, worker, sender, mail_server, type_in
):
    """What is hopeless is tried once, and what was asked for twice is done once."""
    for data in ("exit(75)", "exit(65)", "pass"):
        jobs(data)
    for _ in range(2):
        sql(block("sql", "reader@"))
    for reader, text in (("a@b, c@d", ""), ("nobody@b", ""), ("a@b", "Lost")):
        jobs(json.dumps({"to": reader, "text": text}), "mails")
    starts = type_in(re.sub("sudo --user worker |/opt/worker/(.venv/bin/)?", "", STARTS))
    assert (starts.wait(), starts.out) == (65, steps(block("console", STARTS))[0][1])
    console = worker()
    senders = [sender(kind) for kind in ("mails", "images", "images")]
    given_up = operators("SELECT number, kind, error")
    wait_until(lambda: len(sql(given_up)) == len(sql(LEFT)) == 5, "the others are done")
    assert sorted(sql("SELECT kind, tries, error FROM jobs WHERE done_at IS NULL")) == [
        ("images", 1, "65"),
        ("images", 5, "75"),
        ("mails", 1, "1"),
        ("mails", 1, "65"),
        ("mails", 1, "65"),
    ]
    assert sum(b"Tea!" in mail for mail in mail_server.mails) == DEFERS + 1
    (folder / "images.py").write_text("")
    again = "UPDATE jobs SET tries = 0, begin_at = 0, send_at = 0 WHERE "
    sql(operators(f"{again}kind").replace("mails", "images"))
    wait_until(lambda: len(sql(LEFT)) == 4, "it is done when that is mended")
    assert not any(re.fullmatch(FAILED, line) for line in console.err)
    assert not any(sender.lines for sender in senders)
    (folder / "mails.py").write_text("")
    sql(block("sql", "'1', '2'"))
    wait_until(lambda: len(sql(LEFT)) == 3, "so is what a program that could not start gave up")
    sql(operators(f"{again}number"))
    wait_until(lambda: len(sql(LEFT)) == 2, "so is one that is tried again by hand")
    sql(operators("UPDATE jobs SET done_at").replace("= 7", "= 2"))
    assert len(sql(LEFT)) == 1
    assert sorted(kind for kind, _ in sql(operators("SELECT kind, to"))) == ["images", "mails"]


def test_a_job_in_hand_is_not_begun_again_until_it_counts_as_lost(
    queue, folder, jobs, sql, worker, sender
):
    """What kills its worker, takes too long, or is not wanted any more, is given up, too."""
    jobs("import time; time.sleep(999)")
    sender("images")
    first = worker()
    first.wait_for_line(received_line("1"))
    second = worker()
    first.kill()
    second.wait_for_line("job 1 is not to be done now")
    jobs("pass")
    wait_until(lambda: sql(LEFT) == [(1,)], "the next one is done")
    sql("UPDATE jobs SET tries = 5, begin_at = 0, send_at = 0 WHERE number = 1")  # as after LOST
    second.wait_for_line(r"cannot do the task: job 1 .*died")
    jobs("import time; time.sleep(999)")
    wait_until(lambda: sql("SELECT tries FROM jobs WHERE number = 3") == [(1,)], "it is in hand")
    sql(operators("DELETE FROM jobs WHERE number").replace("= 7", "= 3"))
    second.wait_for_line("cannot do the task: job 3 .*too long")
    jobs("import os; os.kill(os.getpid(), 9)")
    second.wait_for_line("cannot do the task: job 4 .*: -9", count=5)
    given_up = operators("SELECT number, kind, error")
    wait_until(lambda: {number for number, *_ in sql(given_up)} == {1, 4}, "they are given up")


def test_what_is_to_be_done_once_is_given_up_where_nobody_knows(
    queue, folder, jobs, sql, worker, sender
):
    jobs("import time; time.sleep(999)")
    jobs("import os; os.kill(os.getpid(), 9)")
    sql("UPDATE jobs SET once = true")
    sender("images")
    console = worker()
    in_hand = operators("SELECT number, kind, tries")
    wait_until(lambda: [row[3] for row in sql(in_hand)] == ["in hand"], "one is in hand")
    console.kill()
    given_up = operators("SELECT number, kind, error")
    assert sql(given_up) == []
    sql("UPDATE jobs SET begin_at = 0 WHERE error = 'in hand'")  # as after LOST
    worker().wait_for_line("cannot do the task: job 2 .*: -9")
    wait_until(lambda: len(sql(given_up)) == 2, "both are given up")
    assert sql("SELECT error, tries FROM jobs ORDER BY number") == [("in hand", 1), ("-9", 1)]


@pytest.mark.parametrize("status", [0, 1])
def test_what_became_of_a_try_is_recorded_when_the_database_is_back_and_of_no_other_try(
    queue, folder, jobs, sql, worker, sender, status
):
    (folder / "images.py").write_text(
        f"import os\nwhile not os.path.exists('go'): pass\nexit({status})"
    )
    jobs("")
    sender("images")
    console = worker()
    console.wait_for_line(received_line("1"))
    wait_until(lambda: sql("SELECT tries FROM jobs") == [(1,)], "it is in hand")
    sql("ALTER TABLE jobs RENAME TO away")
    (folder / "go").touch()
    console.wait_for_line("cannot record what was done: .*")
    sql("UPDATE away SET tries = 2")  # as when another has begun it after LOST
    sql("ALTER TABLE away RENAME TO jobs")
    console.wait_for_line(DONE)
    assert sql("SELECT error FROM jobs") == [("in hand",)] and console.err == []


def test_an_emptied_queue_is_filled_again_from_the_table(queue, jobs, sql, worker, sender):
    """What the operator's page asks the table tells that a job is not begun."""
    jobs("pass")
    waiting = operators("SELECT kind, count(*)")
    assert sql(waiting) == sql(operators("SELECT number, kind, tries")) == []
    assert run("bash", "-c", ALERT) == ""
    sql("UPDATE jobs SET made_at = made_at - 3601")
    assert sql(waiting) == [("images", 1)]
    assert run("bash", "-c", ALERT) == "1|images|\n"
    console = sender("images")
    sent = "SELECT * FROM jobs WHERE send_at > extract(epoch FROM now())"
    wait_until(lambda: sql(sent), "it is sent")
    assert queue.take_all() == [b"1"] and sql(waiting) == [("images", 1)]
    sql("UPDATE jobs SET send_at = send_at - 3600")  # as after an hour
    other = worker()
    wait_until(lambda: not sql(LEFT), "it is done")
    sql(operators("DELETE FROM jobs WHERE done_at"))
    queue.publish(b"1", b"no number")
    for number in (1, 0):
        other.wait_for_line(f"job {number} is not to be done now")
    assert other.err == console.lines == [] and len(sql("SELECT * FROM jobs")) == 1
