"""The work queue with aio-pika: aio.py worker, aio.py TEXT, or aio.py - for lines from stdin."""

import asyncio
import os
import sys

import aio_pika


async def send(channel, text):
    message = aio_pika.Message(text.encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
    await channel.default_exchange.publish(message, "task_queue")
    print(f" [x] Sent {text}", flush=True)


async def work(queue):
    async with queue.iterator() as messages:
        async for message in messages:
            async with message.process():
                print(f" [x] Received {message.body.decode()}", flush=True)
                await asyncio.sleep(message.body.count(b"."))
                print(" [x] Done", flush=True)


async def main():
    async with await aio_pika.connect_robust(os.environ["AMQP_URL"]) as connection:
        channel = await connection.channel()  # with publisher confirms
        await channel.set_qos(prefetch_count=1)
        queue = await channel.declare_queue("task_queue", durable=True)
        if sys.argv[1:] == ["worker"]:
            await work(queue)
        else:
            for line in sys.stdin if sys.argv[1:] == ["-"] else sys.argv[1:]:
                await send(channel, line.rstrip("\n"))


asyncio.run(main())
