"""Play README.md's tutorial in four chapters, and show as it happens what its consoles show."""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.harness import brokers
from tests.harness.consoles import ROOT, Console
from tests.harness.pages import LEARN, block, blocks, steps
from tests.harness.queues import Queue
from tests.harness.scripts import NEW_TASK, WORKER, done, received
from tests.harness.waiting import NotSeen, wait_until
from tests.tools import picture

FIRST, SECOND, THIRD = "first console", "second console", "third console"
COLOURS = {FIRST: "36", SECOND: "35", THIRD: "32", "RabbitMQ": "33"}  # as a terminal numbers them
IDLE, WITH_A_TASK = (one for one in blocks(LEARN, "console") if "python worker.py" in one)
LONG_ONE = "A long one.........."


def see(condition, what):
    if not condition:
        raise NotSeen(what)


def say(text):
    print(f"{text}\n", end="", flush=True)  # in one piece, as each console has a thread of its own


class Stage:
    """RabbitMQ, a folder with its reader's files, the consoles, and what these have shown."""

    def __init__(self, broker, folder):
        self.broker, self.queue, self.folder = broker, Queue(broker), folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = {**broker.shell_env, "AMQP_URL": broker.url(), "PATH": path}
        self.consoles = []
        self.workers = {}  # by their titles
        self.stopped = None  # the title of one
        self.shown = []  # (title, text)

    def show(self, title, text):
        self.shown.append((title, text))
        line = f"{title} | {text}"
        if sys.stdout.isatty():
            line = f"\033[{COLOURS[title]}m{line}\033[m"
        say(line)

    def type_in(self, title, command):
        self.show(title, f"$ {command}")
        show = partial(self.show, title)
        console = Console("bash", "-c", command, cwd=self.folder, env=self.env, show=show)
        self.consoles.append(console)
        return console

    def follow(self, words):
        """Type the README's console in which `words` stand, and see that it shows what it says.

        Where RabbitMQ is not in Docker, it is restarted in another way, and the rest left out.
        """
        for command, lines in steps(block("console", words)):
            if self.broker.in_docker or "docker" not in command:
                console = self.type_in(THIRD, command)
                see(console.wait() == 0, f"it ends well: {command}")
                see(console.out == lines or not lines, f"{command} shows {lines}")
            elif "restart" in command:
                self.show("RabbitMQ", "restarts")
                self.broker.stop()
                self.broker.start()

    def start_worker(self, title, console):
        """Start a worker, and wait until it shows what the README's `console` does, and consumes.

        The worker that consumes first gets the first task.
        """
        [(command, lines)] = steps(console)
        worker = self.workers[title] = self.type_in(title, command)
        wait_until(lambda: worker.out == lines, f"{title} shows {lines}")
        running = [one for one in self.workers.values() if one.process.poll() is None]
        wait_until(lambda: self.queue.consumers() == len(running), "all workers consume")

    def stop_worker(self, title):
        self.show(title, "^C")
        self.workers[title].ctrl_c()
        see(self.workers[title].wait() == 0, f"{title}'s worker ends")

    def wait_until_done(self, count):
        """Wait until the workers that were started last have done so many tasks."""
        wait_until(lambda: len(done(*self.workers.values())) == count, f"{count} are done")

    def close(self):
        for console in self.consoles:
            console.close()


# --- The chapters: each plays, and returns what was seen; its docstring is its title ---


def round_robin(stage):
    """1. Round-robin dispatching: two workers get five tasks in turn"""
    stage.follow("First message.")
    stage.wait_until_done(5)
    first = block("text", "Third message...").splitlines()
    see(stage.workers[FIRST].out == first, f"the first shows {first}")
    others = ["Second message..", "Fourth message...."]
    see(received(stage.workers[SECOND]) == others, f"the second has received {others}")
    return "the first had three, the second two, in turn"


def acknowledgment(stage):
    """2. Message acknowledgment: a worker is stopped in mid-task, and the other has its task"""

    def having():
        return [title for title in stage.workers if LONG_ONE in received(stage.workers[title])]

    stage.follow(LONG_ONE)
    [stage.stopped] = wait_until(having, "a worker has it")
    stage.stop_worker(stage.stopped)
    wait_until(lambda: len(having()) == 2, "the other worker has it", timeout=5)
    stage.wait_until_done(6)
    stage.queue.wait_for_counts(0, 0)
    stage.follow("list_queues name")
    return "the other had it at once, and did it"


def durability(stage):
    """3. Message durability: RabbitMQ restarts, and its task is still there"""
    stage.stop_worker(({FIRST, SECOND} - {stage.stopped}).pop())
    stage.follow(f"{NEW_TASK} Kept")
    stage.start_worker(FIRST, WITH_A_TASK)
    return "the task was kept, and done"


def fair_dispatch(stage):
    """4. Fair dispatch: no light task waits behind a heavy one"""
    stage.start_worker(SECOND, IDLE)
    stage.follow("Heavy")
    stage.wait_until_done(4)
    had = [set(received(worker)) - {"Kept"} for worker in stage.workers.values()]
    see({"Heavy.........."} in had, f"one has the heavy task alone (the workers had {had})")
    return "one worker had the heavy task, the other both light ones"


def play(stage):
    """Play all chapters; return what to draw."""
    stage.queue.declare()
    stage.start_worker(FIRST, IDLE)
    stage.start_worker(SECOND, IDLE)
    drawn = list(stage.shown)
    for chapter in (round_robin, acknowledgment, durability, fair_dispatch):
        say(f"\n{chapter.__doc__}\n")
        before = len(stage.shown)
        say(f"\nSeen: {chapter(stage)}.")
        if chapter is acknowledgment:
            drawn += stage.shown[before:]
    return [line for line in drawn if line[0] != THIRD]


def main():
    parser = argparse.ArgumentParser(prog="tests/demo", description=__doc__)
    parser.add_argument("--svg", metavar="FILE", help="draw the second chapter")
    path = parser.parse_args().svg
    say("Starting RabbitMQ; the first time takes longer ...")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for name in (NEW_TASK, WORKER, "docker-compose.yml"):
            shutil.copy(ROOT / name, folder)
        broker = stack.enter_context(contextlib.closing(brokers.choose()()))
        broker.start()
        stage = stack.enter_context(contextlib.closing(Stage(broker, folder)))
        try:
            drawn = play(stage)
        except NotSeen as what:
            sys.exit(f"\nNot seen: {what}")
    if path:
        picture.draw(path, drawn, stage.stopped, LONG_ONE)
    say("\nEverything that was started is stopped.")


if __name__ == "__main__":
    # A shell that starts us in the background has us ignore Ctrl+C, and our consoles would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
