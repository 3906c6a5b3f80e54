"""The work queue with Celery: the worker's application, and with TEXT or - the client."""

import os
import sys
import time

from celery import Celery

app = Celery("celery_app", broker=os.environ["AMQP_URL"])
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    worker_redirect_stdouts=False,  # or what the tasks print becomes log records
    broker_transport_options={"confirm_publish": True},
)


@app.task(name="work")
def work(text):
    print(f" [x] Received {text}", flush=True)
    time.sleep(text.count("."))
    print(" [x] Done", flush=True)


if __name__ == "__main__":
    lines = sys.stdin if sys.argv[1:] == ["-"] else [" ".join(sys.argv[1:])]
    for line in lines:
        work.delay(line.rstrip("\n"))
        print(f" [x] Sent {line}", end="", flush=True)
