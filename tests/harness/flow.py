"""Numbered tasks that flow from producers to workers while things fail, and the account of them."""

import contextlib
import threading

from tests.harness.scripts import done


class Feeder:
    """Types numbered tasks into a producer, at most 20 a second, each when the last one is sent.

    `start_producer` returns a Console that sends each line of its standard input. When it has
    ended, another is started. `process` and `out` are those of a Console.
    """

    def __init__(self, name, start_producer):
        self.name, self.start_producer = name, start_producer
        self.given, self.producers = [], []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._feed, daemon=True)
        self.thread.start()

    def _feed(self):
        while not self.ending.is_set():
            producer, typed = self.start_producer(), 0
            self.producers.append(producer)
            with contextlib.suppress(BrokenPipeError), producer.stdin:
                while producer.process.poll() is None and not self.ending.wait(0.05):
                    if len(producer.out) == typed:
                        producer.type(f"{self._next_task()}\n")
                        typed += 1

    def _next_task(self):
        number = len(self.given)
        work = "." if number % 20 == 0 else ""  # every twentieth task takes a second
        self.given.append(f"{self.name} {number}{work}")
        return self.given[-1]

    @property
    def process(self):
        """The process of its producer."""
        return self.producers[-1].process

    @property
    def out(self):
        """The lines that its producers have shown, one for each task that is sent."""
        return [line for producer in list(self.producers) for line in producer.out]

    def end(self):
        """Give no more, and wait until what was given is sent."""
        self.ending.set()
        self.thread.join()
        for producer in self.producers:
            producer.wait()


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
