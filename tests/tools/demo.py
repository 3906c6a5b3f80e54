"""Play the tutorial in four chapters, and show as it happens what its consoles show."""

import argparse
import io
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console as Terminal
from rich.table import Table

from tests.harness import brokers
from tests.harness.consoles import Console
from tests.harness.queues import Queue
from tests.harness.scripts import FIVE_TASKS, NEW_TASK, WORKER, done, received
from tests.harness.waiting import wait_until

terminal = Terminal(highlight=False, markup=False, soft_wrap=True)  # plain where it is no terminal
COLOURS = {"worker 1": "cyan", "worker 2": "magenta", "producer": "green"}

# As rich's own format, but for a font from the network.
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; white-space: pre }}
.{unique_id}-title {{ font-family: sans-serif; font-size: 18px }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def draw(path, lines):
    """Write a picture of lines (seconds, console, text), with a column for each console."""
    table = Table(*COLOURS, box=None, padding=(0, 2, 0, 0))
    for _, title, text in sorted(lines):
        table.add_row(*[""] * list(COLOURS).index(title), text)
    picture = Terminal(record=True, width=142, file=io.StringIO(), highlight=False, markup=False)
    picture.print(table, "")  # rich would define no clip path for the last line
    what = "A worker is killed in the middle of a task, and another does it"
    picture.save_svg(path, title=what, code_format=SVG, unique_id="demo")


class Stage:
    """RabbitMQ, the consoles, and what of theirs has been shown."""

    def __init__(self, broker):
        self.broker, self.queue = broker, Queue(broker)
        self.consoles = []  # (title, console)
        self.workers = {}  # by their titles
        self.shown = set()  # (monotonic seconds, title, text)

    def tell(self, title, text, at=None):
        self.shown.add((at or time.monotonic(), title, text))
        terminal.print(f"{title} | {text}", style=COLOURS.get(title))

    def open(self, title, *argv):
        self.tell(title, f"$ python {' '.join(argv)}")
        console = Console(sys.executable, *argv, env={"AMQP_URL": self.broker.url()})
        self.consoles.append((title, console))
        return console

    def start_worker(self, title):
        """Start a worker and wait until it consumes, as the first that does gets the first task."""
        others = [one for one in self.workers.values() if one.process.poll() is None]
        self.workers[title] = self.open(title, WORKER)
        self.show_until(lambda: self.workers[title].out, "the worker waits for messages")
        self.show_until(lambda: self.queue.consumers() > len(others), "RabbitMQ knows the worker")

    def send(self, *tasks):
        for task in tasks:
            sent = self.open("producer", NEW_TASK, *task.split())
            assert sent.wait() == 0 and sent.out == [f" [x] Sent {task}"], str(sent)
            self.show()

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
        wait_until(lambda: self.show() or condition(), what, timeout)
        self.show()

    def show_while(self, action):
        """Show what comes while `action` runs."""
        with ThreadPoolExecutor() as pool:
            running = pool.submit(action)
            self.show_until(running.done, f"the end of {action}", timeout=150)
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
    assert (first, second) == (FIVE_TASKS[::2], FIVE_TASKS[1::2]), (first, second)
    return f"worker 1 had {len(first)}, worker 2 had {len(second)}, in turn"


def acknowledgment(stage):
    """Message acknowledgment: a worker is killed in mid-task, and the other has its task"""
    task = "A long one....."
    stage.send(task)
    stage.show_until(lambda: task in received(*stage.workers.values()), "a worker has it")
    one, other = sorted(stage.workers, key=lambda title: task not in received(stage.workers[title]))
    stage.tell(one, "Killed")
    stage.workers[one].signal(signal.SIGKILL)
    killed = time.monotonic()
    stage.show_until(lambda: task in received(stage.workers[other]), "the other worker has it")
    moved = time.monotonic() - killed
    stage.show_until(lambda: task in done(stage.workers[other]), "the other worker has done it")
    stage.start_worker(one)
    return f"the other had it after {moved:.1f} s, and did it"


def durability(stage):
    """Message durability: RabbitMQ restarts with a task waiting, and the workers are still there"""
    tasks = "In hand.....", "In hand, too.....", "Waits."
    stage.send(*tasks)
    stage.tell("RabbitMQ", "stops")
    stage.show_while(stage.broker.stop)
    assert "Waits." not in received(*stage.workers.values()), "it did not wait"
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
    assert sorted(had) == [1, 4], f"the workers had {had} of the five tasks"
    return "one worker had the heavy task, the other all four light ones"


def play(stage):
    """Play all chapters; return what was seen of each, and what to draw. Or AssertionError."""
    stage.start_worker("worker 1")
    stage.start_worker("worker 2")
    seen, picture = [], set(stage.shown)
    for number, chapter in enumerate((round_robin, acknowledgment, durability, fair_dispatch), 1):
        terminal.print(f"\n{number}. {chapter.__doc__}\n", style="bold")
        before = set(stage.shown)
        seen.append(f"{number}. {chapter.__doc__}. Seen: {chapter(stage)}.")
        if chapter is acknowledgment:
            picture |= stage.shown - before
    return seen, picture


def main():
    parser = argparse.ArgumentParser(prog="tests/demo", description=__doc__)
    parser.add_argument("--svg", metavar="FILE", help="draw the second chapter")
    path = parser.parse_args().svg
    kind = brokers.choose()
    terminal.print(f"Starting RabbitMQ ({kind.__name__}); the first time takes longer ...")
    stage = Stage(kind())
    try:
        stage.broker.start()
        seen, picture = play(stage)
        if path:
            draw(path, picture)
    except AssertionError as error:
        stage.show()
        terminal.print(f"\nNot seen: {error}", style="bold red")
        return 1
    finally:
        stage.close()
        stage.broker.close()
    terminal.print("", *seen, sep="\n", style="bold")
    terminal.print("\nEverything that was started is stopped.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
