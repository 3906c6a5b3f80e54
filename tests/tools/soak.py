"""Keep workers and a stream of numbered tasks going while faults strike at random, then count.

Lost is a task that was told as sent and never done; unexpected, one that was done and never sent.
The exit status is 0 if there is neither and no worker was down: each must outlive every fault but
a signal, and consume in the end. With --textbook the same faults strike the tutorial's bare
scripts at the same time. For both, a worker that a fault has ended is counted as down, and started
anew when the fault is over, as systemd would. A command that failed, so that a fault was not made
or not undone, is told and counted, and makes the status 1 as well.
TEST_BROKER=docker|local chooses the brokers.
"""

import argparse
import bisect
import collections
import contextlib
import logging
import math
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from tests.harness import brokers
from tests.harness.consoles import Console
from tests.harness.proxy import WAYS, Proxy
from tests.harness.scripts import NEW_TASK, TUTORIAL, WORKER

HEARTBEAT = 4  # seconds
RECEIVED, DONE, SENT = " [x] Received ", " [x] Done", " [x] Sent "

signals = []  # that came to end the soak


def wait(condition, seconds):
    """Return whether `condition()` came true in time. A signal ends the soak here, nowhere else."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        if signals:
            raise KeyboardInterrupt
        time.sleep(0.05)
    return met


def pause(seconds):
    wait(lambda: False, seconds)


class Contestant:
    """A pair of scripts with a broker of their own: its consoles, and what they have shown."""

    def __init__(self, options, textbook=False):
        self.options, self.textbook = options, textbook
        self.name = "the tutorial's own" if textbook else "these scripts"
        self.broker = brokers.choose()()
        self.proxy = Proxy(self.broker.port)
        self.workers, self.producer = [], None
        self.given, self.told, self.done = [], [], []  # tasks; with the last, when
        self.down, self.over, self.log, self.botched = 0, [], [], 0
        self.producing = threading.Thread(target=self.produce, daemon=True)
        self.ending = threading.Event()

    def start(self):
        self.broker.start()
        self.workers = [self.start_worker(number) for number in range(self.options.workers)]
        self.producing.start()
        if not wait(lambda: self.done, 60):
            raise AssertionError(f"{self.name}: no task is done before the first fault")

    def close(self):
        """End all that was started."""
        self.ending.set()
        while self.producing.is_alive():
            if self.producer:
                self.producer.kill()
            self.producing.join(0.1)
        for worker in self.workers:
            worker.close()
        self.proxy.close()
        self.broker.close()

    def url(self, number):
        """Every other connection goes through the proxy."""
        port = self.broker.port if number % 2 else self.proxy.port
        return self.broker.url(port=port, query=f"heartbeat={HEARTBEAT}")

    # --- Workers and producers ---

    def start_worker(self, number):
        task = None

        def see(line):
            nonlocal task
            self.log.append((line.at, f"worker {number}", line.text))
            if line.text.startswith(RECEIVED):
                task = line.text.removeprefix(RECEIVED)
            elif line.text == DONE:
                self.done.append((line.at, task))

        argv = [sys.executable, TUTORIAL["worker"]] if self.textbook else WORKER
        return Console(*argv, env={"AMQP_URL": self.url(number)}, on_line=see)

    def start_producer(self, words, number):
        def see(line):
            self.log.append((line.at, f"producer {number}", line.text))
            if line.text.startswith(SENT):
                self.told.append(line.text.removeprefix(SENT))

        argv = [sys.executable, TUTORIAL["new_task"]] if self.textbook else NEW_TASK
        env = {"AMQP_URL": self.url(number)}
        return Console(*argv, words, env=env, stdin=subprocess.PIPE, on_line=see)

    def restart_dead(self):
        for number, worker in enumerate(self.workers):
            if worker.process.poll() is not None:
                self.down += 1
                self.workers[number] = self.start_worker(number)

    def next_task(self):
        """Return a text that was never sent before: one task of twenty works for a second."""
        number = len(self.given) + 1
        self.given.append(f"{number}{'' if number % 20 else '.'}")
        return self.given[-1]

    def produce(self):
        """Send tasks until the end; when a producer has ended, start another.

        The tutorial's own is started for each task, since it sends no more than one.
        """
        number = 0
        while not self.ending.is_set():
            words = self.next_task() if self.textbook else "-"
            self.producer = producer = self.start_producer(words, number)
            number += 1
            with contextlib.suppress(BrokenPipeError):
                while not self.textbook and not self.ending.is_set():
                    producer.stdin.write(f"{self.next_task()}\n".encode())
                    producer.stdin.flush()
                    time.sleep(1 / self.options.rate)
            with contextlib.suppress(BrokenPipeError):
                producer.stdin.close()
            with contextlib.suppress(AssertionError):
                producer.wait(60)
            producer.close()
            time.sleep(1 / self.options.rate)

    # --- Faults ---

    def strike(self, fault, number, length):
        """Make one fault happen and undo it, then wait until a task is done."""
        self.restart_dead()
        self.log.append((time.monotonic(), "fault", f"{fault} ({number}, {length:.1f} s)"))
        try:
            FAULTS[fault](self, number, length)
        except Exception as error:
            self.botch(fault, error)
        self.over.append(time.monotonic())
        self.log.append((self.over[-1], "fault", "is over"))
        wait(lambda: self.restart_dead() or self.done[-1][0] > self.over[-1], 90)

    def botch(self, what, error):
        """Tell of a command that failed, and go on: the table shall show what it led to."""
        self.botched += 1
        self.log.append((time.monotonic(), what, f"failed: {error!r}"))
        print(f"{self.name}: {what} failed: {error!r}", file=sys.stderr)

    def end_worker(self, number, signum):
        worker = self.workers[number]
        worker.signal(signum)
        with contextlib.suppress(AssertionError):
            worker.wait(10)
            self.workers[number] = self.start_worker(number)

    def freeze(self, console, length):
        console.signal(signal.SIGSTOP)
        try:
            pause(length)
        finally:
            console.signal(signal.SIGCONT)

    def end_broker(self, end, length):
        end()
        pause(length)
        self.broker.start()

    def hold(self, fault, length):
        with fault:
            pause(length)

    # --- The end ---

    def drain(self):
        """Let all heal, and wait until the queue is empty."""
        self.ending.set()
        wait(lambda: not self.producing.is_alive(), 90)
        try:
            self.broker.wait_until_it_answers()
            count = self.options.workers
            wait(lambda: self.restart_dead() or self.consumers() == count, 60)
            self.down += abs(count - self.consumers())
            wait(lambda: self.restart_dead() or self.is_empty(), 600)
        except Exception as error:
            self.botch("to drain the queue", error)
        wait(lambda: not self.lost(), 10)  # rabbitmqctl lags

    def consumers(self):
        with self.broker.connect() as connection:
            declared = connection.channel().queue_declare("task_queue", passive=True)
            return declared.method.consumer_count

    def is_empty(self):
        return "task_queue\t0\n" in self.broker.ctl("list_queues", "-s", "name", "messages")

    def lost(self):
        return set(self.told) - {task for _, task in self.done}

    def unexpected(self):
        return {task for _, task in self.done} - set(self.given)

    def recoveries(self):
        """Return for each fault the seconds from its end until a task was done."""
        times = [*sorted(at for at, _ in self.done), math.inf]
        return [times[bisect.bisect(times, over)] - over for over in self.over]

    def rows(self, seconds):
        """Yield (name, figure) for the table."""
        often = collections.Counter(task for _, task in self.done)
        yield "tasks told as sent", len(self.told)
        yield "**lost**", f"**{len(self.lost())}**"
        yield "done and never sent", len(self.unexpected())
        yield "done more than once", sum(times > 1 for times in often.values())
        yield "workers down after a fault", self.down
        yield "tasks per second", f"{len(self.told) / seconds:.1f}"
        yield "until a task is done again, median", f"{statistics.median(self.recoveries()):.1f} s"
        yield "until a task is done again, worst", f"{max(self.recoveries()):.1f} s"
        yield "commands that failed", self.botched

    def failed(self):
        stuck = math.inf in self.recoveries()
        return bool(self.lost() or self.unexpected() or self.down or self.botched or stuck)

    def save_log(self):
        """Write down what the consoles have shown, and where that is."""
        with tempfile.NamedTemporaryFile("w", prefix="soak-", suffix=".log", delete=False) as file:
            for at, name, text in sorted(self.log):
                file.write(f"{at:10.2f} {name:12} {text}\n")
        tasks = " ".join(sorted(self.lost() | self.unexpected()))
        print(f"{self.name}: see {file.name} (lost or unexpected: {tasks})", file=sys.stderr)


FAULTS = {
    "worker killed": lambda it, number, length: it.end_worker(number, signal.SIGKILL),
    "worker ended by SIGTERM": lambda it, number, length: it.end_worker(number, signal.SIGTERM),
    "worker ended by Ctrl+C": lambda it, number, length: it.end_worker(number, signal.SIGINT),
    "worker frozen": lambda it, number, length: it.freeze(it.workers[number], length),
    "producer killed": lambda it, number, length: it.producer.kill(),
    "producer frozen": lambda it, number, length: it.freeze(it.producer, length),
    "connections reset": lambda it, number, length: it.proxy.reset(),
    "black hole": lambda it, number, length: it.hold(it.proxy.black_hole(), length),
    "half a black hole": lambda it, number, length: it.hold(
        it.proxy.black_hole(WAYS[number % 2]), length
    ),
    "slow network": lambda it, number, length: it.hold(it.proxy.slow(500), length),
    "connections closed": lambda it, number, length: it.broker.ctl("close_all_connections", "soak"),
    "broker stopped": lambda it, number, length: it.end_broker(it.broker.stop, length / 3),
    "broker killed": lambda it, number, length: it.end_broker(it.broker.kill, length / 3),
    "broker frozen": lambda it, number, length: it.hold(it.broker.frozen(), length),
    "memory alarm": lambda it, number, length: it.hold(it.broker.alarm(), length),
    "disk alarm": lambda it, number, length: it.hold(it.broker.alarm(disk=True), length),
}


def parse():
    parser = argparse.ArgumentParser(prog="tests/soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long faults strike")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=20, help="tasks per second, at most")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the faults")
    parser.add_argument(
        "--textbook", action="store_true", help="strike the tutorial's own scripts, too"
    )
    return parser.parse_args()


def show(contestants, faults, ended):
    """Show a live line on standard error; where that is no terminal, a line now and then."""
    began, terminal = time.monotonic(), sys.stderr.isatty()
    while not ended.wait(1 if terminal else 10):
        counts = " | ".join(
            f"{len(it.told)} sent, {len({task for _, task in list(it.done)})} done"
            for it in contestants
        )
        passed = time.monotonic() - began
        text = f"{passed:.0f} s: {counts}; {len(faults)} faults, {(faults or ['none'])[-1]}"
        if terminal:
            text = f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}"
        print(text, end="" if terminal else "\n", file=sys.stderr, flush=True)
    if terminal:
        print(file=sys.stderr)


def soak(options, contestants, faults):
    """Run from start to end; return the seconds during which faults struck."""
    chance, ended = random.Random(options.seed), threading.Event()
    with contextlib.ExitStack() as stack:
        live = threading.Thread(target=show, args=(contestants, faults, ended))
        live.start()
        stack.callback(live.join)
        stack.callback(ended.set)
        for textbook in [False, True] if options.textbook else [False]:
            contestants.append(Contestant(options, textbook))
            stack.callback(contestants[-1].close)
        pool = stack.enter_context(ThreadPoolExecutor())

        def each(method, *given):
            list(pool.map(lambda contestant: method(contestant, *given), contestants))

        each(Contestant.start)
        began = time.monotonic()
        while time.monotonic() < began + options.seconds:
            faults.append(chance.choice(list(FAULTS)))
            number, length = chance.randrange(options.workers), chance.uniform(1, 10)
            each(Contestant.strike, faults[-1], number, length)
            pause(chance.uniform(0.5, 3))
        seconds = time.monotonic() - began
        each(Contestant.drain)
        return seconds


def main():
    options = parse()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, frame: signals.append(number))
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # it reports each look at a closed port
    contestants, faults = [], []
    print(
        f"{brokers.choose().__name__}: tests/soak --seconds {options.seconds:g}"
        f" --workers {options.workers} --rate {options.rate:g} --seed {options.seed}"
        f"{' --textbook' * options.textbook}\n",
        flush=True,
    )
    try:
        seconds = soak(options, contestants, faults)
    except KeyboardInterrupt:
        return 128 + signals[0]
    kinds = ", ".join(f"{fault} {times}" for fault, times in collections.Counter(faults).items())
    print(f"| {seconds:.0f} s | {' | '.join(it.name for it in contestants)} |")
    print(f"|---|{'---:|' * len(contestants)}")
    for row in zip(*(it.rows(seconds) for it in contestants), strict=True):
        print(f"| {row[0][0]} | {' | '.join(str(figure) for _, figure in row)} |")
    print(f"| faults: {kinds} |{f' {len(faults)} |' * len(contestants)}")
    if contestants[0].failed():
        contestants[0].save_log()
    return int(contestants[0].failed())


if __name__ == "__main__":
    sys.exit(main())
