#!/usr/bin/env python
"""Send tasks to the durable queue "task_queue"; "Sent" means that RabbitMQ has confirmed one.

Usage: python new_task.py First message.   sends the words as one task ("Hello World!" if none)
       python new_task.py -                sends each line of standard input that is not blank
AMQP_URL=amqp[s]://user:password@host:port/vhost[,...] names RabbitMQ; unset, it is on localhost.
Exit status: 0 if every task is confirmed and shown, 130 after Ctrl+C, otherwise not 0. If not 0,
one task more than the "tasks confirmed" may have arrived.
Help: --help, -h.
"""

import os
import queue
import random
import re
import sys
import threading
import time
from contextlib import suppress
from socket import gethostname

import pika

SCRIPT = "new_task.py"

confirmed = 0  # tasks so far


# The tutorial's listing, and what makes sure that each task arrives.
def send(url):
    """Send what the command line says; raise NotConnected or, once connected, another AMQPError."""
    global confirmed
    connection = connect(url)  # a pika.BlockingConnection
    channel = connection.channel()

    channel.queue_declare(queue="task_queue", durable=True)
    channel.confirm_delivery()  # basic_publish() now waits until RabbitMQ has the task, or raises

    message = " ".join(sys.argv[1:]) or "Hello World!"
    if message == "-":
        messages = stdin_lines(connection)  # which keeps the connection alive between lines
    else:
        messages = [os.fsencode(message)]  # the bytes that were typed, UTF-8 or not
    for message in messages:  # in bytes
        channel.basic_publish(
            exchange="",
            routing_key="task_queue",
            body=message,
            properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
            mandatory=True,  # else RabbitMQ confirms a task, and drops it, if the queue is gone
        )
        confirmed += 1
        print(f" [x] Sent {printable(message)}")
    with suppress(pika.exceptions.AMQPError):  # all is confirmed, whatever happens now
        connection.close()


def main():
    """Send to the first broker that can be reached; say why if none can, or if it is lost."""
    set_up_output()
    for place, url in brokers():
        try:
            send(url)
            return
        except KeyboardInterrupt:
            give_up("interrupted", status=130)
        except pika.exceptions.AMQPError as error:
            fault = f"cannot send to {place}: {reason(error)}"
            if not isinstance(error, NotConnected):
                break  # this broker may have some tasks; the next would get them again
    give_up(fault, status=1)


def give_up(fault, status):
    """Print the fault, and how much was sent before; exit with `status`."""
    print(f"{SCRIPT}: {fault} (tasks confirmed: {confirmed})", file=sys.stderr)
    os._exit(status)  # sys.exit() would wait for the thread in which pika looks names up


def stdin_lines(connection):
    """Yield the lines of standard input that are not blank, as bytes without their ends."""
    unfinished = bytearray()
    for chunk in stdin_chunks(connection):
        unfinished += chunk
        if b"\n" in chunk:  # to split a huge line at each chunk would be slow
            *lines, unfinished = unfinished.split(b"\n")
            for line in lines:
                if line.strip():
                    yield bytes(line.removesuffix(b"\r"))


def stdin_chunks(connection):
    """Yield what standard input gives, and a line end last; keep the connection alive meanwhile."""
    chunks = queue.Queue(maxsize=1)  # of bytes; at last b"", or the exception that reading raised
    threading.Thread(target=read_stdin, args=(chunks,), daemon=True).start()
    while True:
        connection.process_data_events()  # keep heartbeats going, even if no line comes or ends
        try:
            chunk = chunks.get(timeout=0.5)
        except queue.Empty:
            continue
        if isinstance(chunk, BaseException):
            raise chunk
        if not chunk:
            yield b"\n"  # the last line may lack its own
            return
        yield chunk


def read_stdin(chunks):
    """Put what standard input gives into `chunks`, then b""; if it raises, the exception."""
    try:
        while True:
            chunk = sys.stdin.buffer.raw.read(1 << 18)  # raw: returns what is there
            if chunk is None:  # nothing yet: another program has made it non-blocking
                time.sleep(0.1)
                continue
            chunks.put(chunk)
            if not chunk:
                return
    except BaseException as error:
        chunks.put(error)


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
    if sys.argv[1:2] in (["-h"], ["--help"]):  # not argparse: a task may begin with a dash
        print(__doc__)
    else:
        main()
