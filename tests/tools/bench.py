"""Measure the two scripts beside the tutorial's own and what else a user could pick.

The contestants run in turn, round after round (A B C, A B C), against one broker, all of them with
persistent messages, late acknowledgement and a prefetch of one. Workers write to a pipe, and what
they print is stamped here, the same way for all. Work is what the tutorial's is, a sleep for each
dot. In the row of tasks whose work is `pass`, that is put in place of the sleep in each one's file.

"tutorial" sends one task with the tutorial's new_task.py, which waits for no confirm; as it sends
no more, many are sent by the least that pika can do: publish, and wait for the confirm. Without the
sleep, its worker is the least, too. (Work in aio-pika may not block; elsewhere it may.)
"""

import argparse
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.harness import brokers
from tests.harness.consoles import ROOT, Console, file_of
from tests.harness.queues import Queue
from tests.harness.scripts import PEERS
from tests.harness.waiting import wait_until

QUEUES = ("task_queue", "celery", "default", "default.DQ", "default.XQ")
RECEIVED = " [x] Received"
DONE = " [x] Done"
SLEEP = re.compile(r"(await asyncio|time)\.sleep\(.*\.count\(.*\)\)")


class Contestant(NamedTuple):
    """What Python runs in a folder: to send a text, to send lines, to do tasks."""

    one: str
    many: str
    worker: str
    queue: str = "task_queue"
    folder: Path = PEERS


CELERY_WORKER = "-m celery --quiet -A celery_app worker -P prefork -c 1 -l ERROR -n NUMBER"
DRAMATIQ_WORKER = "-m dramatiq --processes 1 --threads 1 --skip-logging dramatiq_app"
CONTESTANTS = {
    "ours": Contestant("new_task.py", "new_task.py -", "worker.py", folder=ROOT),
    "tutorial": Contestant("tutorial_new_task.py", "tutorial_lines.py", "tutorial_worker.py"),
    "aio-pika": Contestant("aio.py", "aio.py -", "aio.py worker"),
    "Celery": Contestant("celery_app.py", "celery_app.py -", CELERY_WORKER, "celery"),
    "Dramatiq": Contestant("dramatiq_app.py", "dramatiq_app.py -", DRAMATIQ_WORKER, "default"),
}


class Bench:
    """A broker with empty queues, a copy of a contestant's programs, and what is running of it."""

    def __init__(self, broker, who):
        self.who = who
        self.queue = Queue(broker, who.queue)
        self.env = {**os.environ, "AMQP_URL": broker.url(), "dramatiq_queue_prefetch": "1"}
        self.consoles = []
        self.copy = tempfile.TemporaryDirectory()
        self.folder = Path(self.copy.name)
        for program in who.folder.glob("*.py"):
            (self.folder / program.name).write_text(program.read_text())
        for name in QUEUES:
            Queue(broker, name).delete()

    def leave_out_work(self):
        for program in self.folder.glob("*.py"):
            text = SLEEP.sub("pass", program.read_text())
            assert ".count(" not in text, f"{program.name} has another work"
            program.write_text(text)

    def run(self, words, lines=b""):
        """Run a client to its end; return how many seconds it took."""
        argv = [sys.executable, *words.split()]
        null = subprocess.DEVNULL
        with file_of(lines) as file:
            began = time.perf_counter()
            subprocess.run(argv, env=self.env, cwd=self.folder, stdin=file, stdout=null, check=True)
            return time.perf_counter() - began

    def workers(self, count):
        """Start workers, and return them when all of them consume."""
        self.run(self.who.many, b"first\n")  # so that the queue is there
        for number in range(count):
            words = self.who.worker.replace("NUMBER", str(number)).split()
            console = Console(sys.executable, *words, env=self.env, cwd=self.folder)
            self.consoles.append(console)
        wait_until(lambda: self.queue.consumers() == count, "all workers consume")
        wait_until(lambda: any(stamps(one, DONE) for one in self.consoles), "the first is done")
        return list(self.consoles)

    def close(self):
        for console in self.consoles:
            console.close()
        self.copy.cleanup()


def stamps(worker, start):
    """Return when the worker has printed the lines that start so."""
    return [line.at for line in list(worker.lines) if line.text.startswith(start)]


# --- What is measured: each returns a figure, and its docstring says what that is ---


def one_sent(bench):
    """one task sent by a new process, ms"""
    bench.run(f"{bench.who.one} first")  # so that the queue is there
    return 1000 * bench.run(f"{bench.who.one} Hello")


def many_sent(bench):
    """tasks sent and confirmed, per second"""
    one = bench.run(bench.who.many, b"task\n")
    more = bench.run(bench.who.many, b"task\n" * 5001)
    return 5000 / (more - one)


def many_done(bench):
    """tasks without dots done by a worker, per second"""
    bench.run(bench.who.many, b"task\n" * 5000)
    [worker] = bench.workers(1)
    wait_until(lambda: len(stamps(worker, DONE)) == 5001, "all are done", 600, poll=0.5)
    at = stamps(worker, DONE)[500:]  # in full swing
    return (len(at) - 1) / (at[-1] - at[0])


def many_passed(bench):
    """tasks whose work is `pass` done by a worker, per second"""
    bench.leave_out_work()
    return many_done(bench)


def memory(bench):
    """memory of an idle worker, MiB"""
    [worker] = bench.workers(1)
    family = brokers.run("ps", "-o", "rss=", "--sid", str(worker.process.pid))
    return sum(int(size) for size in family.split()) / 1024


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


MEASUREMENTS = {
    "one": one_sent,
    "many": many_sent,
    "done": many_done,
    "pass": many_passed,
    "memory": memory,
    "kill": killed,
}


def measure(how, broker, name):
    """Have a contestant measured; one of an unknown name is the scripts in a folder."""
    who = CONTESTANTS.get(name) or CONTESTANTS["ours"]._replace(folder=Path(name))
    with contextlib.closing(Bench(broker, who)) as bench:
        return how(bench)


def cell(values):
    """Return the median, and half the range of the rounds in per cent of it."""
    median = statistics.median(values)
    places = 0 if median >= 100 else 2
    half_range = 50 * (max(values) - min(values)) / median
    return f"{median:.{places}f} ±{half_range:.0f} %"


def known(name):
    """Return `name` if it is a contestant's, or a folder's with the scripts."""
    if name not in CONTESTANTS and not Path(name, "worker.py").exists():
        raise argparse.ArgumentTypeError(f"{name} is no folder with the scripts")
    return name


def main():
    parser = argparse.ArgumentParser(prog="tests/bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument(
        "--beside",
        nargs="*",
        type=known,
        default=list(CONTESTANTS)[1:],
        help=f"which of {', '.join(CONTESTANTS)}, or a folder with another version of the scripts",
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended
    columns = ["ours", *given.beside]
    with contextlib.closing(brokers.choose()()) as broker:
        broker.start()
        print(f"{type(broker).__name__} {broker.ctl('version').strip()}, {given.rounds} rounds")
        print("|  |", " | ".join(columns), "|")
        print("|---|" + "---:|" * len(columns))
        for how in map(MEASUREMENTS.get, given.only):
            figures = {name: [] for name in columns}
            for name in columns * given.rounds:
                figures[name].append(measure(how, broker, name))
            print(f"| {how.__doc__} |", " | ".join(map(cell, figures.values())), "|", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
