"""Measure the two scripts beside the tutorial's bare code and what else a user could pick.

The contestants run in turn, round after round (A B C, A B C), against one broker, all of them with
persistent messages, late acknowledgement and a prefetch of one. Workers write to a pipe, and what
they print is stamped here, the same way for all. "floor" is the least that pika can do.
"""

import argparse
import contextlib
import datetime
import heapq
import importlib.metadata
import logging
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import NamedTuple

import pika
import psutil

from tests.harness import brokers
from tests.harness.consoles import ROOT, Console
from tests.harness.waiting import wait_until

PEERS = ROOT / "tests/tools/peers"
QUEUES = ("task_queue", "celery", "default", "default.DQ", "default.XQ")
MARK, MIB = b"MARK", 2**20


class Contestant(NamedTuple):
    """Arguments for Python: to send one task, to send the lines of stdin, to do tasks."""

    one: list
    many: list
    worker: list
    queue: str = "task_queue"


CELERY_WORKER = "-m celery --quiet -A celery_app worker -P prefork -c 1 -l ERROR -n NUMBER"
DRAMATIQ_WORKER = "-m dramatiq --processes 1 --threads 1 --skip-logging dramatiq_app"
CONTESTANTS = {
    "ours": Contestant(
        [f"{ROOT}/new_task.py"], [f"{ROOT}/new_task.py", "-"], [f"{ROOT}/worker.py"]
    ),
    "tutorial": Contestant(["tutorial_new_task.py"], ["floor.py", "-"], ["tutorial_worker.py"]),
    "aio-pika": Contestant(["aio.py"], ["aio.py", "-"], ["aio.py", "worker"]),
    "Celery": Contestant(
        ["celery_app.py"], ["celery_app.py", "-"], CELERY_WORKER.split(), "celery"
    ),
    "Dramatiq": Contestant(
        ["dramatiq_app.py"], ["dramatiq_app.py", "-"], DRAMATIQ_WORKER.split(), "default"
    ),
    "floor": Contestant(["-c", "import pika"], ["floor.py", "-"], ["floor.py", "worker"]),
}
SIZES = {  # of a full run and of a quick one
    "rounds": (30, 2),  # at most
    "many": (5_000, 1_000),
    "drain": (5_000, 2_000),
    "loads": (3, 1),
    "picks": (200, 50),
    "kills": (3, 1),
    "backlog": (1_000_000, 100_000),
    "long": (100_000, 10_000),
}
FLEETS = (1, 2, 4, 8)
PLAIN_TASK = MARK, pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
LOAD = (2, 0, 1, 0, 1, 0)  # heavy and light tasks, in seconds


