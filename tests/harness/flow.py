"""Numbered tasks that flow from producers to workers while things fail, and the account of them."""

import threading

from tests.harness.scripts import done
from tests.harness.waiting import wait_until

BATCH = 20  # tasks for one producer


class Feeder:
    """Gives a batch of numbered tasks to one producer after another, each when the last has ended.

    `start_producer` takes the lines of a batch as `stdin`, and returns a Console that sends them.
    """

    def __init__(self, name, start_producer):
        self.name, self.start_producer = name, start_producer
        self.given, self.producers = [], []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._feed, daemon=True)
        self.thread.start()

    def _feed(self):
        while not self.ending.wait(0.5):  # else a broker that is away has them start without end
            producer = self.start_producer(stdin=self._next_batch())
            self.producers.append(producer)
            producer.wait()

    def _next_batch(self):
        first = len(self.given)
        tasks = [f"{self.name} {number}" for number in range(first, first + BATCH)]
        tasks[-1] += "."  # every twentieth takes a second
        self.given += tasks
        return "".join(f"{task}\n" for task in tasks).encode()

    def producer(self):
        """Wait until a producer runs, and return it."""
        wait_until(lambda: self.producers[-1].process.poll() is None, "a producer runs")
        return self.producers[-1]

    @property
    def out(self):
        """The lines that its producers have shown, one for each task that is sent."""
        return [line for producer in list(self.producers) for line in producer.out]

    def end(self):
        """Give no more, and wait until the last batch is sent."""
        self.ending.set()
        self.thread.join()
        for producer in self.producers[-1:]:
            producer.wait()  # again, since the thread has ended if it waited in vain

    def close(self):
        """Give no more, and end what sends."""
        self.ending.set()
        while self.thread.is_alive():
            for producer in self.producers[-1:]:
                producer.kill()
            self.thread.join(0.1)


class Flow:
    """Feeders, all workers that have run, and the account of their tasks."""

    def __init__(self):
        self.workers, self.feeders = [], []

    def sent(self):
        """Return the tasks that were told as sent."""
        lines = [line for feeder in self.feeders for line in feeder.out]
        return {line.removeprefix(" [x] Sent ") for line in lines}

    def lost(self):
        """Return the tasks that were told as sent, and not done."""
        return self.sent() - set(done(*self.workers))

    def unexpected(self):
        """Return the tasks that were done, and never given to a producer."""
        given = {task for feeder in self.feeders for task in feeder.given}
        return set(done(*self.workers)) - given

    def end(self):
        for feeder in self.feeders:
            feeder.end()
