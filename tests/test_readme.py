"""README.md: what is to be typed, and what then is to be seen; the examples, with what breaks them.

How it is run as a service: test_service.py, and in Docker test_compose.py.
"""

import contextlib
import re
import sqlite3

import pika
import pytest

from tests import test_jobs, test_service
from tests.harness.consoles import ROOT
from tests.harness.pages import (
    LEARN,
    NOT_TYPED,
    PAGES,
    USE,
    block,
    blocks,
    commands,
    steps,
)
from tests.harness.scripts import DONE, FAILED
from tests.test_compose import DOCKER
from tests.tools import demo

CONSOLES = [command for one in blocks(LEARN + USE, "console") for command, _ in steps(one)]


def known():
    """Return the commands that other tests type, or none can."""
    return {*NOT_TYPED, *test_jobs.TYPED, *test_service.TYPED, *DOCKER.values()}


# --- Learn it ---


def test_the_first_half_shows_what_it_says(own_broker, folder):
    """As the demo plays it; and what is beside its chapters."""
    with contextlib.closing(demo.Stage(own_broker, folder)) as stage:
        demo.play(stage)
        stage.follow("> tasks.txt")
        stage.follow("delete_queue task_queue")
        typed = {text.removeprefix("$ ") for _, text in stage.shown}
    for command in CONSOLES:
        elsewhere = command in known() or ("docker" in command and not own_broker.in_docker)
        assert command in typed or elsewhere, command


# --- Use it ---


def test_no_task_stops_the_work_of_the_readme(own_work, queue, folder):
    """What is no order is kept; while the database is locked, which passes, a task is retried."""
    console = own_work(block("python", "orders.db"), folder)
    order = re.search(r"`(\{\"id\".*?\})`", USE)[1].encode()
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


# --- All pages: all commands, files, links ---


def test_each_command_is_typed_by_a_test_or_known_not_to_be():
    """The consoles of README.md are typed above, and that is seen there."""
    typed = known() | {*CONSOLES}
    for command in commands(PAGES):
        begins = any(one.startswith(f"{command} ") for one in typed)  # named, as in "after ..."
        assert command in typed or begins, f"no test types {command}"
    pages = " ".join(PAGES.split())
    for command in NOT_TYPED:
        assert command in pages or command.endswith((":", "why.")), command


@pytest.mark.parametrize("page", ["README.md", ".github/jobs.md", ".github/service.md"])
def test_the_files_and_sections_that_links_lead_to_are_there(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / page).read_text()):
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), link
        if anchor:
            titles = re.sub(r"[^\w\n# -]", "", path.read_text().lower()).replace(" ", "-")
            assert re.search(f"^#+-{anchor}$", titles, re.MULTILINE), link
