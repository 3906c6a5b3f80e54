#!/usr/bin/env python
"""Do the tasks of the durable RabbitMQ queue "task_queue", one at a time, a second for each dot.

Usage: python worker.py [-h | --help]. Start as many workers as you like.
A task is acknowledged when it is done; if its worker dies first, RabbitMQ gives it to another.
When RabbitMQ goes away, the worker connects again, after pauses that grow from 1 to 30 seconds.
Ctrl+C ends it at once, SIGTERM after the task in hand, a second signal at once; with status 0.
AMQP_URL=amqp[s]://user:password@host:port/vhost[,...] names RabbitMQ; unset, it is on localhost.
"""

import os
import random
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError  # the builtin since Python 3.11
from functools import partial
from socket import gethostname

import pika

ADVICE = {  # for what a newcomer meets; all else is told in RabbitMQ's or the system's own words
    "ConnectionRefused": "nothing listens there; start RabbitMQ",
    "^gaierror": "unknown host, or no name server answers",
    "StackTimeout|attempt timed|Incompatible": "no AMQP answer; is RabbitMQ booting or frozen?",
    "Login was refused": "login refused; check the user and password in AMQP_URL",
    "inequivalent arg": "task_queue is there with other properties; delete it or use another vhost",
}


class Broker(pika.URLParameters):  # with other defaults, in seconds, which the URL may override
    DEFAULT_HEARTBEAT_TIMEOUT = 8  # pika gives up on a silent broker within 2 * (heartbeat + 5)
    DEFAULT_STACK_TIMEOUT = 10  # to connect to one address; localhost may have two
    DEFAULT_CLIENT_PROPERTIES = {"connection_name": f"worker.py {gethostname()} {os.getpid()}"}


def printable(text):
    """Return `text` on one line, with everything escaped that a terminal would act on."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def work(body):
    """Do one task (bytes); put your own work here. If it raises, the task is delivered again."""
    if b"." in body:  # even sleep(0) takes a while
        time.sleep(body.count(b"."))


def consume(broker, pool, state):
    """Do the tasks that `broker` delivers until SIGTERM; raise whatever else ends it."""
    connection = pika.BlockingConnection(broker)
    with connection:  # when it closes, RabbitMQ takes back what is not acknowledged
        channel = connection.channel()
        channel.queue_declare(queue="task_queue", durable=True)
        print(" [*] Waiting for messages. To exit press CTRL+C")
        channel.basic_qos(prefetch_count=1)

        def callback(ch, method, properties, body):
            state["busy"] = True
            print(f" [x] Received {printable(body.decode(errors='backslashreplace'))}")
            task = pool.submit(work, body)
            while ch.is_open and not task.done():
                try:
                    task.exception(timeout=0.5)
                except TimeoutError:  # the work goes on, and so do heartbeats
                    ch.connection.process_data_events()
            if not ch.is_open:
                return  # start_consuming() raises the reason, while the work goes on
            if (error := task.exception()) is None:
                print(" [x] Done")
                ch.basic_ack(delivery_tag=method.delivery_tag)
            else:
                print(f"worker.py: cannot do the task: {printable(repr(error))}", file=sys.stderr)
                ch.connection.sleep(1)  # RabbitMQ may deliver it again at once
                ch.basic_nack(delivery_tag=method.delivery_tag)
            state["busy"] = False
            if state["stopping"]:
                ch.stop_consuming()

        channel.basic_consume(queue="task_queue", on_message_callback=callback)
        state["pause"] = 1
        channel.start_consuming()
    if not state["stopping"]:
        raise pika.exceptions.ConsumerCancelled  # the queue was deleted, for example


def main():
    """Do tasks until a signal comes."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        return print(__doc__)
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    pool, state = ThreadPoolExecutor(max_workers=1), {"pause": 1, "busy": False, "stopping": False}

    def stop(signum, frame):  # calls nothing of pika's, which may hold its locks right now
        if signum == signal.SIGINT or state["stopping"] or not state["busy"]:
            os._exit(0)  # which waits for no thread
        state["stopping"] = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if hasattr(os, "register_at_fork"):  # SIGTERM still ends the processes that the work forks
        block = partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGTERM})
        unblock = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.register_at_fork(after_in_child=partial(signal.signal, signal.SIGTERM, signal.SIG_DFL))
        os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=unblock)
    urls = re.split(r",\s*(?=amqp)", os.environ.get("AMQP_URL") or "amqp://guest:guest@localhost")
    try:
        brokers = [Broker(re.fullmatch(r"\s*(amqps?://.*?)\s*", url)[1]) for url in urls]
    except Exception:  # which may quote the password
        sys.exit("worker.py: cannot use AMQP_URL; write amqp://user:password@host:port/vhost")
    while not state["stopping"]:
        try:
            consume(broker := random.choice(brokers), pool, state)
        except Exception as error:
            why = next((ADVICE[key] for key in ADVICE if re.search(key, repr(error))), repr(error))
            fault = f"worker.py: cannot consume from {broker.host}:{broker.port}: {printable(why)}"
            print(fault + "; trying again" * (not state["stopping"]), file=sys.stderr)
            pause = pool.submit(time.sleep, random.uniform(1, 1.5) * state["pause"])  # after work
            while not pause.done():
                time.sleep(0.1)  # short, since a signal just before a sleep is seen only after it
            state.update(busy=False, pause=min(2 * state["pause"], 20))


if __name__ == "__main__":
    main()
