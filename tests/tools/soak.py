"""Keep workers and a stream of numbered tasks going while faults strike at random, then count.

Lost is a task that was told as sent and never done; unexpected, one that was done and never given.
The exit status is 0 if there is neither and no worker was down: each must outlive every fault but
a signal, and consume in the end. With --textbook the faults strike the tutorial's bare scripts; a
seed gives both the same sequence of faults. A worker that has ended is started anew, as systemd
would, and counted as down unless a signal was to end it. TEST_BROKER=docker|local chooses the
broker.

Each fault is told as it strikes, by the clock of what the consoles show: that is printed on
standard error if the status is not 0.
"""

import argparse
import contextlib
import itertools
import random
import signal
import sys
import time
from functools import partial

from tests.harness import brokers
from tests.harness.consoles import Console
from tests.harness.flow import Feeder, Flow
from tests.harness.proxy import WAYS, Proxy
from tests.harness.queues import Queue
from tests.harness.scripts import NEW_TASK, TUTORIAL, WORKER, done
from tests.harness.waiting import NotSeen, wait_until

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
        self.to_end = []  # workers that a signal was to end
        self.recoveries = []  # seconds from the end of a fault until a task was done

    def begin(self):
        self.broker.start()
        self.replace_ended()
        self.feeders = [Feeder("task", partial(self.start, self.producer, self.narrow.port))]

    def start(self, argv, port, stdin=b""):
        url = self.broker.url(port=port, query="heartbeat=4")
        return Console(*argv, env={"AMQP_URL": url}, stdin=stdin)

    def running(self):
        """Return the workers that run."""
        return [one for one in self.workers if one.process.poll() is None]

    def replace_ended(self):
        """Start workers until four run."""
        while len(self.running()) < 4:
            port = next(self.ports)
            self.workers.append(self.start(self.worker, port))

    def wait_for_work(self):
        """Wait until one more task is done; return how many seconds it took."""
        began = time.monotonic()
        before = len(done(*self.workers))
        wait_until(
            lambda: self.replace_ended() or len(done(*self.workers)) > before, "a task is done", 90
        )
        return round(time.monotonic() - began, 1)

    def faults(self, worker, way):
        """Return a context for each fault: entered, it strikes; left, it is undone."""
        producer = self.feeders[0].producer()
        broker, proxy = self.broker, self.proxy
        return {
            "worker ended by SIGKILL": made(worker.signal, signal.SIGKILL),
            "worker ended by SIGTERM": made(worker.signal, signal.SIGTERM),
            "worker ended by Ctrl+C": made(worker.ctrl_c),
            "worker frozen": frozen(worker),
            "producer killed": made(producer.kill),
            "producer frozen": frozen(producer),
            "connections reset": made(proxy.reset),
            "connections closed": made(broker.ctl, "close_all_connections", "soak"),
            "black hole": proxy.black_hole(),
            "half a black hole": proxy.black_hole(way),
            "slow network": proxy.slow(500),
            "broker stopped": made(broker.stop, undo=broker.start),
            "broker killed": made(broker.kill_when_settled, undo=broker.start),
            "broker frozen": broker.frozen(),
            "memory alarm": broker.alarm(),
        }

    def strike(self, chance):
        """Make one fault happen for a while, undo it, and wait until a task is done."""
        self.replace_ended()
        worker = chance.choice(self.running())
        faults = self.faults(worker, chance.choice(WAYS))
        name, fault = chance.choice(list(faults.items()))
        print(f"{time.monotonic():10.2f} {name}", flush=True)
        if "ended" in name:
            self.to_end.append(worker)
        with fault:
            time.sleep(chance.uniform(1, 10))
        self.recoveries.append(self.wait_for_work())

    def drain(self):
        """Let all heal, and wait until the queue is empty."""
        self.end()
        queue = Queue(self.broker)
        wait_until(lambda: self.replace_ended() or queue.consumers() == 4, "all workers consume")
        queue.wait_for_counts(0, 0)

    def close(self):
        """End all that was started."""
        for one in [*self.feeders, *self.workers, self.narrow, self.proxy, self.broker]:
            one.close()

    def report(self):
        """Print what was counted, as rows of a table; fail if there is what must not be."""
        lost = self.lost()
        unexpected = self.unexpected()
        times_done = done(*self.workers)
        down = len({*self.workers} - {*self.running(), *self.to_end})
        row("faults", len(self.recoveries))
        row("tasks told as sent", len(self.sent()))
        row("**lost**", len(lost))
        row("done and never sent", len(unexpected))
        row("done more than once", len(times_done) - len(set(times_done)))
        row("workers down after a fault", down)
        row("seconds from a fault's end to the next task done, at worst", max(self.recoveries))
        if lost or unexpected or down:
            raise NotSeen(f"all is well (lost: {lost}, never sent: {unexpected}, down: {down})")


def row(name, figure):
    print(f"| {name} | {figure} |")


@contextlib.contextmanager
def made(strike, *given, undo=None):
    strike(*given)
    yield
    if undo:
        undo()


@contextlib.contextmanager
def frozen(console):
    console.signal(signal.SIGSTOP)
    yield
    console.signal(signal.SIGCONT)


def main():
    parser = argparse.ArgumentParser(prog="tests/soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long faults strike")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the faults")
    parser.add_argument("--textbook", action="store_true", help="strike the tutorial's scripts")
    options = parser.parse_args()
    print(brokers.choose().__name__, options, flush=True)
    # A shell that starts us in the background has us ignore Ctrl+C, and our consoles would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chance = random.Random(options.seed)
    with contextlib.closing(Soak(*(TUTORIALS if options.textbook else OURS))) as soak:
        soak.begin()
        try:
            soak.wait_for_work()
            until = time.monotonic() + options.seconds
            while time.monotonic() < until:
                soak.strike(chance)
                time.sleep(chance.uniform(0.5, 3))  # so that faults come at any moment
            soak.drain()
            soak.report()
        except Exception:
            print(*soak.workers, *soak.feeders[0].producers, sep="\n", file=sys.stderr)
            raise


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
