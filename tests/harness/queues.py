"""`task_queue`, or another queue, seen from outside the scripts."""

import contextlib

from tests.harness.waiting import wait_until


class Queue:
    """A queue of `broker`, through a connection of the tests' own for every look."""

    def __init__(self, broker, name="task_queue"):
        self.broker, self.name = broker, name

    @contextlib.contextmanager
    def channel(self):
        with self.broker.connect() as connection:
            yield connection.channel()

    def declare(self, durable=True, **options):
        """Declare it; return what RabbitMQ says of it."""
        with self.channel() as channel:
            return channel.queue_declare(self.name, durable=durable, **options).method

    def delete(self):
        with self.channel() as channel:
            channel.queue_delete(self.name)

    def publish(self, *bodies):
        """Put `bodies` (bytes) into the queue as any producer may."""
        with self.channel() as channel:
            for body in bodies:
                channel.basic_publish("", self.name, body)

    def take(self):
        """Take one task off; return (method, properties, body), or thrice None if there is none."""
        with self.channel() as channel:
            return channel.basic_get(self.name, auto_ack=True)

    def take_all(self):
        """Take every task off; return their bodies in order."""
        with self.channel() as channel:
            return list(iter(lambda: channel.basic_get(self.name, auto_ack=True)[2], None))

    def ready(self):
        """Return how many tasks wait for a worker (at once, while rabbitmqctl lags)."""
        return self.declare(passive=True).message_count

    def consumers(self):
        return self.declare(passive=True).consumer_count

    def wait_for_counts(self, ready, unacknowledged):
        """Wait until rabbitmqctl shows so many tasks that wait, and that are in hand."""
        columns = ("name", "messages_ready", "messages_unacknowledged")
        row = f"{self.name}\t{ready}\t{unacknowledged}\n"
        wait_until(
            lambda: row in self.broker.ctl("list_queues", *columns),
            f"{ready} ready and {unacknowledged} unacknowledged in rabbitmqctl list_queues",
        )
