#!/usr/bin/env python
"""Do the tasks of the durable RabbitMQ queue "task_queue", one at a time, a second for each dot.

Ctrl+C ends it at once; SIGTERM, when the task in hand is done; a second one, at once.
AMQP_URL=amqp[s]://user:password@host:port/vhost names RabbitMQ; for a cluster, give several such
URLs, separated by commas. Unset, RabbitMQ is on localhost.
Exit status: 0 after a signal, 1 if AMQP_URL cannot be used, 2 for an argument.
"""

import os
import random
import re
import signal
import sys
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import AsyncGenerator, Awaitable, Generator
from concurrent import futures
from itertools import cycle
from multiprocessing import set_start_method
from socket import gethostname
from urllib.parse import urlsplit

import pika

SCRIPT = "worker.py"

# One thread does the tasks. Meanwhile the main thread sends heartbeats: without them, RabbitMQ
# would drop the connection during a long task.
executor = futures.ThreadPoolExecutor(max_workers=1)
in_hand = None  # the Future of the task in hand, or of the last one
stopping = False  # True once SIGTERM has come


def work(body):
    """Do one task, `body` (bytes): sleep a second for each dot.

    Put your own work() into a module of its own, such as orders.py, and uncomment its import below.
    When it returns, the task is done. When it raises, the task comes again after a second, before
    all others, again and again: so catch what no retry can cure.

    A task may be done twice; make that harmless. One of more than half an hour is given to another
    worker, too, again and again, unless you raise RabbitMQ's consumer_timeout. All tasks are done
    in the same thread, which is not the main one.
    """
    time.sleep(body.count(b"."))


def consume(connection):
    """Do the tasks that `connection`, a pika.BlockingConnection, delivers.

    Raise AMQPError when it is lost, SystemExit after SIGTERM.
    """
    channel = connection.channel()

    channel.queue_declare(queue="task_queue", durable=True)
    print(" [*] Waiting for messages. To exit press CTRL+C")

    channel.basic_qos(prefetch_count=1)

    def callback(ch, method, properties, body):
        global in_hand
        if stopping:
            return  # not acknowledged, the task goes back to the queue when the connection closes
        print(f" [x] Received {printable(body)}")
        in_hand = executor.submit(attempt, body)  # in the other thread, attempt() calls work()
        send_heartbeats_until_done(connection, ch)
        if ch.is_closed:
            return  # as after consumer_timeout: start_consuming() raises what RabbitMQ says
        if in_hand.result():
            print(" [x] Done")
            ch.basic_ack(delivery_tag=method.delivery_tag)
        else:  # work() has raised: put the task back, after a second, since it comes again at once
            connection.sleep(1)
            ch.basic_nack(delivery_tag=method.delivery_tag, requeue=True)

    channel.basic_consume(queue="task_queue", on_message_callback=callback)

    watch_for_sigterm(connection)  # by a timer, since a signal does not end start_consuming()
    channel.start_consuming()  # returns only if RabbitMQ ends it, as when the queue is deleted
    raise pika.exceptions.ConsumerCancelled


# --- The tutorial ends here. What follows keeps it going where things fail: ---
# work() raises: attempt(). RabbitMQ is lost: main() and wait(). A signal comes: stop().

# Skip this, unless your own work() uses multiprocessing: with "fork", its processes would inherit
# the connection and the signal handlers of this one.
set_start_method("spawn", force=True)

# from orders import work  # your own, instead of the one above


def attempt(body):
    """Return whether work() has done the task; if not, print why."""
    try:
        result = work(body)
        # The coroutine of an async def, for example, has only been made, and not run.
        if isinstance(result, (AsyncGenerator, Awaitable, Generator, futures.Future)):
            raise TypeError(f"work() returned {result!r}: use asyncio.run(), or wait for it")
        return True
    except BaseException as error:  # even sys.exit() in work()
        print(f"{SCRIPT}: cannot do the task: {type(error).__name__}", file=sys.stderr)
        for line in traceback.format_exc().splitlines():
            print(f"  {escaped(line[:1000])}", file=sys.stderr)
        return False


def send_heartbeats_until_done(connection, ch):
    """Wait until the task in hand has ended, or RabbitMQ has closed the channel `ch`.

    Raise AMQPError if the connection is lost.
    """
    while ch.is_open and futures.wait([in_hand], timeout=0.5).not_done:
        connection.process_data_events()  # within callback(), this delivers no other task


def main():
    """Do tasks until a signal comes; whenever RabbitMQ is lost, try again."""
    set_up_output()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    pause = 1  # seconds, then 2, 4 ... 20
    for address, url in cycle(brokers()):
        connected_at = None
        try:
            with connect(url) as connection:
                connected_at = time.monotonic()
                consume(connection)
        except pika.exceptions.AMQPError as error:
            fault = f"cannot consume from {address}: {reason(error)}"
            plan = "" if stopping else "; trying again"
            print(f"{SCRIPT}: {fault}{plan}", file=sys.stderr)
        if connected_at and time.monotonic() - connected_at > 1:
            pause = 1  # the connection was not dropped at once
        wait(pause * random.uniform(1, 1.5))  # random, or all workers would come at once
        pause = min(2 * pause, 20)


