"""Measure the two scripts beside the tutorial's bare code and what else a user could pick.

The contestants run in turn, round after round (A B C, A B C), against one broker, all of them with
persistent messages, late acknowledgement and a prefetch of one. Workers write to a pipe, and what
they print is stamped here, the same way for all. "floor" is the least that pika can do.
"""

import argparse
import contextlib
import logging
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from tests.harness import brokers
from tests.harness.consoles import Console, file_of
from tests.harness.queues import Queue
from tests.harness.scripts import NEW_TASK, PEERS, WORKER
from tests.harness.waiting import wait_until

QUEUES = ("task_queue", "celery", "default", "default.DQ", "default.XQ")
RECEIVED, DONE = " [x] Received", " [x] Done"


class Contestant(NamedTuple):
    """What Python runs in the folder `peers`: to send a text, to send lines, to do tasks."""

    one: str
    many: str
    worker: str
    queue: str = "task_queue"


CELERY_WORKER = "-m celery --quiet -A celery_app worker -P prefork -c 1 -l ERROR -n NUMBER"
DRAMATIQ_WORKER = "-m dramatiq --processes 1 --threads 1 --skip-logging dramatiq_app"
OURS = f"../../../{NEW_TASK}"
CONTESTANTS = {
    "ours": Contestant(OURS, f"{OURS} -", f"../../../{WORKER}"),
    "tutorial": Contestant("tutorial_new_task.py", "floor.py -", "tutorial_worker.py"),
    "aio-pika": Contestant("aio.py", "aio.py -", "aio.py worker"),
    "Celery": Contestant("celery_app.py", "celery_app.py -", CELERY_WORKER, "celery"),
    "Dramatiq": Contestant("dramatiq_app.py", "dramatiq_app.py -", DRAMATIQ_WORKER, "default"),
    "floor": Contestant("floor.py", "floor.py -", "floor.py worker"),
}


class Bench:
    """A broker with empty queues, one of the contestants, and what is running of it."""

    def __init__(self, broker, who):
        self.who = who
        self.queue = Queue(broker, who.queue)
        url = brokers.Broker.url(broker)  # of one node of a cluster: not all take several
        self.env = {**os.environ, "AMQP_URL": url, "dramatiq_queue_prefetch": "1"}
        self.consoles = []
        for name in QUEUES:
            Queue(broker, name).delete()

    def start(self, words, stdin=b""):
        argv = [sys.executable, *words.split()]
        self.consoles.append(Console(*argv, env=self.env, cwd=PEERS, stdin=stdin))
        return self.consoles[-1]

    def run(self, words, lines=b""):
        """Run a client to its end; return how many seconds it took."""
        argv = [sys.executable, *words.split()]
        null = subprocess.DEVNULL
        with file_of(lines) as stdin:
            began = time.perf_counter()
            subprocess.run(argv, env=self.env, cwd=PEERS, stdin=stdin, stdout=null, check=True)
            return time.perf_counter() - began

    def workers(self, count):
        """Start workers, and return them when all of them consume."""
        self.run(self.who.many, b"first\n")  # so that the queue is there
        words = self.who.worker
        found = [self.start(words.replace("NUMBER", f"{number}")) for number in range(count)]
        wait_until(lambda: self.queue.consumers() == count, "all workers consume")
        wait_until(lambda: any(stamps(one, DONE) for one in found), "the first task is done")
        return found

    def close(self):
        for console in self.consoles:
            console.close()


def stamps(worker, start):
    """Return when the worker has printed the lines that start so."""
    return [line.at for line in list(worker.lines) if line.text.startswith(start)]


# --- What is measured: each returns a figure, and its docstring says what that is ---


def one_sent(bench):
    """one task sent by a new process, ms"""
    bench.run(bench.who.one + " first")  # so that the queue is there
    return 1000 * bench.run(bench.who.one + " Hello")


