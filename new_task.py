#!/usr/bin/env python
"""Send tasks to the durable RabbitMQ queue "task_queue", for worker.py to do.

    python new_task.py First message.   send the words as one task ("Hello World!" if none)
    python new_task.py -                send each line of standard input that is not blank

" [x] Sent" is printed once RabbitMQ has confirmed the task: from then on it survives a restart.
AMQP_URL says where RabbitMQ is: amqp://user:password@host:port/vhost, or amqps:// for TLS; for a
cluster several, separated by commas. Unset: amqp://guest:guest@localhost:5672/%2F
Exit status: 0 if every task is confirmed, 1 if not, 130 after Ctrl+C. This help: -h or --help.
"""

import os
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from socket import gethostname

import pika

ADVICE = {  # for what a newcomer meets; all else is told in RabbitMQ's or the system's own words
    "ConnectionRefused": "nothing listens there; start RabbitMQ",
    "gaierror": "unknown host, or no name server answers",
    "StackTimeout": "no answer; is RabbitMQ frozen, or the network down?",
    "Login was refused": "login refused; check the user and password in AMQP_URL",
    "inequivalent arg": "task_queue is there with other properties; delete it or use another vhost",
    "Nack|BlockedTimeout": "the queue is full, or RabbitMQ short of memory or disk; try later",
}


class Broker(pika.URLParameters):  # the times, in seconds, tell any failure within half a minute
    DEFAULT_HEARTBEAT_TIMEOUT = 8  # pika gives a silent broker up within 2 * (heartbeat + 5)
    DEFAULT_STACK_TIMEOUT = 10  # to connect to one address; localhost may have two
    DEFAULT_BLOCKED_CONNECTION_TIMEOUT = 20  # an alarm would be waited out, however long
    DEFAULT_CLIENT_PROPERTIES = {"connection_name": f"new_task.py {gethostname()} {os.getpid()}"}


def printable(text):
    """Return `text` on one line, with what a terminal would obey escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def connect(brokers):
    """Return a connection to the first of `brokers` that takes one; raise what the last raised."""
    for broker in brokers:
        try:
            return pika.BlockingConnection(broker)
        except Exception as error:  # given the list, pika would not go on after an unknown host
            reason = error
    raise reason


def stdin_lines(connection):
    """Yield the lines of standard input that are not blank, as bytes without their ends."""
    pool, rest = ThreadPoolExecutor(max_workers=1), bytearray()
    while True:
        chunk = pool.submit(sys.stdin.buffer.read1, 1 << 18)  # a typed line, or thousands
        while not chunk.done():
            try:
                chunk.exception(timeout=0.5)
            except TimeoutError:  # the input stalls, and heartbeats go on
                connection.process_data_events()
        data = chunk.result()
        rest += data or b"\n"  # the last line may lack its end
        if not data or b"\n" in data:
            *lines, rest = rest.split(b"\n")
            yield from (bytes(line).removesuffix(b"\r") for line in lines if line.strip())
        if not data:
            return


def main():
    """Send what the command line says."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        return print(__doc__.strip())
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    urls = os.environ.get("AMQP_URL") or "amqp://guest:guest@localhost:5672/%2F"
    try:
        brokers = [Broker(re.fullmatch(r"\s*(amqps?://.*?)\s*", url)[1]) for url in urls.split(",")]
    except Exception:  # which may quote the password
        sys.exit("new_task.py: cannot use AMQP_URL; write amqp://user:password@host:port/vhost")
    confirmed = 0
    try:
        connection = connect(random.sample(brokers, len(brokers)))
        channel = connection.channel()
        channel.queue_declare(queue="task_queue", durable=True)
        channel.confirm_delivery()
        message = " ".join(sys.argv[1:]) or "Hello World!"
        for body in stdin_lines(connection) if message == "-" else [os.fsencode(message)]:
            channel.basic_publish(
                exchange="",
                routing_key="task_queue",
                body=body,
                properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
                mandatory=True,
            )
            confirmed += 1
            print(f" [x] Sent {printable(body.decode(errors='backslashreplace'))}")
        connection.close()
    except BaseException as error:
        why = next((ADVICE[key] for key in ADVICE if re.search(key, repr(error))), repr(error))
        places = " or ".join(f"{broker.host}:{broker.port}" for broker in brokers)
        fault = f"cannot send to {places}: {printable(why)} (tasks confirmed: {confirmed})"
        print(f"new_task.py: {fault}", file=sys.stderr)
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)  # which waits for no thread


if __name__ == "__main__":
    main()
