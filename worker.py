#!/usr/bin/env python
"""Do the tasks of the durable RabbitMQ queue "task_queue", one at a time, a second for each dot.

Ctrl+C ends it at once; SIGTERM, when the task in hand is done; a second one, at once.
AMQP_URL=amqp[s]://user:password@host:port/vhost[,...] names RabbitMQ; unset, it is on localhost.
Exit status: 0 after a signal, 1 if AMQP_URL cannot be used, 2 for an argument.
"""

import os
import random
import re
import signal
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import AsyncGenerator, Awaitable, Generator
from concurrent import futures
from contextvars import copy_context
from itertools import cycle
from multiprocessing import get_start_method, set_start_method
from socket import gethostname
from traceback import format_exception, format_exception_only

import pika

SCRIPT = "worker.py"

stopping = False  # True once SIGTERM has come

# If work() starts processes: a forked one would inherit the connection, and hold it open after the
# worker's death, so that its task would not go to another. (A method that was set before stays.)
if get_start_method(allow_none=True) is None:
    set_start_method("spawn")


def work(body):
    """Do one task, `body` (bytes); put your own work here.

    The task is done when this returns. If it raises, the task is delivered again, before others. It
    may also come again if the connection is lost, or after RabbitMQ's consumer_timeout (half an
    hour). All tasks are done in one thread, which is not the main one.
    """
    if b"." in body:  # else sleep(0) would slow down tasks without dots
        time.sleep(body.count(b"."))


# The tutorial's listing, once main() has connected, and what it takes to keep it going.
def consume(connection, executor):
    """Do what `connection`, a pika.BlockingConnection, delivers, in the thread of `executor`.

    Raise AMQPError when the connection is lost, SystemExit after SIGTERM.
    """
    channel = connection.channel()

    channel.queue_declare(queue="task_queue", durable=True)
    print(" [*] Waiting for messages. To exit press CTRL+C")

    channel.basic_qos(prefetch_count=1)

    def callback(ch, method, properties, body):
        if stopping:  # it came after SIGTERM, and is requeued when main() closes the connection
            sys.exit()
        print(f" [x] Received {printable(body)}")
        future = executor.submit(attempt, body)
        while ch.is_open and not ends_within(future, seconds=0.5):
            # Send heartbeats, or RabbitMQ drops the connection; if it is lost, this raises. Until
            # the callback returns, pika runs no call_later(), so that SIGTERM cuts off no task.
            connection.process_data_events()
        if not ch.is_open:
            return  # RabbitMQ closed only the channel, and start_consuming() raises why
        if future.result():
            print(" [x] Done")
            ch.basic_ack(delivery_tag=method.delivery_tag)
        else:  # give it back in a second: RabbitMQ then delivers it again at once
            connection.call_later(1, lambda: ch.basic_nack(delivery_tag=method.delivery_tag))

    channel.basic_consume(queue="task_queue", on_message_callback=callback)

    watch_for_sigterm(connection)
    channel.start_consuming()
    raise pika.exceptions.ConsumerCancelled  # it returned: the queue was deleted, for example


# Results that mean that work() has only been prepared, or started elsewhere.
UNFINISHED = (AsyncGenerator, Awaitable, futures.Future, Generator, map)


def attempt(body):
    """Return whether work() has done the task; if not, print why."""
    try:
        result = work(body)
        if isinstance(result, UNFINISHED):
            raise TypeError("work() must be a plain function, done when it ends; see asyncio.run()")
    except BaseException as error:  # even sys.exit() in work()
        print_failure(error)
        return False
    return True


def print_failure(error):
    """Print what work() has raised in a line, and its traceback, without the middle if long."""
    summary = type(error).__name__
    lines = []
    try:
        summary = "".join(format_exception_only(error)).strip()
        lines = "".join(format_exception(error)).splitlines()
    except BaseException:  # traceback itself fails on a few odd errors
        pass
    if len(lines) > 100:
        lines[50:-50] = ["... (lines left out) ..."]
    print(
        f"{SCRIPT}: cannot do the task: {escaped(summary)}",
        *map(escaped, lines),
        sep="\n  ",  # indented, so that none can pose as a line of ours
        file=sys.stderr,
    )