def stop(signum, frame):
    """Handle a signal: exit at once, or, at a first SIGTERM, only take note of it."""
    global stopping
    if signum == signal.SIGINT or stopping:
        os._exit(0)  # sys.exit() would wait for the work in hand
    stopping = True  # no sys.exit() here: this may run in the middle of anything that pika does


def watch_for_sigterm(connection):
    """Exit once SIGTERM has come. pika calls this every 0.2 s, but never during callback()."""
    if stopping:
        sys.exit()
    connection.call_later(0.2, lambda: watch_for_sigterm(connection))


def wait(seconds):
    """Wait for work that has lost its connection, then for `seconds`; exit after SIGTERM."""
    if in_hand and not in_hand.done():  # until then, leave new tasks to other workers
        print(f"{SCRIPT}: waiting for the work in hand", file=sys.stderr)
        while not in_hand.done():
            time.sleep(0.1)
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stopping:
        time.sleep(0.1)  # a signal ends no sleep, so take short ones
    if stopping:
        sys.exit()


# --- The rest is the same in both scripts, but for their last lines. ---


class Parameters(pika.URLParameters):
    """What pika reads from a URL, with other defaults; ?heartbeat=30 in the URL overrides one."""

    DEFAULT_HEARTBEAT_TIMEOUT = 8  # seconds; so a silent broker is noticed within half a minute
    DEFAULT_BLOCKED_CONNECTION_TIMEOUT = 20  # seconds for RabbitMQ to find memory or disk again
    DEFAULT_CLIENT_PROPERTIES = {"connection_name": f"{SCRIPT} {gethostname()} {os.getpid()}"}


# What newcomers meet: words in repr(error), and what to do about it.
ADVICE = {
    "ConnectionRefused": "nothing listens there; start RabbitMQ",
    "gaierror": "unknown host, or no name server answers",
    "attempt timed": "no answer; is the host up, and no firewall in between?",
    "StackTimeout": "no AMQP answer; is RabbitMQ booting or frozen?",
    "IncompatibleProtocol": "no AMQP answer; wrong port, or is RabbitMQ booting?",
    "Login was refused": "login refused; check AMQP_URL (guest may log in on localhost alone)",
    "NackError": "RabbitMQ refuses the task; is the queue full?",
    "BlockedTimeout": "RabbitMQ is short of memory or disk",
}


def brokers():
    """Return (HOST:PORT, URL) of each broker in AMQP_URL, in random order; exit if one is unusable.

    Random, so that many workers use all nodes of a cluster. (Given all URLs at once, pika would
    stop at the first unknown host.)
    """
    urls = os.getenv("AMQP_URL", "").strip() or "amqp://localhost"
    found = []
    for url in re.split(r"\s*,\s*(?=amqps?://)", urls):  # at commas before amqp:// alone
        try:
            parameters = parameters_of(url)
        except OSError as error:
            sys.exit(f"{SCRIPT}: cannot read a file that AMQP_URL names: {error}")
        except Exception:  # not shown, as it may quote the password
            sys.exit(
                f"{SCRIPT}: cannot use AMQP_URL; write amqp://user:password@host:port/vhost, "
                "with %XX for / ? # @ in a password"
            )
        found.append((f"{parameters.host}:{parameters.port}", url))
    random.shuffle(found)
    return found


def parameters_of(url):
    """Return Parameters; raise OSError if a file that `url` names cannot be read, or ValueError."""
    url.encode()  # a ValueError if it is not UTF-8: pika's would show the password
    parts = urlsplit(url)
    if parts.scheme not in ("amqp", "amqps"):
        raise ValueError  # pika would connect to localhost
    if "@" in parts.path + parts.query + parts.fragment:
        raise ValueError  # pika would take a plain / ? or # in a password for the end of the host
    return Parameters(url)


def connect(url):
    """Return a new pika.BlockingConnection; raise AMQPConnectionError, whatever prevents it."""
    try:
        return pika.BlockingConnection(parameters_of(url))  # with certificates as they are now
    except Exception as error:  # pika also raises gaierror, SSLError and others
        raise pika.exceptions.AMQPConnectionError from error


def reason(error):
    """Return what to print of `error`: advice, or else its own words."""
    words = repr(error.__cause__ or error)  # the cause is what connect() has met
    for sign, advice in ADVICE.items():
        if sign in words and "SSL" not in words:  # SSL's own words say more
            return advice
    return escaped(words)


def set_up_output():
    """Show each line at once, and as an escape what the terminal's encoding lacks."""
    if hasattr(sys.stdout, "reconfigure"):  # not in IDLE, for example
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")


def printable(body):
    """Return the first 1,000 bytes of `body` as text that is safe to print."""
    return escaped(body[:1000].decode(errors="backslashreplace"))


def escaped(text):
    r"""Return `text` with escapes, such as \x1b, for what a terminal would obey."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


if __name__ == "__main__":
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    main()
