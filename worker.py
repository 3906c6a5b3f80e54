#!/usr/bin/env python
"""Do the tasks of the durable RabbitMQ queue "task_queue", one at a time, a second for each dot.

    python worker.py           work until Ctrl+C; start as many workers as you like
    python worker.py --help    show this help (or -h)

A task is acknowledged when it is done; if the worker ends before, RabbitMQ gives it to another.
Ctrl+C stops at once. SIGTERM finishes the task in hand first; a second one stops at once.
When RabbitMQ goes away, the worker connects again, after pauses of 1 to 30 seconds.
AMQP_URL says where RabbitMQ is: amqp://user:password@host:port/vhost, or amqps:// for TLS; for a
cluster several, separated by commas, tried in turn. Unset: amqp://guest:guest@localhost:5672/%2F
Exit status: 0 after Ctrl+C or SIGTERM; 1 if it cannot work, and standard error says why.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends even the imports without a traceback

import contextlib
import logging
import os
import queue
import random
import re
import sys
import threading
import time
from socket import gethostname

import pika

# With a raw / ? or # in the password, pika would take what is before it for host and port.
URL = r"amqps?://(?!.*[/?#].*@).*"
ADVICE = {  # what an error with this in it means, and what to do
    "AMQP_URL": "write amqp://user:password@host:port/vhost, special characters as %XX",
    "ConnectionRefused": "nothing listens there; start RabbitMQ",
    "gaierror": "unknown host",
    "StackTimeout": "no answer; is RabbitMQ frozen, or the network down?",
    "IncompatibleProtocol": "hung up at once; it boots, wants amqps://, or is not RabbitMQ",
    "WRONG_VERSION_NUMBER": "no TLS there; write amqp://, or the port for TLS (usually 5671)",
    "local issuer|signed cert": "unknown authority; name its certificate in SSL_CERT_FILE",
    "Login was refused": "login refused; check the user and password in AMQP_URL",
    "NOT_ALLOWED": "no such vhost, not for this user, or full; check the vhost in AMQP_URL",
    "access to queue": "check the user's permissions",
    "inequivalent arg": "delete or rename the old queue",
}
HOPELESS = "AMQP_URL|ACCESS_REFUSED|NOT_ALLOWED|inequivalent arg|CERTIFICATE_VERIFY|WRONG_VERSION"


class Broker(pika.URLParameters):
    """An AMQP URL, with times in seconds that tell any failure within half a minute."""

    DEFAULT_HEARTBEAT_TIMEOUT = 8  # pika sees a silent broker within 2 * (heartbeat + 5)
    DEFAULT_STACK_TIMEOUT = 10  # to connect to one address; localhost may have two
    DEFAULT_CLIENT_PROPERTIES = {"connection_name": f"worker.py {gethostname()} {os.getpid()}"}


def work(body: bytes) -> None:
    """Do one task; put your own work here. If it raises, the task goes back to the queue.

    It may take hours and all of the CPU, since the connection lives in another thread. A task
    can come twice (if the worker dies before it acknowledges), so make it safe to repeat.
    """
    if seconds := body.count(b"."):
        time.sleep(seconds)


def consume(broker):
    """Yield None when consuming begins, then each task's body and the function to acknowledge it.

    The function takes whether this task is the last. The connection lives in a thread of its own,
    so that heartbeats go on while the caller works, and so that an acknowledgement is sent on the
    channel of its delivery. What pika raises there is raised here. Closing returns an open task.
    """
    tasks, finished, unacknowledged = queue.SimpleQueue(), queue.SimpleQueue(), []
    connection = pika.BlockingConnection(broker)

    def callback(ch, method, properties, body):
        unacknowledged.append(body)
        tasks.put(body)
        while unacknowledged and ch.is_open:
            try:
                last = finished.get(timeout=0.5)
            except queue.Empty:
                connection.process_data_events()  # heartbeats
                continue
            if last is None:
                return  # sys.exit, scheduled below, closes the channel: that returns the task
            if last:
                ch.stop_consuming()  # before the acknowledgement, which would bring a new task
            ch.basic_ack(delivery_tag=method.delivery_tag)
            unacknowledged.clear()

    def run():
        if hasattr(signal, "pthread_sigmask"):  # signals go to the main thread, to end its sleep
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with connection:
                channel = connection.channel()
                channel.queue_declare(queue="task_queue", durable=True)
                channel.basic_qos(prefetch_count=1)
                channel.basic_consume(queue="task_queue", on_message_callback=callback)
                tasks.put(None)
                channel.start_consuming()
            raise ConnectionError("RabbitMQ cancelled the consumer; was the queue deleted?")
        except Exception as error:
            tasks.put(error)

    def acknowledge(last):
        finished.put(last)
        if last:  # not to cut a slow network off; another signal does, and docker stop after 10 s
            thread.join(timeout=8)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            try:
                task = tasks.get(timeout=0.5)  # without an end, Windows would not see Ctrl+C
            except queue.Empty:
                continue
            if isinstance(task, Exception):
                raise task
            yield task, acknowledge
    finally:
        finished.put(None)
        with contextlib.suppress(pika.exceptions.ConnectionWrongStateError):
            connection.add_callback_threadsafe(sys.exit)
        thread.join(timeout=0.8)  # a frozen broker does not keep us
        if unacknowledged:
            print("worker.py: a task was not acknowledged, and comes again", file=sys.stderr)


def say(line: str) -> None:
    """Print `line` at once, escaped where it is not printable; raise SystemExit if that fails."""
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    try:
        print(line, flush=True)
    except OSError as error:
        sys.stdout = None  # or the interpreter, too, tells what it could not write
        sys.exit(f"worker.py: cannot write to standard output: {type(error).__name__}: {error}")


def main() -> None:
    """Work until a signal comes; raise SystemExit with a line for the user if it cannot."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.getLogger("pika").addHandler(logging.NullHandler())  # its errors are told below
    busy = draining = consumed = False
    pause, step, brokers, hopeless = 1, "use AMQP_URL", [], 0

    def stop(signum, frame):
        nonlocal draining
        again, draining = draining, True  # the work may swallow what is raised here
        if signum == signal.SIGTERM and busy and not again:
            return
        for number in (signal.SIGINT, signal.SIGTERM):  # not again while we close the connection
            signal.signal(number, lambda *_: None)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    urls = os.environ.get("AMQP_URL") or "amqp://guest:guest@localhost:5672/%2F"
    urls = re.split(r",\s*(?=amqp)", urls)
    while True:
        try:
            brokers = [Broker(re.fullmatch(URL, url)[0]) for url in urls]
            step = f"consume from {brokers[0].host}:{brokers[0].port}"
            with contextlib.closing(consume(brokers[0])) as tasks:
                for body, acknowledge in tasks:
                    if body is None:
                        say(" [*] Waiting for messages. To exit press CTRL+C")
                        consumed, pause = True, 1
                        continue
                    busy = True
                    say(f" [x] Received {body.decode(errors='backslashreplace')}")
                    work(body)
                    say(" [x] Done")
                    acknowledge(draining)
                    busy = False
                    if draining:
                        return
        except Exception as error:
            signs = f"{step} {error!r}"
            known = [tip for sign, tip in ADVICE.items() if re.search(sign, signs) and not busy]
            if reply := getattr(error, "reply_text", ""):  # RabbitMQ's own words
                known.insert(0, reply)
            why = "; ".join(known) or f"{type(error).__name__}: {str(error) or error.args}"
            what, busy = "do the task" if busy else step, False
            fault = f"worker.py: cannot {what}: {' '.join(why.split())}"
            hopeless = hopeless + 1 if re.search(HOPELESS, signs) else 0
            if draining or not consumed and hopeless >= len(brokers):
                sys.exit(fault)
            urls.append(urls.pop(0))  # a node that is cut off takes connections, and no more
            seconds = random.uniform(pause, 1.5 * pause)  # so that workers spread
            print(f"{fault}; trying again in {seconds:.1f} s", file=sys.stderr, flush=True)
            pause = min(2 * pause, 20)
            time.sleep(seconds)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
