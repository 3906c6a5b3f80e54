"""Play the tutorial in four chapters, and show as it happens what its consoles show."""

import argparse
import contextlib
import signal
import sys
from functools import partial

from tests.harness import brokers
from tests.harness.consoles import Console
from tests.harness.queues import Queue
from tests.harness.scripts import FIVE_TASKS, NEW_TASK, WAITING, WORKER, done, received
from tests.harness.waiting import NotSeen, wait_until
from tests.tools import picture

# As a terminal numbers them.
COLOURS = {"worker 1": "36", "worker 2": "35", "producer": "32", "RabbitMQ": "33"}
LONG_ONE = "A long one....."


def see(condition, what):
    if not condition:
        raise NotSeen(what)


def say(text):
    print(text, flush=True)


class Stage:
    """RabbitMQ, the consoles, and what these have shown."""

    def __init__(self, broker):
        self.broker, self.queue = broker, Queue(broker)
        self.consoles = []
        self.workers = {}  # by their titles
        self.killed = None  # the title of one
        self.shown = []  # (title, text)

    def show(self, title, text):
        self.shown.append((title, text))
        line = f"{title} | {text}"
        if sys.stdout.isatty():
            line = f"\033[{COLOURS[title]}m{line}\033[m"
        say(line)

    def open(self, title, *argv):
        self.show(title, f"$ python {' '.join(argv)}")
        env, show = {"AMQP_URL": self.broker.url()}, partial(self.show, title)
        self.consoles.append(Console(sys.executable, *argv, env=env, show=show))
        return self.consoles[-1]

    def start_worker(self, title):
        """Start a worker and wait until it consumes, as the first that does gets the first task."""
        before = self.queue.consumers()
        self.workers[title] = self.open(title, WORKER)
        self.workers[title].wait_for_line(WAITING)
        wait_until(lambda: self.queue.consumers() > before, f"{title} consumes")

    def send(self, *tasks):
        for task in tasks:
            sent = self.open("producer", NEW_TASK, *task.split())
            see(sent.wait() == 0, f"it is sent: {task}")

    def wait_until_done(self, *tasks):
        """Wait until the workers have done these tasks."""
        workers = self.workers.values()
        wait_until(lambda: set(tasks) <= set(done(*workers)), f"all are done: {tasks}")

    def close(self):
        for console in self.consoles:
            console.close()
        self.broker.close()


# --- The chapters: each plays, and returns what was seen; its docstring is its title ---


def round_robin(stage):
    """1. Round-robin dispatching: two workers get five tasks in turn"""
    stage.send(*FIVE_TASKS)
    stage.wait_until_done(*FIVE_TASKS)
    had = [received(worker) for worker in stage.workers.values()]
    see(had == [FIVE_TASKS[::2], FIVE_TASKS[1::2]], "they get the tasks in turn")
    return "worker 1 had three, worker 2 had two, in turn"


def acknowledgment(stage):
    """2. Message acknowledgment: a worker is killed in mid-task, and the other has its task"""

    def having():
        return [title for title in stage.workers if LONG_ONE in received(stage.workers[title])]

    stage.send(LONG_ONE)
    [stage.killed] = wait_until(having, "a worker has it")
    stage.show(stage.killed, "Killed")
    stage.workers[stage.killed].signal(signal.SIGKILL)
    wait_until(lambda: len(having()) == 2, "the other worker has it", timeout=5)
    stage.wait_until_done(LONG_ONE)
    return "the other had it at once, and did it"


def durability(stage):
    """3. Message durability: RabbitMQ restarts, and its tasks and the workers are still there"""
    stage.start_worker(stage.killed)
    tasks = "In hand.....", "In hand, too.....", "Waits."
    stage.send(*tasks)
    stage.show("RabbitMQ", "stops")
    stage.broker.stop()
    see("Waits." not in received(*stage.workers.values()), "a task waits")
    stage.broker.start()
    stage.show("RabbitMQ", "is back")
    wait_until(lambda: stage.queue.consumers() == 2, "both workers are back")
    stage.wait_until_done(*tasks)
    return "both workers came back, and all three tasks were done"


def fair_dispatch(stage):
    """4. Fair dispatch: no light task waits behind a heavy one"""
    tasks = "heavy......", "light 1", "light 2", "light 3", "light 4"
    stage.send(*tasks)
    stage.wait_until_done(*tasks)
    had = [len(set(tasks) & set(received(worker))) for worker in stage.workers.values()]
    see(sorted(had) == [1, 4], f"one has the heavy task alone (the workers had {had})")
    return "one worker had the heavy task, the other all four light ones"


def play(stage):
    """Play all chapters; return what to draw."""
    stage.broker.start()
    stage.queue.declare()
    stage.start_worker("worker 1")
    stage.start_worker("worker 2")
    drawn = list(stage.shown)
    for chapter in (round_robin, acknowledgment, durability, fair_dispatch):
        say(f"\n{chapter.__doc__}\n")
        before = len(stage.shown)
        say(f"\nSeen: {chapter(stage)}.")
        if chapter is acknowledgment:
            drawn += stage.shown[before:]
    return [line for line in drawn if line[0] in stage.workers]


def main():
    parser = argparse.ArgumentParser(prog="tests/demo", description=__doc__)
    parser.add_argument("--svg", metavar="FILE", help="draw the second chapter")
    path = parser.parse_args().svg
    say("Starting RabbitMQ; the first time takes longer ...")
    with contextlib.closing(Stage(brokers.choose()())) as stage:
        try:
            drawn = play(stage)
        except NotSeen as what:
            sys.exit(f"\nNot seen: {what}")
    if path:
        picture.draw(path, drawn, stage.killed, LONG_ONE)
    say("\nEverything that was started is stopped.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
