"""worker.py does one task at a time, ends as it is told, and comes back, whatever happens."""

import re
import signal

from tests.harness.brokers import run
from tests.harness.consoles import ROOT
from tests.harness.pages import edited
from tests.harness.scripts import AGAIN, DONE, IN_HAND, NOBODY, RECEIVED, WAITING, WORKER, received
from tests.harness.waiting import wait_until


def test_what_is_wrong_with_its_start_ends_it(start_alone):
    """An argument, whatever AMQP_URL says; and an AMQP_URL that cannot be used."""
    console = start_alone(WORKER, "--hepl", url="unusable")
    assert (console.wait(), console.out) == (2, [])
    assert "--hepl" in console.err[-1]
    assert start_alone(WORKER, url="unusable").wait() == 1


def has_only_waited(console):
    """Whether it has used less than two seconds of a processor."""
    return int(run("ps", "-o", "cputimes=", "-p", str(console.process.pid))) < 2


# --- While it works ---


def test_a_task_of_many_heartbeats_is_worked_once(worker, broker, queue):
    """Nine seconds at a heartbeat of one: a broker that misses two closes the connection."""
    console = worker(url=broker.url(query="heartbeat=1"))
    queue.publish(b"long.........")
    console.wait_for_line(DONE)
    queue.wait_for_counts(0, 0)
    assert console.err == []
    assert has_only_waited(console)


# --- How it ends ---


def test_a_task_that_comes_with_sigterm_is_not_begun(workers, queue):
    """Nor one that comes a little later, before it has looked for the signal."""
    four = workers(4)
    with queue.channel() as channel:
        for console in four:
            console.signal(signal.SIGTERM)
        for _ in four:
            channel.basic_publish("", "task_queue", b"task")
    for console in four:
        assert console.wait() == 0
        assert console.out == [" [*] Waiting for messages. To exit press CTRL+C"]
    wait_until(lambda: queue.ready() == 4, "all tasks are in the queue")


def test_sigterm_finishes_and_acknowledges_the_task_in_hand_and_ends_as_python_ends(
    worker_of, queue, orderly, tmp_path
):
    """It takes no other; what it wrote is in the file, and RabbitMQ hears a goodbye."""
    log = tmp_path / "log"
    work = "time.sleep(4)\nLOG.write('done')"
    console = worker_of(work, top=f"LOG = open({str(log)!r}, 'a')")
    queue.publish(b"in hand")
    console.wait_for_line(RECEIVED)
    queue.publish(b"waits")
    console.signal(signal.SIGTERM)
    assert console.wait() == 0
    orderly(console)
    assert console.out[1:] == [" [x] Received in hand", " [x] Done"]
    assert (log.read_text(), console.err) == ("done", [])
    assert queue.take_all() == [b"waits"]


# Work that waits for threads of its own, for which Python's end would wait, or fail.
POOL = "from concurrent.futures import ThreadPoolExecutor"


def test_ctrl_c_or_a_second_sigterm_ends_it_at_once(worker_of, queue, proxy):
    """Also where the connection is lost, and the work goes on."""
    work = "with ThreadPoolExecutor() as pool: pool.submit(time.sleep, 60).result()"
    interrupted, terminated = (worker_of(work, POOL, url=proxy.url) for _ in range(2))
    queue.publish(b"one", b"other")
    for console in (interrupted, terminated):
        console.wait_for_line(RECEIVED)
    proxy.reset()
    for console in (interrupted, terminated):
        console.wait_for_line(IN_HAND)
    interrupted.ctrl_c()
    assert interrupted.wait(5) == 0

    def ends():
        terminated.signal(signal.SIGTERM)  # of two that are pending together one is dropped
        return terminated.process.poll() is not None

    wait_until(ends, "it ends", timeout=5)
    assert terminated.wait() == 0
    wait_until(lambda: queue.ready() == 2, "the tasks are back")


