"""Keep workers and a stream of numbered tasks going while faults strike at random, then count.

Lost is a task that was told as sent and never done; unexpected, one that was done and never sent.
The exit status is 0 if there is neither and no worker was down: each must outlive every fault but
a signal, and consume in the end. With --textbook the faults strike the tutorial's bare scripts; a
seed gives both the same sequence of faults. A worker that a fault has ended is counted as down, and
started anew, as systemd would. TEST_BROKER=docker|local chooses the broker.
"""

import argparse
import collections
import contextlib
import itertools
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import time

from tests.harness import brokers
from tests.harness.consoles import Console
from tests.harness.flow import Feeder, Flow
from tests.harness.proxy import WAYS, Proxy
from tests.harness.queues import Queue
from tests.harness.scripts import NEW_TASK, TUTORIAL, WORKER, done
from tests.harness.waiting import wait_until

OURS = [sys.executable, WORKER], [sys.executable, NEW_TASK, "-"]
# Its producer sends one task and ends, so a shell starts one for each line, until one fails.
EACH = f'while read -r task && {sys.executable} {TUTORIAL["new_task"]} "$task"; do :; done'
TUTORIALS = [sys.executable, TUTORIAL["worker"]], ["bash", "-c", EACH]


class Soak(Flow):
    """Workers and a producer, the broker and the proxy between them, and what faults do."""

    def __init__(self, worker, producer):
        super().__init__()
        self.worker, self.producer = worker, producer  # how to start them
        self.broker = brokers.choose()()
        self.proxy = Proxy(self.broker.port)
        self.running = []  # of all the workers
        self.ports = itertools.cycle([self.proxy.port, self.broker.port])
        self.down = 0  # workers that a fault has ended
        self.recoveries = []  # seconds after a fault until a task was done

    def begin(self):
        self.broker.start()
        self.running = [self.start_worker() for _ in range(4)]
        self.feeders.append(Feeder("task", self.start_producer))
        wait_until(self.last_done, "a task is done")

    def start(self, argv, **options):
        """Start a program whose connection goes through the proxy, or not, in turn."""
        url = self.broker.url(port=next(self.ports), query="heartbeat=4")
        return Console(*argv, env={"AMQP_URL": url}, **options)

    def start_worker(self):
        self.workers.append(self.start(self.worker))
        return self.workers[-1]

    def start_producer(self):
        return self.start(self.producer, stdin=subprocess.PIPE)

    def replace_ended(self):
        """Start a worker for each that a fault has ended."""
        for number, worker in enumerate(self.running):
            if worker.process.poll() is not None:
                self.down += 1
                self.running[number] = self.start_worker()

    def last_done(self):
        """Return when the last task was done (monotonic), or 0."""
        lines = [line for worker in self.workers for line in list(worker.lines)]
        return max((line.at for line in lines if line.text == " [x] Done"), default=0)

    def faults(self, number):
        """Yield the name of each fault, and a context: entered, it strikes; left, it is undone."""
        worker, producer = self.running[number], self.feeders[0].producers[-1]
        broker, proxy = self.broker, self.proxy
        yield "worker killed", at_once(self.replace, number, signal.SIGKILL)
        yield "worker ended by SIGTERM", at_once(self.replace, number, signal.SIGTERM)
        yield "worker ended by Ctrl+C", at_once(self.replace, number, signal.SIGINT)
        yield "worker frozen", frozen(worker)
        yield "producer killed", at_once(producer.kill)
        yield "producer frozen", frozen(producer)
        yield "connections reset", at_once(proxy.reset)
        yield "connections closed", at_once(broker.ctl, "close_all_connections", "soak")
        yield "black hole", proxy.black_hole()
        yield "half a black hole", proxy.black_hole(WAYS[number % 2])
        yield "slow network", proxy.slow(500)
        yield "broker stopped", away(broker, broker.stop)
        yield "broker killed", away(broker, broker.kill)
        yield "broker frozen", broker.frozen()
        yield "memory alarm", broker.alarm()

    def replace(self, number, signum):
        """End a worker by a signal, and start another in its place."""
        self.running[number].signal(signum)
        self.running[number].wait()
        self.running[number] = self.start_worker()

    def strike(self, chance):
        """Make one fault happen for a while, undo it, and wait until a task is done."""
        self.replace_ended()
        number = chance.randrange(len(self.running))
        name, fault = chance.choice(list(self.faults(number)))
        self.tell(f"{name} ({number})")
        with fault:
            time.sleep(chance.uniform(1, 10))
        over = time.monotonic()
        self.tell("it is over")
        wait_until(lambda: self.replace_ended() or self.last_done() > over, "a task is done", 90)
        self.recoveries.append(self.last_done() - over)

    def tell(self, what):
        counts = f"{len(self.sent())} sent, {len(self.lost())} not done"
        print(f"{time.monotonic():10.2f} {counts}: {what}", file=sys.stderr)

    def drain(self):
        """Let all heal, and wait until the queue is empty."""
        self.end()
        queue = Queue(self.broker)
        wait_until(
            lambda: self.replace_ended() or queue.consumers() == len(self.running),
            "all workers consume",
        )
        wait_until(lambda: queue.ready() == 0, "no task waits", timeout=600)
        queue.wait_for_counts(0, 0)
        self.replace_ended()

    def close(self):
        """End all that was started."""
        for feeder in self.feeders:
            feeder.ending.set()
            for producer in feeder.producers:
                producer.close()
        for worker in self.workers:
            worker.close()
        self.proxy.close()
        self.broker.close()

    def report(self):
        """Print what was counted, as rows of a table; return the exit status."""
        lost, unexpected = self.lost(), self.unexpected()
        times = collections.Counter(done(*self.workers))
        rows = {
            "faults": len(self.recoveries),
            "tasks told as sent": len(self.sent()),
            "**lost**": len(lost),
            "done and never sent": len(unexpected),
            "done more than once": sum(count > 1 for count in times.values()),
            "workers down after a fault": self.down,
            "until a task is done again, median": f"{statistics.median(self.recoveries):.1f} s",
            "until a task is done again, worst": f"{max(self.recoveries):.1f} s",
        }
        for name, figure in rows.items():
            print(f"| {name} | {figure} |")
        print(f"lost: {lost or 'none'}; never sent: {unexpected or 'none'}")
        return int(bool(lost or unexpected or self.down))

    def show(self):
        """Print what all consoles have shown, on standard error."""
        print(*self.workers, *self.feeders[0].producers, sep="\n", file=sys.stderr)


@contextlib.contextmanager
def frozen(console):
    os.killpg(console.process.pid, signal.SIGSTOP)  # with what a shell has started
    try:
        yield
    finally:
        os.killpg(console.process.pid, signal.SIGCONT)


@contextlib.contextmanager
def away(broker, end):
    end()
    yield
    broker.start()


@contextlib.contextmanager
def at_once(action, *given):
    action(*given)
    yield


def main():
    parser = argparse.ArgumentParser(prog="tests/soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long faults strike")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the faults")
    parser.add_argument("--textbook", action="store_true", help="strike the tutorial's scripts")
    options = parser.parse_args()
    print(brokers.choose().__name__, options, flush=True)
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # it reports each look at a closed port
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)  # what was started is ended
    chance = random.Random(options.seed)
    soak = Soak(*(TUTORIALS if options.textbook else OURS))
    try:
        soak.begin()
        until = time.monotonic() + options.seconds
        while time.monotonic() < until:
            soak.strike(chance)
            time.sleep(chance.uniform(0.5, 3))  # so that faults come at any moment
        soak.drain()
        status = soak.report()
        if status:
            soak.show()
        return status
    except Exception:  # such as a wait in vain
        soak.show()
        raise
    finally:
        soak.close()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
