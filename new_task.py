#!/usr/bin/env python
"""Send tasks to the durable RabbitMQ queue "task_queue", for worker.py to do.

    python new_task.py First message.   send the words as one task ("Hello World!" if none)
    python new_task.py -                send each line of standard input, blank ones skipped
    python new_task.py --help           show this help (or -h)

" [x] Sent" is printed once RabbitMQ has confirmed the task: from then on it survives a restart.
AMQP_URL says where RabbitMQ is: amqp://user:password@host:port/vhost, or amqps:// for TLS; for a
cluster several, separated by commas, tried in order. Unset: amqp://guest:guest@localhost:5672/%2F
Exit status: 0 all is confirmed; 1 it is not, and standard error says why; 130 after Ctrl+C.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends even the imports without a traceback

import logging
import os
import queue
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
    "BlockedTimeout": "a memory or disk alarm stops publishers; free some, then send again",
    "NackError": "the queue is full, or its cluster without a majority; send again later",
    "UnroutableError": "the queue was deleted; send again",
}


class Broker(pika.URLParameters):
    """An AMQP URL, with times in seconds that tell any failure within half a minute."""

    DEFAULT_HEARTBEAT_TIMEOUT = 8  # pika sees a silent broker within 2 * (heartbeat + 5)
    DEFAULT_STACK_TIMEOUT = 10  # to connect to one address; localhost may have two
    DEFAULT_BLOCKED_CONNECTION_TIMEOUT = 20  # an alarm would be waited out, however long
    DEFAULT_CLIENT_PROPERTIES = {"connection_name": f"new_task.py {gethostname()} {os.getpid()}"}


def connect(brokers):
    """Return a connection to the first broker that takes one; raise what the last one raised."""
    for broker in brokers:
        try:
            return pika.BlockingConnection(broker)
        except Exception as error:  # given the list, pika would not go on after an unknown host
            reason = error
    raise reason


def stdin_lines(connection):
    """Yield the lines of standard input that are not blank, as bytes without their ends."""
    chunks, parts = queue.Queue(maxsize=4), []  # bounded, so that any input fits into memory
    if not sys.stdin:
        raise OSError("standard input is closed")
    stdin = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)

    def read():
        try:
            while (chunk := stdin.read(1 << 18)) != b"":  # a typed line, or thousands
                if chunk is None:  # nothing, and another program has made it non-blocking
                    time.sleep(0.1)
                else:
                    chunks.put(chunk)
            chunks.put(chunk)
        except OSError as error:
            chunks.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        connection.process_data_events()  # heartbeats go on, whatever the input does
        try:
            chunk = chunks.get(timeout=1)
        except queue.Empty:
            continue
        if isinstance(chunk, OSError):
            raise chunk
        parts.append(chunk or b"\n")
        if b"\n" in parts[-1]:
            *lines, rest = b"".join(parts).split(b"\n")
            yield from (line.removesuffix(b"\r") for line in lines if line.strip())
            parts = [rest]
        if not chunk:
            return


def main() -> int:
    """Send what the command line says; return the exit status."""
    words = sys.argv[1:]
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")
    if words == ["-"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # to tell what is confirmed
    logging.getLogger("pika").addHandler(logging.NullHandler())  # its errors are told below
    confirmed, step = 0, "use AMQP_URL"
    try:
        urls = os.environ.get("AMQP_URL") or "amqp://guest:guest@localhost:5672/%2F"
        brokers = [Broker(re.fullmatch(URL, url)[0]) for url in re.split(r",\s*(?=amqp)", urls)]
        send = step = "send to " + " or ".join(f"{broker.host}:{broker.port}" for broker in brokers)
        connection = connect(brokers)
        channel = connection.channel()
        channel.queue_declare(queue="task_queue", durable=True)
        channel.confirm_delivery()
        message = os.fsencode(" ".join(words)) or b"Hello World!"
        for body in stdin_lines(connection) if words == ["-"] else [message]:
            channel.basic_publish(
                exchange="",
                routing_key="task_queue",
                body=body,
                properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
                mandatory=True,
            )
            confirmed, step = confirmed + 1, "write to standard output"
            text = body.decode(errors="backslashreplace")
            if not text.isprintable():
                text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
            print(f" [x] Sent {text}", flush=True)
            step = send
        connection.close()
        return 0
    except KeyboardInterrupt:
        status, why = 130, "interrupted"
    except Exception as error:
        known = [tip for sign, tip in ADVICE.items() if re.search(sign, f"{step} {error!r}")]
        if reply := getattr(error, "reply_text", ""):  # RabbitMQ's own words
            known.insert(0, reply)
        reason = "; ".join(known) or f"{type(error).__name__}: {str(error) or error.args}"
        status, why = 1, f"cannot {step}: {' '.join(reason.split())}"
    sys.stdout = None  # or the interpreter, too, complains of what it could not write
    if words == ["-"]:
        why += f" ({confirmed} tasks confirmed)"
    print(f"new_task.py: {why}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
