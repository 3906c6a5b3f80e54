"""The least that pika can do: send each line of standard input, or do tasks that ask for nothing.

floor.py -         publish and wait for the confirm, nothing else
floor.py worker    print the two lines and acknowledge, nothing else
"""

import os
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.queue_declare(queue="task_queue", durable=True)


def callback(ch, method, properties, body):
    print(f" [x] Received {body.decode()}", flush=True)
    print(" [x] Done", flush=True)
    ch.basic_ack(method.delivery_tag)


if sys.argv[1] == "worker":
    channel.basic_qos(prefetch_count=1)
    channel.basic_consume("task_queue", callback)
    channel.start_consuming()
else:
    channel.confirm_delivery()
    persistent = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
    for line in sys.stdin.buffer:
        channel.basic_publish("", "task_queue", line.rstrip(b"\n"), persistent)
    connection.close()
