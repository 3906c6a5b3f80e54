"""What the tutorial says and shows, section by section, on our scripts."""

import time

import pytest

from tests.harness.scripts import DONE, FIVE_TASKS, received_line, wait_until_done

# --- What This Tutorial Focuses On ---


def test_every_dot_is_a_second_of_work(new_task, worker):
    console, sent = worker(), time.monotonic()
    new_task("-", stdin=b"Hello....\nHello\nHello\nHello\nHello\n")
    assert console.wait_for_line(DONE).at - sent >= 4
    assert console.wait_for_line(DONE, count=5).at - sent < 8  # also if each took one second more


# --- Round-Robin Dispatching ---


@pytest.mark.parametrize("count", [2, 3])
def test_five_tasks_go_to_the_workers_in_turn(new_task, workers, count):
    workers = workers(count)
    for task in FIVE_TASKS:
        assert new_task(*task.split()).out == [f" [x] Sent {task}"]
    wait_until_done(5, *workers)
    for number, one in enumerate(workers):
        expected = [" [*] Waiting for messages. To exit press CTRL+C"]
        for task in FIVE_TASKS[number::count]:
            expected += [f" [x] Received {task}", " [x] Done"]
        assert one.out == expected


def test_more_workers_do_more_in_the_same_time(new_task, workers):
    """Twenty seconds of work take four workers little more than five, and two workers ten."""
    workers, sent = workers(4), time.monotonic()
    new_task("-", stdin=b"work.\n" * 20)
    wait_until_done(20, *workers)
    assert max(line.at for one in workers for line in one.lines) - sent < 10


# --- Message Acknowledgment ---


@pytest.mark.parametrize("end", ["kill", "ctrl_c"])
def test_the_task_of_a_worker_that_dies_goes_to_another(new_task, worker, queue, end):
    first = worker()
    new_task("Long.....")
    first.wait_for_line(received_line("Long....."))
    second = worker()
    getattr(first, end)()
    second.wait_for_line(received_line("Long....."), timeout=10)
    second.wait_for_line(DONE)
    queue.wait_for_counts(0, 0)
    assert " [x] Done" not in first.out


# --- Forgotten Acknowledgment ---


def test_rabbitmqctl_shows_what_is_not_acknowledged(new_task, worker, queue):
    console = worker()
    new_task("Slow" + "." * 60)
    new_task("Waits.")
    queue.wait_for_counts(1, 1)  # one is in hand, the other not prefetched
    assert " [x] Done" not in console.out


# --- Message Durability ---


def test_queue_and_tasks_outlive_a_stop_and_a_crash_of_rabbitmq(own_broker, new_task, queue):
    new_task("Persistent.")
    own_broker.stop()
    own_broker.start()
    assert queue.ready() == 1
    own_broker.kill_when_settled()
    own_broker.start()
    assert queue.take_all() == [b"Persistent."]


# --- Fair Dispatch ---


def test_light_tasks_do_not_queue_behind_a_heavy_one(new_task, workers):
    """All odd tasks are heavy, all even ones light: the two workers share the heavy ones."""
    workers = workers(2)
    new_task("-", stdin=b"heavy...\nlight\n" * 3)
    wait_until_done(6, *workers)
    heavy = [sum("heavy" in line for line in one.out) for one in workers]
    assert sorted(heavy) == [1, 2]  # blindly dealt out, one worker would have all three


# --- Putting It All Together ---

# The lines of the listings: test_functions.py.


def test_rabbitmqs_current_programs_and_ours_share_a_quorum_queue(
    tutorials, new_task, worker, quorum_url
):
    """They declare one; where queues are quorum queues by default, ours do the same."""
    quorum = {"durable=True)": 'durable=True, arguments={"x-queue-type": "quorum"})'}
    theirs = tutorials("worker", edits=quorum, url=quorum_url)
    new_task("From", "ours", url=quorum_url)
    theirs.wait_for_line(received_line("From ours"))
    theirs.kill()
    tutorials("new_task", "From-theirs", edits=quorum, url=quorum_url)
    worker(url=quorum_url).wait_for_line(received_line("From-theirs"))


def test_the_tutorials_own_programs_and_ours_exchange_tasks(tutorials, new_task, worker, queue):
    console = tutorials("worker")
    new_task("From", "ours.")
    console.wait_for_line(received_line("From ours."))
    console.wait_for_line(DONE)
    console.kill()
    assert tutorials("new_task", "From-theirs.").out == [" [x] Sent From-theirs."]
    console = worker()
    console.wait_for_line(received_line("From-theirs."))
    console.wait_for_line(DONE)
    queue.wait_for_counts(0, 0)
