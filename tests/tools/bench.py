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
import shutil
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
SLEEP = re.compile(r"(await asyncio|time)\.sleep\(.*\.count\(.*\)\)")


class Contestant(NamedTuple):
    """What Python runs: to send a text, to send lines, to do tasks."""

    one: str
    many: str
    worker: str
    queue: str = "task_queue"


CELERY_WORKER = "-m celery --quiet -A celery_app worker -P prefork -c 1 -l ERROR"
DRAMATIQ_WORKER = "-m dramatiq --processes 1 --threads 1 --skip-logging dramatiq_app"
CONTESTANTS = {
    "ours": Contestant("new_task.py", "new_task.py -", "worker.py"),
    "tutorial": Contestant("tutorial_new_task.py", "tutorial_lines.py", "tutorial_worker.py"),
    "aio-pika": Contestant("aio.py", "aio.py -", "aio.py worker"),
    "Celery": Contestant("celery_app.py", "celery_app.py -", CELERY_WORKER, "celery"),
    "Dramatiq": Contestant("dramatiq_app.py", "dramatiq_app.py -", DRAMATIQ_WORKER, "default"),
}


class Bench:
    """A broker with empty queues, and a copy of all programs, for one contestant."""

    def __init__(self, broker, folder, who):
        self.who, self.folder = who, folder
        self.queue = Queue(broker, who.queue)
        self.env = {**os.environ, "AMQP_URL": broker.url(), "dramatiq_queue_prefetch": "1"}
        for program in [*ROOT.glob("*.py"), *PEERS.glob("*.py")]:
            shutil.copy(program, folder)
        for name in QUEUES:
            Queue(broker, name).delete()

    def leave_out_work(self):
        for program in self.folder.glob("*.py"):
            text = SLEEP.sub("pass", program.read_text())
            assert "sleep(" not in text or ".count(" not in text, f"{program.name} works otherwise"
            program.write_text(text)

    def run(self, words, lines=b""):
        """Run a client to its end; return how many seconds it took."""
        argv = [sys.executable, *words.split()]
        null = subprocess.DEVNULL
        with file_of(lines) as file:
            began = time.perf_counter()
            subprocess.run(argv, env=self.env, cwd=self.folder, stdin=file, stdout=null, check=True)
            return time.perf_counter() - began

    @contextlib.contextmanager
    def worker(self):
        """Start a worker, and give it when it has done one task."""
        self.run(self.who.many, b"first\n")
        argv = [sys.executable, *self.who.worker.split()]
        with contextlib.closing(Console(*argv, env=self.env, cwd=self.folder)) as console:
            wait_until(lambda: stamps(console), "the first is done")
            yield console


def stamps(worker):
    """Return when the worker has printed that a task is done."""
    return [line.at for line in list(worker.lines) if line.text == " [x] Done"]


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
    with bench.worker() as worker:
        wait_until(lambda: len(stamps(worker)) == 5001, "all are done", 600, poll=0.5)
    at = stamps(worker)[500:]  # in full swing
    return (len(at) - 1) / (at[-1] - at[0])


def many_passed(bench):
    """tasks whose work is `pass` done by a worker, per second"""
    bench.leave_out_work()
    return many_done(bench)


def memory(bench):
    """memory of an idle worker, MiB"""
    with bench.worker() as worker:
        family = brokers.run("ps", "-o", "rss=", "--sid", str(worker.process.pid))
    return sum(int(size) for size in family.split()) / 1024


ROWS = {
    "one": one_sent,
    "many": many_sent,
    "done": many_done,
    "pass": many_passed,
    "memory": memory,
}


def measure(how, broker, who):
    with tempfile.TemporaryDirectory() as folder:
        return how(Bench(broker, Path(folder), who))


def cell(values):
    """Return the median, and half the range of the rounds in per cent of it."""
    median = statistics.median(values)
    places = 0 if median >= 100 else 2
    half_range = 50 * (max(values) - min(values)) / median
    return f"{median:.{places}f} ±{half_range:.0f} %"


def main():
    parser = argparse.ArgumentParser(prog="tests/bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    given = parser.parse_args()
    with contextlib.closing(brokers.choose()()) as broker:
        broker.start()
        print(f"{type(broker).__name__} {broker.ctl('version').strip()}, {given.rounds} rounds")
        print("|  |", " | ".join(CONTESTANTS), "|")
        print("|---|" + "---:|" * len(CONTESTANTS))
        for how in map(ROWS.get, given.only):
            figures = {name: [] for name in CONTESTANTS}
            for name in [*CONTESTANTS] * given.rounds:
                figures[name].append(measure(how, broker, CONTESTANTS[name]))
            print(f"| {how.__doc__} |", " | ".join(map(cell, figures.values())), "|", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
