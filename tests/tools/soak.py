"""Keep workers and a stream of numbered tasks going while faults strike at random, then count.

Lost is a task that was told as sent and never done; unexpected, one that was done and never given.
The exit status is 0 if there is neither and no worker was down: each must outlive every fault but
a signal, and consume in the end. With --textbook the faults strike the tutorial's bare scripts; a
seed gives both the same sequence of faults. A worker that a fault has ended is counted as down, and
started anew, as systemd would. TEST_BROKER=docker|local chooses the broker.

Each fault is told as it strikes, by the clock of what the consoles show: that is printed on
standard error if the status is not 0.
"""

import argparse
import contextlib
import itertools
import os
import random
import signal
import statistics
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
    """Workers and a producer, the broker and the proxies before it, and what faults do."""

    def __init__(self, worker, producer):
        super().__init__()
        self.worker, self.producer = worker, producer  # how to start them
        self.broker = brokers.choose()()
        self.proxy = Proxy(self.broker.port)
        # Through this a batch takes about a second, so that faults strike in the middle of one.
        self.narrow = Proxy(self.proxy.port)
        self.narrow.pace = 6000
        self.ports = itertools.cycle([self.proxy.port, self.broker.port])  # of the workers
        self.running = []  # of all the workers
        self.down = 0  # workers that a fault has ended
        self.recoveries = []  # seconds after a fault until a task was done

    def begin(self):
        self.broker.start()
        self.running = [self.start_worker() for _ in range(4)]
        self.feeder = Feeder("task", self.start_producer)
        self.feeders.append(self.feeder)
        wait_until(self.last_done, "a task is done")

    def start(self, argv, port, stdin=b""):
        url = self.broker.url(port=port, query="heartbeat=4")
        return Console(*argv, env={"AMQP_URL": url}, stdin=stdin)

    def start_worker(self):
        self.workers.append(self.start(self.worker, next(self.ports)))
        return self.workers[-1]

    def start_producer(self, lines):
        return self.start(self.producer, self.narrow.port, lines)

    def replace_ended(self):
        """Start a worker for each that a fault has ended."""
        for number, worker in enumerate(self.running):
            if worker.process.poll() is not None:
                tell(f"worker {number} is down")
                self.down += 1
                self.running[number] = self.start_worker()

    @contextlib.contextmanager
    def ended(self, number, signum):
        """End a worker by a signal, and start another in its place."""
        self.running[number].signal(signum)
        self.running[number].wait()
        self.running[number] = self.start_worker()
        yield

    def last_done(self):
        """Return when the last task was done (monotonic), or 0."""
        lines = [line for worker in self.workers for line in list(worker.lines)]
        return max((line.at for line in lines if line.text == " [x] Done"), default=0)

    def faults(self, number):
        """Return a context for each fault: entered, it strikes; left, it is undone."""
        producer = self.feeder.producer()
        broker = self.broker
        proxy = self.proxy
        return {
            "worker killed": self.ended(number, signal.SIGKILL),
            "worker ended by SIGTERM": self.ended(number, signal.SIGTERM),
            "worker ended by Ctrl+C": self.ended(number, signal.SIGINT),
            "worker frozen": frozen(self.running[number]),
            "producer killed": at_once(producer.kill),
            "producer frozen": frozen(producer),
            "connections reset": at_once(proxy.reset),
            "connections closed": at_once(broker.ctl, "close_all_connections", "soak"),
            "black hole": proxy.black_hole(),
            "half a black hole": proxy.black_hole(WAYS[number % 2]),
            "slow network": proxy.slow(500),
            "broker stopped": away(broker, broker.stop),
            "broker killed": away(broker, broker.kill_when_settled),
            "broker frozen": broker.frozen(),
            "memory alarm": broker.alarm(),
        }

    def strike(self, chance):
        """Make one fault happen for a while, undo it, and wait until a task is done."""
        self.replace_ended()
        number = chance.randrange(len(self.running))
        name, fault = chance.choice(list(self.faults(number).items()))
        tell(f"{name} ({number})")
        with fault:
            time.sleep(chance.uniform(1, 10))
        over = time.monotonic()
        wait_until(lambda: self.replace_ended() or self.last_done() > over, "a task is done", 90)
        self.recoveries.append(self.last_done() - over)
        tell(f"it is over, and a task was done {self.recoveries[-1]:.1f} s later")

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
        for one in self.feeders + self.workers:
            one.close()
        self.narrow.close()
        self.proxy.close()
        self.broker.close()

    def report(self):
        """Print what was counted, as rows of a table; return the exit status."""
        lost = self.lost()
        unexpected = self.unexpected()
        times_done = done(*self.workers)
        row("faults", len(self.recoveries))
        row("tasks told as sent", len(self.sent()))
        row("**lost**", len(lost))
        row("done and never given", len(unexpected))
        row("done again", len(times_done) - len(set(times_done)))
        row("workers down after a fault", self.down)
        row("until a task is done again, median", f"{statistics.median(self.recoveries):.1f} s")
        row("until a task is done again, worst", f"{max(self.recoveries):.1f} s")
        print("lost:", *lost)
        print("never given:", *unexpected)
        return int(bool(lost or unexpected or self.down))

    def show(self):
        """Print what all consoles have shown, on standard error."""
        print(*self.workers, sep="\n", file=sys.stderr)
        for feeder in self.feeders:
            print(*feeder.producers, sep="\n", file=sys.stderr)


def tell(what):
    print(f"{time.monotonic():10.2f} {what}", flush=True)


def row(name, figure):
    print(f"| {name} | {figure} |")


@contextlib.contextmanager
def frozen(console):
    signal_all(console, signal.SIGSTOP)
    yield
    signal_all(console, signal.SIGCONT)


def signal_all(console, signum):
    """Signal a program and what it has started, as a shell has, unless it ends by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(console.process.pid, signum)


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
