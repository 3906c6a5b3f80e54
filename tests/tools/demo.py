"""Play the tutorial in four chapters, and show as it happens what its consoles show."""

import argparse
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tests.harness import brokers
from tests.harness.consoles import Console
from tests.harness.queues import Queue
from tests.harness.scripts import FIVE_TASKS, NEW_TASK, WORKER, done, received
from tests.tools import picture

COLOURS = {"worker 1": "36", "worker 2": "35", "producer": "32"}  # as a terminal numbers them
BOLD, BOLD_RED = "1", "1;31"
LONG_ONE = "A long one....."


class NotSeen(Exception):
    """What a chapter promises has not happened."""


def see(condition, what):
    if not condition:
        raise NotSeen(what)


def say(text, style=""):
    if style and sys.stdout.isatty():
        text = f"\033[{style}m{text}\033[m"
    print(text, flush=True)


class Stage:
    """RabbitMQ, the consoles, and what of theirs has been shown."""

    def __init__(self, broker):
        self.broker, self.queue = broker, Queue(broker)
        self.consoles = []  # (title, console)
        self.workers = {}  # by their titles
        self.shown = set()  # (monotonic seconds, title, text)

    def tell(self, title, text, at=None):
        self.shown.add((at or time.monotonic(), title, text))
        say(f"{title} | {text}", COLOURS.get(title))

    def open(self, title, *argv):
        self.tell(title, f"$ python {' '.join(argv)}")
        console = Console(sys.executable, *argv, env={"AMQP_URL": self.broker.url()})
        self.consoles.append((title, console))
        return console

    def start_worker(self, title):
        """Start a worker and wait until it consumes, as the first that does gets the first task."""
        others = [one for one in self.workers.values() if one.process.poll() is None]
        self.workers[title] = self.open(title, WORKER)
        self.show_until(lambda: self.workers[title].out, f"{title} waits for messages")
        self.show_until(lambda: self.queue.consumers() > len(others), f"{title} consumes")

    def restart_ended(self):
        """Start each worker again that has ended."""
        for title, worker in list(self.workers.items()):
            if worker.process.poll() is not None:
                self.start_worker(title)

    def send(self, *tasks):
        for task in tasks:
            sent = self.open("producer", NEW_TASK, *task.split())
            sent.wait()
            self.show()
            see(sent.out == [f" [x] Sent {task}"], f"it is sent: {task}")

    def show(self):
        """Show the lines that have come since the last time, in the order they came."""
        lines = {
            (line.at, title, line.text)
            for title, console in self.consoles
            for line in list(console.lines)
        }
        for at, title, text in sorted(lines - self.shown):
            self.tell(title, text, at)

    def show_until(self, condition, what, timeout=60):
        until = time.monotonic() + timeout
        while not condition():
            see(time.monotonic() < until, what)
            self.show()
            time.sleep(0.05)
        self.show()

    def show_while(self, action):
        """Show what comes while `action` runs."""
        with ThreadPoolExecutor() as pool:
            running = pool.submit(action)
            self.show_until(running.done, f"the end of {action.__name__}()", timeout=150)
            running.result()

    def show_until_done(self, *tasks):
        """Wait until the workers have done these tasks."""
        workers = self.workers.values()
        self.show_until(lambda: set(tasks) <= set(done(*workers)), f"all are done: {tasks}")

    def close(self):
        for _, console in self.consoles:
            console.close()


# --- The chapters: each plays, and returns what was seen; its docstring is its title ---


def round_robin(stage):
    """Round-robin dispatching: two workers get five tasks in turn"""
    stage.send(*FIVE_TASKS)
    stage.show_until_done(*FIVE_TASKS)
    first, second = (received(worker) for worker in stage.workers.values())
    see((first, second) == (FIVE_TASKS[::2], FIVE_TASKS[1::2]), "they get the tasks in turn")
    return f"worker 1 had {len(first)}, worker 2 had {len(second)}, in turn"


def acknowledgment(stage):
    """Message acknowledgment: a worker is killed in mid-task, and the other has its task"""
    task = LONG_ONE
    stage.send(task)
    stage.show_until(lambda: task in received(*stage.workers.values()), "a worker has it")
    one, other = sorted(stage.workers, key=lambda title: task not in received(stage.workers[title]))
    stage.tell(one, "Killed")
    stage.workers[one].signal(signal.SIGKILL)
    killed = time.monotonic()
    stage.show_until(lambda: task in received(stage.workers[other]), "the other worker has it")
    moved = time.monotonic() - killed
    stage.show_until(lambda: task in done(stage.workers[other]), "the other worker has done it")
    return f"the other had it after {moved:.1f} s, and did it"


def durability(stage):
    """Message durability: RabbitMQ restarts with a task waiting, and the workers are still there"""
    tasks = "In hand.....", "In hand, too.....", "Waits."
    stage.send(*tasks)
    stage.tell("RabbitMQ", "stops")
    stage.show_while(stage.broker.stop)
    see("Waits." not in received(*stage.workers.values()), "a task waits")
    stage.show_while(stage.broker.start)
    stage.tell("RabbitMQ", "is back")
    stage.show_until(lambda: stage.queue.consumers() == 2, "both workers are back")
    stage.show_until_done(*tasks)
    return "both workers came back, and all three tasks were done"


def fair_dispatch(stage):
    """Fair dispatch: no light task waits behind a heavy one"""
    tasks = "heavy......", *(f"light {number}" for number in range(1, 5))
    stage.send(*tasks)
    stage.show_until_done(*tasks)
    had = [len(set(tasks) & set(received(worker))) for worker in stage.workers.values()]
    see(sorted(had) == [1, 4], f"one has the heavy task alone (the workers had {had})")
    return "one worker had the heavy task, the other all four light ones"


def play(stage):
    """Play all chapters; return what was seen of each, and what to draw."""
    stage.start_worker("worker 1")
    stage.start_worker("worker 2")
    seen, drawn = [], set(stage.shown)
    for number, chapter in enumerate((round_robin, acknowledgment, durability, fair_dispatch), 1):
        say(f"\n{number}. {chapter.__doc__}\n", BOLD)
        before = set(stage.shown)
        seen.append(f"{number}. {chapter.__doc__}. Seen: {chapter(stage)}.")
        if chapter is acknowledgment:
            drawn |= stage.shown - before
            stage.restart_ended()
    return seen, [(title, text) for _, title, text in sorted(drawn) if title in stage.workers]


def main():
    parser = argparse.ArgumentParser(prog="tests/demo", description=__doc__)
    parser.add_argument("--svg", metavar="FILE", help="draw the second chapter")
    path = parser.parse_args().svg
    kind = brokers.choose()
    say(f"Starting RabbitMQ ({kind.__name__}); the first time takes longer ...")
    stage = Stage(kind())
    try:
        stage.broker.start()
        seen, drawn = play(stage)
    except NotSeen as what:
        stage.show()
        say(f"\nNot seen: {what}", BOLD_RED)
        return 1
    finally:
        stage.close()
        stage.broker.close()
    if path:
        picture.draw(path, drawn, LONG_ONE)
    say("\n".join(["", *seen]), BOLD)
    say("\nEverything that was started is stopped.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
