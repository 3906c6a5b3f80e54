#!/usr/bin/env python
"""Send tasks to the durable queue "task_queue"; "Sent" means that RabbitMQ has confirmed one.

Usage: python new_task.py First message.   sends the words as one task ("Hello World!" if none)
       python new_task.py -                sends each line of standard input that is not blank
AMQP_URL=amqp[s]://user:password@host:port/vhost[,...] names RabbitMQ; unset, it is on localhost.
Exit status: 0 if every task is confirmed and shown, 1 if not, 130 after Ctrl+C. Help: --help, -h.
"""

import os
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from socket import gethostname

import pika


def send(broker):
    """Send what the command line says; raise AMQPError, from a cause if there is no connection."""
    try:
        connection = pika.BlockingConnection(broker)
    except Exception as error:  # such as gaierror, SSLError or a timeout of pika's own
        raise pika.exceptions.AMQPConnectionError(error) from error
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
            mandatory=True,  # else RabbitMQ confirms what reaches no queue
        )
        broker.confirmed += 1
        print(f" [x] Sent {shown(body[:4000].decode(errors='backslashreplace'))}")
    with suppress(pika.exceptions.AMQPError):  # all is confirmed, whatever happens now
        connection.close()


def main():
    """Send to the first broker that takes a connection; print why not all is sent."""
    if hasattr(sys.stdout, "reconfigure"):  # not in IDLE, for example
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.stderr = sys.stderr or open(os.devnull, "w")  # print(file=None) would use stdout
    urls = re.split(r"\s*,\s*(?=amqp)", os.getenv("AMQP_URL", "").strip() or "amqp://localhost")
    try:  # pika would misread other URLs
        found = [Broker(re.fullmatch(r"amqps?://[^/?#]*/?[^/?#@]*(\?[^#@]*)?", u)[0]) for u in urls]
    except Exception:  # not shown, as it may quote the password
        sys.exit("new_task.py: cannot use AMQP_URL; write amqp://user:password@host:port/vhost")
    sys.excepthook = lambda *e, tell=sys.excepthook: (tell(*e), os._exit(1))  # waits for no thread
    for broker in random.sample(found, len(found)):
        try:
            return send(broker)
        except KeyboardInterrupt:
            fault, status = "interrupted", 130
            break
        except pika.exceptions.AMQPError as error:
            why = next((ADVICE[k] for k in ADVICE if re.search(k, repr(error))), shown(repr(error)))
            fault, status = f"cannot send to {broker.host}:{broker.port}: {why}", 1
            if not error.__cause__:  # there was a connection, and some may be sent
                break
    print(f"new_task.py: {fault} (tasks confirmed: {broker.confirmed})", file=sys.stderr)
    os._exit(status)  # without waiting for the thread that reads standard input


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


def shown(text):
    """Return the first thousand characters of `text`, escaped where a terminal would obey them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:1000])


class Broker(pika.URLParameters):  # own defaults, in seconds; the URL may override them
    DEFAULT_HEARTBEAT_TIMEOUT = 8  # pika gives up on a silent broker within 2 * (heartbeat + 5)
    DEFAULT_STACK_TIMEOUT = 10  # to connect to one address; localhost may have two
    DEFAULT_BLOCKED_CONNECTION_TIMEOUT = 20  # else a publish waits as long as an alarm
    DEFAULT_CLIENT_PROPERTIES = {"connection_name": f"new_task.py {gethostname()} {os.getpid()}"}
    confirmed = 0  # tasks so far


ADVICE = {  # for what newcomers meet; other faults are shown in RabbitMQ's or the system's words
    "ConnectionRefused": "nothing listens there; start RabbitMQ",
    "gaierror|'idna'": "unknown host, or no name server answers",
    "StackTimeout|attempt timed|Incompatible": "no AMQP answer; is RabbitMQ booting or frozen?",
    "Login was refused|surrogates": "login refused; check the user and password in AMQP_URL",
    "inequivalent arg": "task_queue is there with other properties; delete it or use another vhost",
    "^NackError|BlockedTimeout": "the queue is full, or RabbitMQ is short of memory or disk",
}

if __name__ == "__main__":
    print(__doc__) if sys.argv[1:2] in (["-h"], ["--help"]) else main()
