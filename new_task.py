#!/usr/bin/env python
"""Send tasks to the durable RabbitMQ queue "task_queue", for worker.py to do.

    python new_task.py First message.   send the words as one task ("Hello World!" if none)
    python new_task.py -                send each line of standard input that is not blank

" [x] Sent" is printed once RabbitMQ has confirmed the task: from then on it survives a restart.
AMQP_URL=amqp[s]://user:password@host:port/vhost[,...] names RabbitMQ; unset, it is on localhost.
Exit status: 0 if every task is confirmed and shown, 1 if not, 130 after Ctrl+C. Help: --help, -h.
"""

import os
import random
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from socket import gethostname

import pika

ADVICE = {  # for what a newcomer meets; all else is told in RabbitMQ's or the system's own words
    "ConnectionRefused": "nothing listens there; start RabbitMQ",
    "^gaierror": "unknown host, or no name server answers",
    "StackTimeout|attempt timed|Incompatible": "no AMQP answer; is RabbitMQ booting or frozen?",
    "Login was refused": "login refused; check the user and password in AMQP_URL",
    "inequivalent arg": "task_queue is there with other properties; delete it or use another vhost",
    "^NackError|BlockedTimeout": "the queue is full, or RabbitMQ is short of memory or disk",
}


class Broker(pika.URLParameters):  # with other defaults, in seconds, which the URL may override
    DEFAULT_HEARTBEAT_TIMEOUT = 8  # pika gives up on a silent broker within 2 * (heartbeat + 5)
    DEFAULT_STACK_TIMEOUT = 10  # to connect to one address; localhost may have two
    DEFAULT_BLOCKED_CONNECTION_TIMEOUT = 20  # an alarm would be waited out, however long
    DEFAULT_CLIENT_PROPERTIES = {"connection_name": f"new_task.py {gethostname()} {os.getpid()}"}


def printable(text):
    """Return `text` on one line, with everything escaped that a terminal would act on."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def stdin_lines(connection):
    """Yield the lines of standard input that are not blank, as bytes without their ends."""
    pool, data, rest = ThreadPoolExecutor(max_workers=1), None, bytearray()
    while data != b"":
        chunk = pool.submit(sys.stdin.buffer.raw.read, 1 << 18)  # a typed line, or thousands
        while not wait([chunk], timeout=0.5).done:  # the input stalls, and heartbeats go on
            connection.process_data_events()
        if (data := chunk.result()) is None:  # nothing yet: another program made it non-blocking
            connection.sleep(0.1)
            continue
        rest += data or b"\n"  # the last line may lack its end
        if not data or b"\n" in data:
            *lines, rest = rest.split(b"\n")
            yield from (bytes(line).removesuffix(b"\r") for line in lines if line.strip())


def main():
    """Send what the command line says."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        return print(__doc__)
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    urls = re.split(r",\s*(?=amqp)", os.environ.get("AMQP_URL") or "amqp://guest:guest@localhost")
    try:
        brokers = [Broker(re.fullmatch(r"\s*(amqps?://.*?)\s*", url)[1]) for url in urls]
    except Exception:  # which may quote the password
        sys.exit("new_task.py: cannot use AMQP_URL; write amqp://user:password@host:port/vhost")
    broker, confirmed = brokers[0], 0
    try:
        for broker in random.sample(brokers, len(brokers)):
            try:
                connection = pika.BlockingConnection(broker)
                break
            except Exception as error:  # given the list, pika stops at an unknown host
                failure = error
        else:
            raise failure
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
        with suppress(pika.exceptions.AMQPError):  # all is confirmed, whatever happens now
            connection.close()
    except BaseException as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one line is enough
        why = next((ADVICE[key] for key in ADVICE if re.search(key, repr(error))), repr(error))
        fault = f"cannot send to {broker.host}:{broker.port}: {printable(why)}"
        print(f"new_task.py: {fault} (tasks confirmed: {confirmed})", file=sys.stderr)
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)  # which waits for no thread


if __name__ == "__main__":
    main()