def many_sent(bench):
    """tasks sent and confirmed, per second"""
    one = bench.run(bench.who.many, b"task\n")
    more = bench.run(bench.who.many, b"task\n" * 5001)
    return 5000 / (more - one)


def many_done(bench):
    """tasks without work done by a worker, per second"""
    bench.run(bench.who.many, b"task\n" * 5000)
    [worker] = bench.workers(1)
    wait_until(lambda: len(stamps(worker, DONE)) == 5001, "all are done", 600, poll=0.5)
    at = stamps(worker, DONE)[500:]  # in full swing
    return (len(at) - 1) / (at[-1] - at[0])


def memory(bench):
    """memory of an idle worker, MiB"""
    [worker] = bench.workers(1)
    family = brokers.run("ps", "-o", "rss=", "--sid", str(worker.process.pid))
    return sum(int(size) for size in family.split()) / 1024


def picked_up(bench):
    """from typing a task to `Received`, median, ms"""
    [worker] = bench.workers(1)
    producer = bench.start(bench.who.many, subprocess.PIPE)
    took = []
    for _ in range(200):
        began = time.monotonic()
        producer.type("task\n")
        wait_until(lambda: len(stamps(worker, DONE)) == len(took) + 2, "it is done", poll=0.001)
        took.append(stamps(worker, RECEIVED)[-1] - began)
        time.sleep(0.005)  # until it is acknowledged, and the worker idle
    return 1000 * statistics.median(took)


def killed(bench):
    """from `kill -9` of a worker to `Received` at the next, ms"""
    workers = bench.workers(2)
    bench.run(bench.who.many, b"." * 600 + b"\n")

    def busy():
        return [one for one in workers if len(stamps(one, RECEIVED)) > len(stamps(one, DONE))]

    [victim] = wait_until(busy, "a worker has the task")
    workers.remove(victim)
    began = time.monotonic()
    victim.kill()
    [other] = wait_until(busy, "the other has it")
    return 1000 * (stamps(other, RECEIVED)[-1] - began)


MEASUREMENTS = {  # how, in how many rounds, and who cannot: one sends no lines, one does no work
    "one": (one_sent, 30, None),
    "many": (many_sent, 6, "tutorial"),
    "done": (many_done, 9, None),
    "memory": (memory, 3, None),
    "pick-up": (picked_up, 3, None),
    "kill": (killed, 9, "floor"),
}


def measure(how, broker, who):
    print(f"{how.__name__}: {who}", file=sys.stderr)
    with contextlib.closing(Bench(broker, CONTESTANTS[who])) as bench:
        return how(bench)


def cell(values):
    """Return the median, and half the range of the rounds in per cent of it."""
    if not values:
        return ""
    median = statistics.median(values)
    places = 0 if median >= 100 else 2
    half_range = 50 * (max(values) - min(values)) / median
    return f"{median:.{places}f} ±{half_range:.0f} %"


def main():
    others = list(CONTESTANTS)[1:]
    parser = argparse.ArgumentParser(prog="tests/bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="take no more turns than these")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument("--beside", nargs="*", choices=others, default=others)
    parser.add_argument("--cluster", action="store_true", help="on three nodes, in Docker")
    given = parser.parse_args()
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # it reports each look at a broker
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended
    columns = ["ours", *given.beside]
    with contextlib.closing(brokers.Cluster() if given.cluster else brokers.choose()()) as broker:
        broker.start()
        print(f"{type(broker).__name__} {broker.ctl('version')}")
        print("|  | rounds |", *(f"{who} |" for who in columns))
        print("|---|" + "---:|" * (1 + len(columns)))
        for how, rounds, incapable in (MEASUREMENTS[name] for name in given.only):
            rounds = min(rounds, given.rounds)
            figures = {who: [] for who in columns}
            for who in columns * rounds:
                if who != incapable:
                    figures[who].append(measure(how, broker, who))
            print(f"| {how.__doc__} | {rounds} |", *(f"{cell(figures[who])} |" for who in columns))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
