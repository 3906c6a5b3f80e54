"""What the tutorial says and shows, section by section, on our scripts."""

import textwrap
import time

import pika
import pytest

from tests.harness.consoles import ROOT
from tests.harness.scripts import DONE, FIVE_TASKS, received_line, wait_until_done

# --- What This Tutorial Focuses On ---


def test_without_words_the_task_is_hello_world(new_task, worker):
    assert new_task().out == [" [x] Sent Hello World!"]
    worker().wait_for_line(received_line("Hello World!"))


def test_the_words_of_the_command_line_are_the_task(new_task, worker):
    assert new_task("A", "very", "hard", "task").out == [" [x] Sent A very hard task"]
    worker().wait_for_line(received_line("A very hard task"))


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
    console = worker()
    new_task("Slow" + "." * 60)
    new_task("Waits.")
    queue.wait_for_counts(1, 1)  # one is in hand, the other not prefetched
    assert " [x] Done" not in console.out


# --- Message Durability ---


def test_queue_and_tasks_outlive_a_stop_and_a_crash_of_rabbitmq(running_broker, new_task, queue):
    new_task("Persistent.")
    running_broker.stop()
    running_broker.start()
    assert queue.ready() == 1
    running_broker.kill()
    running_broker.start()
    assert queue.take_all() == [b"Persistent."]


def test_a_queue_is_not_redeclared_with_other_arguments(queue):
    queue.declare(durable=True)
    with pytest.raises(pika.exceptions.ChannelClosedByBroker) as caught:
        queue.declare(durable=False)
    assert caught.value.reply_code == 406


# --- Fair Dispatch ---


def test_light_tasks_do_not_queue_behind_a_heavy_one(new_task, workers):
    """All odd tasks are heavy, all even ones light: the two workers share the heavy ones."""
    workers = workers(2)
    new_task("-", stdin=b"heavy...\nlight\n" * 3)
    wait_until_done(6, *workers)
    heavy = [sum("heavy" in line for line in one.out) for one in workers]
    assert sorted(heavy) == [1, 2]  # blindly dealt out, one worker would have all three


# --- Putting It All Together ---

LISTINGS = {
    "new_task.py": """
        connection = connect(
        channel = connection.channel()
        channel.queue_declare(queue="task_queue", durable=True)
        message = " ".join(sys.argv[1:]) or "Hello World!"
        channel.basic_publish(
        exchange="",
        routing_key="task_queue",
        body=message,
        properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
        print(f" [x] Sent {
        connection.close()""",
    "worker.py": """
        def consume(connection,
        channel = connection.channel()
        channel.queue_declare(queue="task_queue", durable=True)
        print(" [*] Waiting for messages. To exit press CTRL+C")
        channel.basic_qos(prefetch_count=1)
        def callback(ch, method, properties, body):
        print(f" [x] Received {
        print(" [x] Done")
        ch.basic_ack(delivery_tag=method.delivery_tag)
        channel.basic_consume(queue="task_queue", on_message_callback=callback)
        channel.start_consuming()""",
}


@pytest.mark.parametrize("name", LISTINGS)
def test_the_lines_of_the_tutorials_listing_stand_in_its_order(name):
    """In one sight; time.sleep(body.count(b".")) is in work(), for users to replace."""
    lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
    assert 'time.sleep(body.count(b"."))' in lines or name == "new_task.py"
    rest, places = enumerate(lines), []
    for expected in textwrap.dedent(LISTINGS[name]).strip().splitlines():
        place = next((at for at, line in rest if line.startswith(expected)), None)
        assert place, expected
        places.append(place)
    assert places[-1] < 85 and places[-1] - places[0] < 40


def test_the_details_are_the_same_in_both_scripts():
    """So a reader reads them once. At the end, each script has its own last lines."""
    below = [
        (ROOT / name).read_text().split("\n# --- What follows is the same in both ")[1]
        for name in LISTINGS
    ]
    one, other = (text.split('\nif __name__ == "__main__":\n')[0] for text in below)
    assert one == other
    assert "pika.BlockingConnection(" in one  # the line of the listings that `connect` stands for


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