def test_sigterm_lets_work_that_has_lost_its_connection_end_as_any_other(worker_of, proxy, queue):
    """A Python that is ending starts no new threads: such work must not fail for that."""
    work = "time.sleep(3)\nThreadPoolExecutor().submit(print, 'from a thread').result()"
    console = worker_of(work, POOL, url=proxy.url)
    queue.publish(b"task")
    console.wait_for_line(RECEIVED)
    proxy.reset()
    console.wait_for_line(AGAIN)
    console.signal(signal.SIGTERM)
    assert console.wait() == 0
    assert console.out[-1] == "from a thread"


# --- How it comes back ---


def test_sigterm_ends_it_while_it_waits_to_connect_again(start_alone):
    """How long it waits: test_functions.py."""
    console = start_alone(WORKER)
    console.wait_for_line(AGAIN, count=4)  # after seven seconds or more; eight are to come
    assert has_only_waited(console)
    console.signal(signal.SIGTERM)
    assert console.wait(5) == 0


def test_it_goes_on_at_the_next_broker_of_amqp_url(start, broker, queue):
    console = start(WORKER, url=f"amqp://{NOBODY},{broker.url()}")
    console.wait_for_line(WAITING)
    wait_until(queue.consumers, "it consumes")
    broker.ctl("close_all_connections", "test")
    console.wait_for_line(WAITING, count=2)
    assert any("nothing listens" in line for line in console.err)


def test_the_work_ends_before_it_consumes_again(worker_of, proxy, queue):
    """A task that is lost with the connection comes again, and never beside itself."""
    console = worker_of("print(' begins')\ntime.sleep(5)\nprint(' ends')", url=proxy.url)
    queue.publish(b"task")
    console.wait_for_line(" begins")
    proxy.reset()
    assert "StreamLostError" in console.wait_for_line(AGAIN).text
    console.wait_for_line(IN_HAND)
    assert " ends" not in console.out  # it is told at once
    console.wait_for_line(" ends")
    assert has_only_waited(console)
    console.wait_for_line(DONE)
    kinds = [line.split()[0] for line in console.out]
    assert kinds == ["[*]", "[x]", "begins", "ends", "[*]", "[x]", "begins", "ends", "[x]"]
    queue.wait_for_counts(0, 0)


def test_an_overdue_acknowledgement_is_told_and_it_consumes_again(
    broker, worker_of, new_task, tmp_path
):
    """RabbitMQ gives the task to another worker, and this one may finish it all the same.

    Up to 4.2 it closes the channel, which is told while the work goes on. Since then it cancels the
    consumer, and of quorum queues alone; the worker learns of that when the work has ended.
    """
    finish = tmp_path / "finish"
    work = f"while not os.path.exists({str(finish)!r}):\n    time.sleep(0.1)"
    closes = re.match(r"3\.|4\.[012]\.", broker.ctl("version"))
    with broker.vhost("quorum", "--default-queue-type", "quorum") as url:
        if closes:
            broker.set("consumer_timeout", 1000)
            broker.set("channel_tick_interval", 500)
        else:
            policy = '{"consumer-timeout": 1000}'
            broker.ctl("set_policy", "--vhost", "quorum", "overdue", ".*", policy)
        try:
            slow, other = (worker_of(work, url=url) for _ in range(2))
            new_task("task", url=url)
            wait_until(lambda: received(slow) and received(other), "both have received it")
            if closes:
                slow.wait_for_line(".*PRECONDITION_FAILED - delivery acknowledgement.*timed out.*")
        finally:
            broker.set("consumer_timeout", 1800000)
            broker.set("channel_tick_interval", 60000)
        finish.touch()
        slow.wait_for_line(rf".*{'timed out' if closes else 'ConsumerCancelled'}.*; trying again")
        slow.wait_for_line(WAITING, count=2)


# --- When it is not RabbitMQ that fails ---


def test_a_bug_of_its_own_is_python_s_traceback(start, queue, tmp_path):
    line = "connection.process_data_events("
    bug = {line: f"open('/no/such/file'); {line}"}
    (tmp_path / WORKER).write_text(edited((ROOT / WORKER).read_text(), bug))
    console = start(tmp_path / WORKER)
    queue.declare()
    queue.publish(b"task.")
    assert console.wait() == 1
    assert console.err[0] == "Traceback (most recent call last):"
    assert "/no/such/file" in console.err[-1]
    wait_until(lambda: queue.ready() == 1, "the task is back")