class Bench:
    """A broker, the processes that a measurement has started, and how much to measure."""

    def __init__(self, broker, quick):
        self.broker = broker
        self.size = {name: sizes[quick] for name, sizes in SIZES.items()}
        self.consoles = []
        self.vhosts = {"%2F"}

    def env(self, vhost):
        return {"AMQP_URL": self.url(vhost=vhost), "dramatiq_queue_prefetch": "1"}

    def url(self, **parts):
        """Return one URL, for a cluster that of its first node: not all take several."""
        return brokers.Broker.url(self.broker, **parts)

    def connect(self, vhost="%2F"):
        return pika.BlockingConnection(
            pika.URLParameters(self.url(vhost=vhost, query="heartbeat=0"))
        )

    def run(self, argv, **options):
        """Run a client to its end; return how many seconds it took."""
        env = {**os.environ, **self.env("%2F")}
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, *argv],
            env=env,
            cwd=PEERS,
            stdout=subprocess.DEVNULL,
            check=True,
            **options,
        )
        return time.perf_counter() - started

    def start(self, who, count=1, vhost="%2F"):
        """Start workers, and return them when all of them consume."""
        workers = [
            Console(
                sys.executable,
                *(word.replace("NUMBER", f"{number}") for word in who.worker),
                env=self.env(vhost),
                cwd=PEERS,
            )
            for number in range(count)
        ]
        self.consoles += workers

        def consume():
            for worker in workers:
                if worker.process.poll() is not None:
                    raise AssertionError(worker.transcript)
            return self.counts(who, vhost)[1] == count

        wait_until(consume, "all workers consume", 60)
        return workers

    def close(self):
        while self.consoles:
            self.consoles.pop().close()

    def clean(self, vhost="%2F"):
        with self.connect(vhost) as connection:
            for queue in QUEUES:
                connection.channel().queue_delete(queue)

    def counts(self, who, vhost="%2F"):
        """Return how many tasks wait in the contestant's queue, and how many workers consume."""
        with self.connect(vhost) as connection:
            try:
                found = connection.channel().queue_declare(who.queue, passive=True).method
            except pika.exceptions.ChannelClosedByBroker:
                return 0, 0
            return found.message_count, found.consumer_count

    def task(self, who):
        """Return a task as the contestant's own client sends it; its queue is there then."""
        self.run(who.many, input=MARK + b"\n")
        with self.connect() as connection:
            _, properties, body = connection.channel().basic_get(who.queue, auto_ack=True)
        return body, properties

    def fill(self, who, task, texts, vhost="%2F"):
        """Put a copy of the task into the queue for each of the texts."""
        body, properties = task
        with self.connect(vhost) as connection:
            channel = connection.channel()
            for text in texts:
                channel.basic_publish("", who.queue, body.replace(MARK, text), properties)


def stamps(worker, start):
    """Return when the worker has printed the lines that start so."""
    return [line.at for line in list(worker.lines) if line.text.startswith(start)]


def times_received(worker):
    return stamps(worker, " [x] Received")


def times_done(worker):
    return stamps(worker, " [x] Done")


def usage(worker):
    """Return the CPU seconds and the resident MiB of a worker and the processes it started."""
    parent = psutil.Process(worker.process.pid)
    family = [parent, *parent.children(recursive=True)]
    cpu = sum(sum(process.cpu_times()[:2]) for process in family)
    return cpu, sum(process.memory_info().rss for process in family) / MIB


def drain(bench, who, count):
    """Let a worker do `count` tasks that wait; return it, its rate, and its usage when it began."""
    (worker,) = bench.start(who)
    early = len(times_done(worker)), usage(worker)
    wait_until(
        lambda: len(worker.lines) >= 2 * count and len(times_done(worker)) >= count,
        f"{count} tasks are done",
        timeout=600,
        poll=0.1,
    )
    at, first = times_done(worker), count // 10
    return worker, (count - 1 - first) / (at[count - 1] - at[first]), early


def one_sent(bench, who):
    words = [] if "-c" in who.one else ["Hello"]
    return {"one task sent, ms": 1000 * bench.run([*who.one, *words])}


def many_sent(bench, who):
    bench.clean()

    def seconds(count):
        with tempfile.TemporaryFile() as lines:
            lines.write(b"task\n" * count)
            lines.seek(0)
            return bench.run(who.many, stdin=lines)

    start, count = seconds(1), bench.size["many"]
    return {"many tasks sent, per second": count / (seconds(count + 1) - start)}


def without_work(bench, who):
    bench.clean()
    count = bench.size["drain"]
    bench.fill(who, bench.task(who), [b"task"] * count)
    worker, rate, (early, (cpu_early, _)) = drain(bench, who, count)
    cpu, memory = usage(worker)
    return {
        "tasks without work, per second": rate,
        "CPU time of the worker per task, µs": 1e6 * (cpu - cpu_early) / (count - early),
        f"worker after {count:,} tasks, MiB": memory,
    }


