#!/usr/bin/env python
"""Do the tasks of the durable RabbitMQ queue "task_queue", one at a time, a second for each dot.

Usage: python worker.py [-h | --help]. Ctrl+C ends it at once; SIGTERM, after the task in hand.
AMQP_URL=amqp[s]://user:password@host:port/vhost[,...] names RabbitMQ; unset, it is on localhost.
"""

import os
import random
import re
import signal
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Generator
from concurrent import futures
from itertools import cycle
from multiprocessing import get_start_method, set_start_method
from socket import gethostname
from traceback import format_exc, format_exception_only

import pika

get_start_method(allow_none=True) or set_start_method("spawn")  # forks would keep the connection
stopping = []  # has an item once SIGTERM has come


def work(body):
    """Do one task (bytes); put your own work here. If it raises, the task is delivered again."""
    if b"." in body:  # since sleep(0) takes time, too
        time.sleep(body.count(b"."))


def consume(broker, executor):
    """Do the tasks of `broker`; raise SystemExit on SIGTERM, AMQPError when the broker is lost."""
    try:
        connection = pika.BlockingConnection(broker)
    except Exception as error:  # such as gaierror, SSLError or a timeout of pika's own
        raise pika.exceptions.AMQPConnectionError(error) from error
    with connection:  # when it closes, RabbitMQ takes back what is not acknowledged
        channel = connection.channel()
        channel.queue_declare(queue="task_queue", durable=True)
        print(" [*] Waiting for messages. To exit press CTRL+C")
        channel.basic_qos(prefetch_count=1)

        def callback(ch, method, properties, body):
            if stopping:
                sys.exit()
            print(f" [x] Received {shown(body[:4000].decode(errors='backslashreplace'))}")
            task = executor.submit(attempt, body)
            while ch.is_open and not task.done():
                try:
                    task.result(timeout=0.5)
                except futures.TimeoutError:  # the work goes on; send heartbeats meanwhile
                    connection.process_data_events()
            if ch.is_open and task.result():
                print(" [x] Done")
                ch.basic_ack(delivery_tag=method.delivery_tag)
            else:  # not at once, as RabbitMQ would deliver it again at once
                connection.call_later(1, lambda: ch.basic_nack(delivery_tag=method.delivery_tag))

        def end_if_stopping():  # looks again between tasks, five times a second
            sys.exit() if stopping else connection.call_later(0.2, end_if_stopping)

        end_if_stopping()
        channel.basic_consume(queue="task_queue", on_message_callback=callback)
        broker.pause = 1
        channel.start_consuming()
        raise pika.exceptions.ConsumerCancelled  # the queue was deleted, for example


def main():
    """Do tasks until a signal comes; whenever RabbitMQ is gone, try again."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.stderr = sys.stderr or open(os.devnull, "w")  # print(file=None) would use stdout
    sys.excepthook = lambda *e, f=sys.excepthook: (f(*e), setattr(sys, "stdout", None))  # status 1
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))  # without waiting for the work
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if stopping else stopping.append(True))
    urls = re.split(r"\s*,\s*(?=amqp)", os.getenv("AMQP_URL", "").strip() or "amqp://localhost")
    try:  # pika would misread other URLs
        found = [Broker(re.fullmatch(r"amqps?://[^/?#]*/?[^/?#@]*(\?[^#@]*)?", u)[0]) for u in urls]
    except Exception:  # not shown, as it may quote the password
        sys.exit("worker.py: cannot use AMQP_URL; write amqp://user:password@host:port/vhost")
    with futures.ThreadPoolExecutor(max_workers=1) as executor:  # for all connections
        for broker in cycle(random.sample(found, len(found))):
            try:
                consume(broker, executor)
            except pika.exceptions.AMQPError as e:
                why = next((ADVICE[k] for k in ADVICE if re.search(k, repr(e))), shown(repr(e)))
                fault = f"worker.py: cannot consume from {broker.host}:{broker.port}: {why}"
                print(fault + ("" if stopping else "; trying again"), file=sys.stderr)
            until = executor.submit(time.monotonic).result() + random.uniform(1, 1.5) * broker.pause
            while time.monotonic() < until:  # begins when the work in hand has ended
                sys.exit() if stopping else time.sleep(0.1)
            broker.pause = min(2 * broker.pause, 20)


def attempt(body):
    """Return True if work() has done the task; else print why not."""
    try:
        if not isinstance(work(body), (AsyncGenerator, Awaitable, futures.Future, Generator, map)):
            return True
        raise TypeError("work() must be a plain function, done when it ends; see asyncio.run()")
    except BaseException as error:  # even sys.exit() in work()
        lines = ["".join(format_exception_only(error)).strip(), *format_exc().splitlines()[:99]]
        print("worker.py: cannot do the task:", "\n".join(map(shown, lines)), file=sys.stderr)


def shown(text):
    """Return the first thousand characters of `text`, escaped where a terminal would obey them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:1000])


class Broker(pika.URLParameters):  # own defaults, in seconds; the URL may override them
    DEFAULT_HEARTBEAT_TIMEOUT = 8  # pika gives up on a silent broker within 2 * (heartbeat + 5)
    DEFAULT_STACK_TIMEOUT = 10  # to connect to one address; localhost may have two
    DEFAULT_CLIENT_PROPERTIES = {"connection_name": f"worker.py {gethostname()} {os.getpid()}"}
    pause = 1  # until the next try


ADVICE = {  # for what newcomers meet; other faults are shown in RabbitMQ's or the system's words
    "ConnectionRefused": "nothing listens there; start RabbitMQ",
    "gaierror|'idna'": "unknown host, or no name server answers",
    "StackTimeout|attempt timed|Incompatible": "no AMQP answer; is RabbitMQ booting or frozen?",
    "Login was refused|surrogates": "login refused; check the user and password in AMQP_URL",
    "inequivalent arg": "task_queue is there with other properties; delete it or use another vhost",
}

if __name__ == "__main__":
    print(__doc__) if sys.argv[1:2] in (["-h"], ["--help"]) else main()