def main():
    """Do tasks until a signal comes; whenever RabbitMQ is lost, try again."""
    set_up_output()
    signal.signal(signal.SIGINT, exit_at_once)
    signal.signal(signal.SIGTERM, exit_after_the_task)
    # The work has a thread of its own, so that heartbeats go on meanwhile, and the same one for all
    # connections, so that what belongs to a thread, such as a SQLite connection, can be kept. It
    # has the context variables that the top of this file has set.
    executor = futures.ThreadPoolExecutor(1, initializer=inherit, initargs=(copy_context(),))
    pause = 1
    for place, url in cycle(brokers()):
        connected_at = None
        try:
            with connect(url) as connection:
                connected_at = time.monotonic()
                consume(connection, executor)
        except pika.exceptions.AMQPError as error:
            plan = "" if stopping else "; trying again"
            print(f"{SCRIPT}: cannot consume from {place}: {reason(error)}{plan}", file=sys.stderr)
        if connected_at and time.monotonic() - connected_at > 1:
            pause = 1  # the connection was of use, and not dropped at once
        wait_or_exit(random.uniform(1, 1.5) * pause, executor)  # lest all workers come at once
        pause = min(2 * pause, 20)


def inherit(context):
    """Give work()'s new thread the context variables of main()'s, such as decimal's precision."""
    for variable, value in context.items():
        variable.set(value)


def exit_at_once(signum, frame):
    os._exit(0)  # unlike sys.exit(), this does not wait for the work in hand


def exit_after_the_task(signum, frame):
    """Handle SIGTERM; a second one ends at once."""
    global stopping
    if stopping:
        os._exit(0)
    stopping = True  # and no sys.exit() here, in the middle of the task


def watch_for_sigterm(connection):
    """Exit if SIGTERM has come, else look again in 0.2 s, since its handler ends nothing."""
    if stopping:
        sys.exit()
    connection.call_later(0.2, lambda: watch_for_sigterm(connection))


def ends_within(future, seconds):
    """Wait until `future` has ended, but no longer than `seconds`; return whether it has."""
    try:
        future.exception(timeout=seconds)  # futures.wait() would be slower by a third
    except futures.TimeoutError:  # which is not the builtin one before Python 3.11
        pass
    return future.done()


def wait_or_exit(seconds, executor):
    """Wait `seconds`, and until work that has lost its connection has ended.

    After SIGTERM, wait for the work alone, and exit.
    """
    until = time.monotonic() + seconds
    work_ended = executor.submit(lambda: None)  # its turn comes after that work
    if not ends_within(work_ended, seconds=1):
        print(f"{SCRIPT}: waiting for the work in hand", file=sys.stderr)
    while not work_ended.done() or (time.monotonic() < until and not stopping):
        time.sleep(0.1)  # in slices, since a signal ends no sleep
    if stopping:
        sys.exit()


# --- What follows is the same in both scripts, but for their last lines. ---


class NotConnected(pika.exceptions.AMQPConnectionError):
    """There is no connection, so that nothing was sent or received; its text says why."""


class Parameters(pika.URLParameters):
    """pika's parameters with these defaults, which a URL may override, as with ?heartbeat=30."""

    DEFAULT_HEARTBEAT_TIMEOUT = 8  # seconds; pika gives up a silent broker after at most 26
    DEFAULT_STACK_TIMEOUT = 10  # seconds to connect to one address; localhost may have two
    DEFAULT_BLOCKED_CONNECTION_TIMEOUT = 20  # seconds for RabbitMQ to find memory or disk again
    DEFAULT_CLIENT_PROPERTIES = {"connection_name": f"{SCRIPT} {gethostname()} {os.getpid()}"}