def ideal(load, workers):
    """Return when all is done if whichever worker is free takes the next task, at once."""
    free = [0] * workers
    for seconds in load:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def with_work(bench, who):
    load = LOAD * bench.size["loads"]
    bench.clean()
    task, fleets, began = bench.task(who), {}, {}
    for count in FLEETS:
        vhost = f"fleet-{count}"
        if vhost not in bench.vhosts:
            bench.broker.ctl("add_vhost", vhost)
            bench.broker.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
            bench.vhosts.add(vhost)
        bench.clean(vhost)
        fleets[count] = bench.start(who, count, vhost)
    for count in FLEETS:  # side by side, a quarter of a second apart: asleep they need no CPU

        def texts(count=count):
            began[count] = time.monotonic()
            yield from (b"." * seconds for seconds in load)

        bench.fill(who, task, texts(), f"fleet-{count}")
        time.sleep(0.25)

    def ends(count):
        return sorted(at for worker in fleets[count] for at in times_done(worker))

    wait_until(lambda: all(len(ends(count)) == len(load) for count in FLEETS), "all is done", 120)
    return {
        f"tasks with work, workers: {count}, time over the ideal": (ends(count)[-1] - began[count])
        / ideal(load, count)
        for count in FLEETS
    }


def pick_up(bench, who):
    bench.clean()
    task = bench.task(who)
    (worker,) = bench.start(who)
    _, memory = usage(worker)
    sent = []

    def idle(number):
        return len(times_done(worker)) == number

    def texts():
        for number in range(bench.size["picks"]):
            wait_until(partial(idle, number), "the task before is done", poll=0.001)
            time.sleep(0.005)  # until it is acknowledged, and the worker idle
            sent.append(time.monotonic())
            yield b"task"

    bench.fill(who, task, texts())
    wait_until(lambda: len(times_received(worker)) == len(sent), "the last task is received")
    times = [1000 * (at - began) for began, at in zip(sent, times_received(worker), strict=True)]
    return {
        "idle worker, MiB": memory,
        "from sending to Received, median, ms": statistics.median(times),
        "from sending to Received, 99th percentile, ms": statistics.quantiles(
            times, n=100, method="inclusive"
        )[98],
    }


def worker_killed(bench, who):
    bench.clean()
    task = bench.task(who)
    workers, times = bench.start(who, bench.size["kills"] + 1), []

    def holder():
        return next((worker for worker in workers if times_received(worker)), None)

    bench.fill(who, task, [b"." * 600])
    while len(workers) > 1:
        victim = wait_until(holder, "a worker has the task")
        workers.remove(victim)
        killed = time.monotonic()
        victim.kill()
        times.append(
            times_received(wait_until(holder, "the next worker has it", poll=0.01))[0] - killed
        )
    return {"from kill -9 to Received at the next, ms": 1000 * statistics.median(times)}


def broker_back(bench, who):
    bench.clean()
    task = bench.task(who)
    (worker,) = bench.start(who)
    bench.broker.restart()
    back = time.monotonic()
    bench.fill(who, task, [b"task"])
    wait_until(lambda: times_received(worker), "the worker is back", timeout=120)
    return {"from the broker's return to Received, s": times_received(worker)[0] - back}


def backlog(share, bench, who):
    """Measure with `share` of the whole backlog; what waits from the last time is used again."""
    depth = int(bench.size["backlog"] * share)
    waiting, _ = bench.counts(who)
    if not 0 < waiting <= depth:
        bench.clean()
        bench.task(who)  # for the queue
        waiting = 0
    bench.fill(who, PLAIN_TASK, [b"task"] * (depth - waiting))
    count = min(depth, bench.size["drain" if share < 1 else "long"])
    worker, rate, _ = drain(bench, who, count)
    return {
        f"{depth:,} tasks wait: tasks per second": rate,
        f"{depth:,} tasks wait: worker after {count:,} of them, MiB": usage(worker)[1],
    }


