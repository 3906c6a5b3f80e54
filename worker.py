#!/usr/bin/env python
"""Do the tasks of the durable RabbitMQ queue "task_queue", one at a time, a second for each dot.

Usage: python worker.py [-h | --help]. Start as many workers as you like.
A task is acknowledged when it is done; if its worker ends before, RabbitMQ gives it to another.
When RabbitMQ goes away, the worker connects again, after pauses that grow from 1 to 30 seconds.
Ctrl+C ends it at once, SIGTERM after the task in hand, a second signal at once; with status 0.
AMQP_URL says where RabbitMQ is: amqp://user:password@host:port/vhost, or amqps:// for TLS; for a
cluster several, separated by commas. Unset: amqp://guest:guest@localhost:5672/%2F
"""

import os
import random
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from functools import partial
from socket import gethostname

import pika

ADVICE = {  # for what a newcomer meets; all else is told in RabbitMQ's or the system's own words
    "ConnectionRefused": "nothing listens there; start RabbitMQ",
    "gaierror": "unknown host, or no name server answers",
    "StackTimeout": "no answer; is RabbitMQ frozen, or the network down?",
    "Login was refused": "login refused; check the user and password in AMQP_URL",
    "inequivalent arg": "task_queue is there with other properties; delete it or use another vhost",
}


class Broker(pika.URLParameters):  # the times, in seconds, tell any failure within half a minute
    DEFAULT_HEARTBEAT_TIMEOUT = 8  # pika gives a silent broker up within 2 * (heartbeat + 5)
    DEFAULT_STACK_TIMEOUT = 10  # to connect to one address; localhost may have two
    DEFAULT_CLIENT_PROPERTIES = {"connection_name": f"worker.py {gethostname()} {os.getpid()}"}


def printable(text):
    """Return `text` on one line, with what a terminal would obey escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def work(body):
    """Do one task (bytes), for hours if need be; put your own work here. To raise gives it back."""
    if b"." in body:  # even sleep(0) takes a while
        time.sleep(body.count(b"."))


def consume(broker, pool, state):
    """Do the tasks that `broker` delivers until SIGTERM; raise whatever else ends it."""
    connection = pika.BlockingConnection(broker)
    with connection:  # RabbitMQ gets back what is not acknowledged when it closes
        channel = connection.channel()
        channel.queue_declare(queue="task_queue", durable=True)
        print(" [*] Waiting for messages. To exit press CTRL+C")
        state["pause"] = 1
        channel.basic_qos(prefetch_count=1)

        def callback(ch, method, properties, body):
            print(f" [x] Received {printable(body.decode(errors='backslashreplace'))}")
            task = pool.submit(work, body)
            while ch.is_open and not task.done():
                try:
                    task.exception(timeout=0.5)
                except TimeoutError:  # it goes on, and so do heartbeats
                    ch.connection.process_data_events()
            if ch.is_closed:
                return  # and start_consuming() raises why, while the work goes on
            if state["stopping"]:
                ch.stop_consuming()  # before the acknowledgement, which would bring a new task
            if (error := task.exception()) is not None:
                print(f"worker.py: cannot do the task: {printable(repr(error))}", file=sys.stderr)
                ch.connection.sleep(1)  # or a task that always fails would spin
                ch.basic_nack(delivery_tag=method.delivery_tag)
                return
            print(" [x] Done")
            ch.basic_ack(delivery_tag=method.delivery_tag)

        def stop(signum, frame):
            if state["stopping"] or not connection.is_open:
                os._exit(0)
            state["stopping"] = True
            connection.add_callback_threadsafe(channel.stop_consuming)  # wakes an idle worker

        signal.signal(signal.SIGTERM, stop)
        channel.basic_consume(queue="task_queue", on_message_callback=callback)
        channel.start_consuming()
    if not state["stopping"]:
        raise pika.exceptions.ConsumerCancelled  # the queue was deleted, for example


def main():
    """Do tasks until a signal comes."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        return print(__doc__.strip())
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))  # which waits for no thread
    if hasattr(os, "register_at_fork"):  # let SIGTERM end what the work forks, as without us
        block = partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGTERM})
        unblock = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.register_at_fork(after_in_child=partial(signal.signal, signal.SIGTERM, signal.SIG_DFL))
        os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=unblock)
    urls = os.environ.get("AMQP_URL") or "amqp://guest:guest@localhost:5672/%2F"
    try:
        brokers = [Broker(re.fullmatch(r"\s*(amqps?://.*?)\s*", url)[1]) for url in urls.split(",")]
    except Exception:  # which may quote the password
        sys.exit("worker.py: cannot use AMQP_URL; write amqp://user:password@host:port/vhost")
    pool, state = ThreadPoolExecutor(max_workers=1), {"pause": 1, "stopping": False}
    while not state["stopping"]:
        try:
            consume(broker := random.choice(brokers), pool, state)
        except Exception as error:
            why = next((ADVICE[key] for key in ADVICE if re.search(key, repr(error))), repr(error))
            fault = f"worker.py: cannot consume from {broker.host}:{broker.port}: {printable(why)}"
            print(fault + "; trying again" * (not state["stopping"]), file=sys.stderr)
            pause = pool.submit(time.sleep, random.uniform(1, 1.5) * state["pause"])  # after work
            state["pause"] = min(2 * state["pause"], 20)
            while not (pause.done() or state["stopping"]):
                time.sleep(0.1)  # in slices, which a signal cannot outlast


if __name__ == "__main__":
    main()
