"""The work queue with Dramatiq: the worker's application, and with TEXT or - the client."""

import os
import sys
import time

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

dramatiq.set_broker(RabbitmqBroker(url=os.environ["AMQP_URL"], confirm_delivery=True))


@dramatiq.actor
def work(text):
    out = sys.__stdout__  # sys.stdout is a pipe to Dramatiq's log
    print(f" [x] Received {text}", file=out, flush=True)
    time.sleep(text.count("."))
    print(" [x] Done", file=out, flush=True)


if __name__ == "__main__":
    lines = sys.stdin if sys.argv[1:] == ["-"] else [" ".join(sys.argv[1:])]
    for line in lines:
        work.send(line.rstrip("\n"))
        print(f" [x] Sent {line}", end="", flush=True)
