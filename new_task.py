#!/usr/bin/env python
"""Send tasks to the durable queue "task_queue"; "Sent" means that RabbitMQ has confirmed one.

Usage: python new_task.py First message.   sends the words as one task ("Hello World!" if none)
       python new_task.py -                reads standard input to its end, then sends each line
                                           that is not blank
AMQP_URL=amqp[s]://user:password@host:port/vhost names RabbitMQ; for a cluster, give several such
URLs, separated by commas. Unset, RabbitMQ is on localhost.
Exit status: 0 if all tasks are confirmed and printed, 130 after Ctrl+C, otherwise 1.
When a connection is lost, the task on its way may have arrived or not. If it is then sent again,
to the next broker or by you, it may be done more than once.
Help: --help, -h.
"""

import os
import random
import re
import sys
from contextlib import suppress
from socket import gethostname
from urllib.parse import urlsplit

import pika

SCRIPT = "new_task.py"

confirmed = 0  # tasks so far


def send(url, lines):
    """Send the words of the command line as one task; if they are "-", each of `lines` (bytes).

    Raise AMQPError if the broker at `url` is lost, or does not take a task. main() then calls this
    again for the next broker.
    """
    global confirmed
    connection = connect(url)  # a pika.BlockingConnection
    channel = connection.channel()

    channel.queue_declare(queue="task_queue", durable=True)
    channel.confirm_delivery()  # basic_publish() now waits until RabbitMQ has the task, or raises

    message = " ".join(sys.argv[1:]) or "Hello World!"
    tasks = lines if message == "-" else [os.fsencode(message)]  # the bytes that were typed
    for message in tasks[confirmed:]:  # those that no broker has confirmed yet
        channel.basic_publish(
            exchange="",
            routing_key="task_queue",
            body=message,
            properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
            mandatory=True,  # without this, RabbitMQ drops, and confirms, what no queue takes
        )
        confirmed += 1
        print(f" [x] Sent {printable(message)}")
    with suppress(pika.exceptions.AMQPError):  # all is confirmed: closing may fail
        connection.close()


# --- The tutorial ends here. What follows keeps it going where things fail. ---


def main():
    """Try each broker once, until all is confirmed; return the exit status."""
    set_up_output()
    known = brokers()
    try:
        lines = stdin_lines() if sys.argv[1:] == ["-"] else []
        for address, url in known:
            try:
                send(url, lines)
                return 0
            except pika.exceptions.AMQPError as error:
                tell(f"cannot send to {address}: {reason(error)}")
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    except OSError as error:
        tell(f"cannot read standard input or write standard output: {error}")
    return 1


def stdin_lines():
    """Return the lines of standard input that are not blank, as bytes without their ends."""
    return [line.rstrip(b"\r\n") for line in sys.stdin.buffer if line.strip()]


def tell(fault):
    """Print what has gone wrong, and how much was sent before."""
    print(f"{SCRIPT}: {fault} (tasks confirmed: {confirmed})", file=sys.stderr)


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
    if sys.argv[1:] in (["-h"], ["--help"]):  # not argparse: a task may begin with a dash
        print(__doc__)
        sys.exit()
    status = main()
    if status:
        os._exit(status)  # sys.exit() would wait while pika still looks up a host, up to a minute