# The URLs that are accepted. Pika would misread others, such as those with / ? or # in a password,
# which are written as %2F %3F %23.
URL_PATTERN = (
    r"amqps?://"
    r"([^/?#]*@)?"  # user:password@
    r"[^/?#@,]*"  # host:port
    r"(/[^/?#@,]*)?"  # /vhost
    r"(\?[^#@]*)?"  # ?parameters
)

# For what newcomers meet: a regular expression found in repr(error), and what to do about it. Where
# none is found, the error speaks for itself.
ADVICE = {
    "ConnectionRefused": "nothing listens there; start RabbitMQ",
    "gaierror|'idna'": "unknown host, or no name server answers",  # 'idna': host..name
    "StackTimeout|attempt timed": "no AMQP answer; is RabbitMQ booting or frozen?",
    # But where SSL has failed, its own words say more.
    "Incompatible(?!.*SSL)": "no AMQP answer; wrong port, or is RabbitMQ booting?",
    # A password that is not UTF-8 has surrogates, and must not be shown.
    "Login was refused|surrogates": "login refused; check the user and password in AMQP_URL",
    "inequivalent arg": "task_queue is there with other properties; use another vhost or delete it",
    "^NackError|BlockedTimeout": "the queue is full, or RabbitMQ is short of memory or disk",
}


def brokers():
    """Return (HOST:PORT, URL) for each broker in AMQP_URL, in random order, or exit.

    Random, so that many workers use all nodes of a cluster. They are tried one by one, since pika,
    if it is given a list, ends at the first unknown host.
    """
    urls = os.getenv("AMQP_URL", "").strip() or "amqp://localhost"
    found = []
    for url in re.split(r"\s*,\s*(?=amqps?://)", urls):
        try:
            parameters = parameters_of(url)
        except NotConnected as error:
            sys.exit(f"{SCRIPT}: {error}")
        except Exception:  # not shown, as it may quote the password
            sys.exit(f"{SCRIPT}: cannot use AMQP_URL; write amqp://user:password@host:port/vhost")
        found.append((f"{parameters.host}:{parameters.port}", url))
    random.shuffle(found)
    return found


def parameters_of(url):
    """Return Parameters; raise NotConnected if a certificate cannot be read, else ValueError."""
    if not re.fullmatch(URL_PATTERN, url):
        raise ValueError  # pika would take one part of it for another
    try:
        return Parameters(url)
    except OSError as error:
        raise NotConnected(f"cannot read a file that AMQP_URL names: {error}") from error


def connect(url):
    """Return a new connection, or raise NotConnected; what fails later is another AMQPError."""
    try:
        return pika.BlockingConnection(parameters_of(url))  # anew: files may be renewed
    except Exception as error:  # such as gaierror, SSLError or a timeout of pika's own
        raise NotConnected(reason(error)) from error


def reason(error):
    """Return what to print of an error: advice, or its own words."""
    if isinstance(error, NotConnected):
        return str(error)  # connect() has put the reason in
    for pattern, advice in ADVICE.items():
        if re.search(pattern, repr(error)):
            return advice
    return escaped(repr(error))


def set_up_output():
    """Show each line at once, and as an escape what the terminal's encoding lacks."""
    if hasattr(sys.stdout, "reconfigure"):  # not in IDLE, for example
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if sys.stderr is None:  # print() would take standard output instead
        sys.stderr = open(os.devnull, "w")


def printable(body):
    """Return the beginning of `body` (bytes) as text that is safe to print."""
    beginning = body[:4000]  # since to escape a huge body takes 50 times its memory
    return escaped(beginning.decode(errors="backslashreplace"))


def escaped(text):
    """Return the first thousand characters of `text`, escaped where a terminal would obey them."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text[:1000]
    )


if __name__ == "__main__":
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    main()
