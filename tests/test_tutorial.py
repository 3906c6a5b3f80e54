"""The tutorial, sentence by sentence and in its order."""

import re
import sys
import tempfile
from pathlib import Path

import pika
import pytest
from conftest import DONE, WAITING
from consoles import ROOT
from waiting import wait_until

BARE = str(Path(__file__).with_name("bare.py"))
TUTORIAL = ROOT.parent / "shared" / "tutorial-work-queues.md"
FIVE_TASKS = [
    "First message.",
    "Second message..",
    "Third message...",
    "Fourth message....",
    "Fifth message.....",
]


def received(text):
    return r" \[x\] Received " + re.escape(text)


def all_done(workers, count):
    wait_until(
        lambda: sum(worker.out.count(" [x] Done") for worker in workers) == count,
        f"{count} tasks are done",
    )


# --- What This Tutorial Focuses On ---


def test_without_words_the_task_is_hello_world(new_task, worker):
    assert new_task().out == [" [x] Sent Hello World!"]
    worker().wait_for_line(received("Hello World!"))


def test_the_words_of_the_command_line_are_the_task(new_task, worker):
    assert new_task("A", "very", "hard", "task").out == [" [x] Sent A very hard task"]
    worker().wait_for_line(received("A very hard task"))


def test_every_dot_is_a_second_of_work(new_task, worker):
    console = worker()
    new_task("Hello..")
    new_task("Hello")
    start = console.wait_for_line(received("Hello..")).at
    assert 1.95 <= console.wait_for_line(DONE).at - start < 3
    start = console.wait_for_line(received("Hello")).at
    assert console.wait_for_line(DONE, count=2).at - start < 1


# --- Round-Robin Dispatching ---


def test_five_tasks_go_to_two_workers_in_turn(new_task, worker):
    workers = [worker(), worker()]
    for task in FIVE_TASKS:
        assert new_task(*task.split()).out == [f" [x] Sent {task}"]
    all_done(workers, 5)
    for one, tasks in zip(workers, (FIVE_TASKS[::2], FIVE_TASKS[1::2]), strict=True):
        expected = [" [*] Waiting for messages. To exit press CTRL+C"]
        for task in tasks:
            expected += [f" [x] Received {task}", " [x] Done"]
        assert one.out == expected


def test_more_workers_take_their_turns_too(new_task, worker):
    workers = [worker() for _ in range(3)]
    for number in range(3):
        new_task(f"task {number}.")
    for number, one in enumerate(workers):
        one.wait_for_line(received(f"task {number}."))


def test_more_workers_do_more_in_the_same_time(new_task, worker):
    """Eight seconds of work take four workers little more than two."""
    workers = [worker() for _ in range(4)]
    new_task("-", stdin=tasks_file(["work."] * 8))
    all_done(workers, 8)
    lines = [line for one in workers for line in one.lines if "[x]" in line.text]
    assert 1.95 <= max(line.at for line in lines) - min(line.at for line in lines) < 4


def tasks_file(tasks):
    """Return a file, open at its start, with a task on each line."""
    file = tempfile.TemporaryFile()
    file.write("".join(f"{task}\n" for task in tasks).encode())
    file.seek(0)
    return file


# --- Message Acknowledgment ---


@pytest.mark.parametrize("end", ["kill", "ctrl_c"])
def test_the_task_of_a_worker_that_dies_goes_to_another(new_task, worker, queue, end):
    first = worker()
    new_task("Long.....")
    first.wait_for_line(received("Long....."))
    second = worker()
    getattr(first, end)()
    second.wait_for_line(received("Long....."), timeout=10)
    second.wait_for_line(DONE)
    queue.wait_for_counts(0, 0)
    assert " [x] Done" not in first.out


def test_an_acknowledgement_on_another_channel_is_an_error(new_task, broker, queue):
    new_task("task")
    with broker.connect() as connection:
        method, _, _ = connection.channel().basic_get("task_queue")
        other = connection.channel()
        other.basic_ack(method.delivery_tag)
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="unknown delivery tag"):
            other.queue_declare("task_queue", passive=True)


# --- Forgotten Acknowledgment ---


def test_rabbitmqctl_shows_what_is_not_acknowledged(new_task, worker, queue):
    worker()
    new_task("Slow" + "." * 60)
    new_task("Waits.")
    queue.wait_for_counts(1, 1)


# --- Message Durability ---


def test_queue_and_tasks_outlive_a_stop_and_a_crash_of_rabbitmq(running_broker, new_task, queue):
    new_task("Persistent.")
    running_broker.stop()
    running_broker.start()
    assert queue.ready() == 1
    running_broker.kill()
    running_broker.start()
    body, properties = queue.take()
    assert body == b"Persistent."
    assert properties.delivery_mode == pika.DeliveryMode.Persistent.value


def test_a_queue_is_not_redeclared_with_other_arguments(queue):
    queue.declare(durable=True)
    with pytest.raises(pika.exceptions.ChannelClosedByBroker) as caught:
        queue.declare(durable=False)
    assert caught.value.reply_code == 406


# --- Fair Dispatch ---


def test_light_tasks_do_not_queue_behind_a_heavy_one(new_task, worker):
    """All odd tasks are heavy, all even ones light: two workers share them within a second."""
    workers = [worker(), worker()]
    new_task("-", stdin=tasks_file(["heavy...", "light", "heavy...", "light", "heavy...", "light"]))
    all_done(workers, 6)
    done = [line.at for one in workers for line in one.lines if line.text == " [x] Done"]
    start = min(line.at for one in workers for line in one.lines if "Received" in line.text)
    assert max(done) - start < 3 + 3 + 1  # blindly dealt out, one worker would need nine
    heavy = [sum("heavy" in line for line in one.out) for one in workers]
    assert sorted(heavy) == [1, 2]


# --- Putting It All Together ---


def tutorials_own(name, port, folder):
    """Write the tutorial's final program `name` to `folder`, pointed at `port`; return its path."""
    blocks = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    final = blocks[-2] if name == "new_task.py" else blocks[-1]
    path = folder / name
    path.write_text(final.replace("'localhost'", f"'127.0.0.1', {port}"))
    return path


@pytest.fixture(params=["ours", "the tutorial's"])
def theirs(request, broker, tmp_path):
    """How to run the tutorial's programs: as they are in its text, or in our bare form."""
    if request.param == "ours" or not TUTORIAL.exists():
        return lambda role: [sys.executable, BARE, role]
    return lambda role: [
        sys.executable,
        "-u",
        str(tutorials_own(f"{role}.py", broker.port, tmp_path)),
    ]


def test_the_tutorials_own_programs_and_ours_exchange_tasks(
    open_console, new_task, worker, theirs, queue
):
    console = open_console(*theirs("worker"))
    console.wait_for_line(WAITING)
    new_task("From", "ours.")
    console.wait_for_line(received("From ours."))
    console.wait_for_line(DONE)
    console.kill()
    assert open_console(*theirs("new_task"), "From-theirs.").wait() == 0
    console = worker()
    console.wait_for_line(received("From-theirs."))
    console.wait_for_line(DONE)
    queue.wait_for_counts(0, 0)
