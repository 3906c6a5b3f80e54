"""The least that pika can do to send lines: publish each, and wait for its confirm."""

import os
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.queue_declare(queue="task_queue", durable=True)
channel.confirm_delivery()
persistent = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
for line in sys.stdin.buffer:
    channel.basic_publish("", "task_queue", line.rstrip(b"\n"), persistent)
connection.close()