ALL = "ours tutorial aio-pika Celery Dramatiq floor".split()
PLAIN = ["ours", "tutorial", "floor"]  # they send and do the very same messages
MEASUREMENTS = {  # name: how, by whom, and in how many rounds
    "one": (one_sent, ALL, 30),
    "many": (many_sent, [name for name in ALL if name != "tutorial"], 6),
    "drain": (without_work, ALL, 9),
    "work": (with_work, ALL[:-1], 2),
    "pick-up": (pick_up, ALL, 3),
    "kill": (worker_killed, ALL[:-1], 3),
    "return": (broker_back, ["ours", "aio-pika", "Celery", "Dramatiq"], 2),
    "backlog-1": (partial(backlog, 0.001), PLAIN, 9),
    "backlog-2": (partial(backlog, 0.1), PLAIN, 6),
    "backlog-3": (partial(backlog, 1), PLAIN[:2], 1),
}


def measure(bench, names, among, most):
    """Return the samples of each contestant by what was measured, in no more than `most` rounds.

    What is under way is told.
    """
    samples, began = {}, time.monotonic()
    for name in names:
        how, contestants, rounds = MEASUREMENTS[name]
        for number in range(1, (count := min(rounds, most)) + 1):
            for contestant in (one for one in contestants if one in among):
                tell(f"{time.monotonic() - began:4.0f} s  {name} {number}/{count}: {contestant}")
                try:
                    found = how(bench, CONTESTANTS[contestant])
                finally:
                    bench.close()
                for what, value in found.items():
                    samples.setdefault(what, {}).setdefault(contestant, []).append(value)
    tell(f"{time.monotonic() - began:4.0f} s  all is measured\n")
    return samples


def tell(text):
    """Show the state, in place on a terminal, else line by line."""
    on_terminal = sys.stderr.isatty()
    print("\r\033[K" * on_terminal + text, end="" if on_terminal else "\n", file=sys.stderr)
    sys.stderr.flush()


def about(bench):
    """Return what the figures depend on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        model = next((row.split(": ")[1].strip() for row in cpuinfo if "model name" in row), model)
    packages = ("pika", "aio-pika", "celery", "dramatiq")
    return {
        "date": datetime.date.today().isoformat(),
        "CPUs": f"{psutil.cpu_count()} of {model}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "Python": platform.python_version(),
        "RabbitMQ": f"{bench.broker.ctl('version').strip()} ({type(bench.broker).__name__})",
        **{package: importlib.metadata.version(package) for package in packages},
    }


def cell(values, ours):
    """Return the median, half the range of the rounds in per cent, and the multiple of ours."""
    median = statistics.median(values)
    shown = f"{median:,.0f}" if median >= 100 else f"{median:#.3g}"
    if len(values) > 1:
        shown += f" ±{50 * (max(values) - min(values)) / median:.0f} %"
    return shown + (f" ({median / statistics.median(ours):.2f})" if ours is not values else "")


def table(samples, columns):
    rows = [["", "rounds", *columns], ["---", *["---:"] * (len(columns) + 1)]]
    for what, by in samples.items():
        cells = (cell(by[name], by["ours"]) if name in by else "" for name in columns)
        rows.append([what, str(len(by["ours"])), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, help="take no more turns than these")
    parser.add_argument("--quick", action="store_true", help="measure less, to see that it works")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, help="measure only these")
    parser.add_argument("--beside", nargs="*", choices=ALL[1:], default=ALL[1:], help="the others")
    parser.add_argument("--cluster", action="store_true", help="on three nodes")
    given = parser.parse_args()
    contestants = ["ours", *given.beside]
    if given.cluster and brokers.DockerBroker.why_not():
        parser.error("--cluster needs a Docker engine with compose")
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # it reports each look at a broker
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended
    broker = brokers.Cluster() if given.cluster else brokers.choose()()
    bench = Bench(broker, given.quick)
    try:
        tell("starting RabbitMQ")
        broker.start()
        conditions = about(bench)
        most = given.rounds or bench.size["rounds"]
        samples = measure(bench, given.only or MEASUREMENTS, contestants, most)
    finally:
        bench.close()
        broker.close()
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    print(f"\n{table(samples, contestants)}\n")
    print("Medians of the rounds, ± half their range; in brackets the multiple of ours.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
