"""A work queue in the tutorial's bare style, with switches that leave one safeguard out.

bare.py worker [--auto-ack] [--no-prefetch] [--queue NAME] [--transient-queue]
bare.py new_task [--no-confirms] [--transient] [--queue NAME] [--transient-queue] TEXT
"""

import argparse
import os
import time

import pika

parser = argparse.ArgumentParser()
parser.add_argument("role", choices=["worker", "new_task"])
parser.add_argument("text", nargs="?", default="Hello World!")
parser.add_argument("--queue", default="task_queue")
for switch in ("--auto-ack", "--no-prefetch", "--no-confirms", "--transient", "--transient-queue"):
    parser.add_argument(switch, action="store_true")
given = parser.parse_intermixed_args()

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.queue_declare(queue=given.queue, durable=not given.transient_queue)


def callback(ch, method, properties, body):
    print(f" [x] Received {body.decode()}", flush=True)
    time.sleep(body.count(b"."))
    print(" [x] Done", flush=True)
    if not given.auto_ack:
        ch.basic_ack(delivery_tag=method.delivery_tag)


if given.role == "worker":
    if not given.no_prefetch:
        channel.basic_qos(prefetch_count=1)
    channel.basic_consume(given.queue, on_message_callback=callback, auto_ack=given.auto_ack)
    print(" [*] Waiting for messages. To exit press CTRL+C", flush=True)
    channel.start_consuming()
else:
    if not given.no_confirms:
        channel.confirm_delivery()
    mode = pika.DeliveryMode.Transient if given.transient else pika.DeliveryMode.Persistent
    channel.basic_publish(
        exchange="",
        routing_key=given.queue,
        body=given.text,
        properties=pika.BasicProperties(delivery_mode=mode),
        mandatory=not given.no_confirms,
    )
    print(f" [x] Sent {given.text}", flush=True)
    connection.close()
