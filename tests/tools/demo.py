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
from tests.harness.consoles import ROOT, Console
from tests.harness.scripts import done, received
from tests.harness.waiting import wait_until

terminal = Terminal(highlight=False, markup=False, soft_wrap=True)  # plain where it is no terminal
COLOURS = {"console 1": "cyan", "console 2": "magenta", "console 3": "green"}


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


def tell(title, text):
    terminal.print(f"{title} | {text}", style=COLOURS.get(title))


def draw(path, *consoles):
    """Write a picture of what consoles have shown, one beside the other, line below line.

    A console is its title and its lines: (seconds, text).
    """
    table = Table(box=None, padding=(0, 2, 0, 0))
    lines = []
    for number, (title, shown) in enumerate(consoles):
        table.add_column(title, no_wrap=True)
        lines += [(at, number, text) for at, text in shown]
    for _, number, text in sorted(lines):
        table.add_row(*[""] * number, text)
    picture = Terminal(record=True, width=142, file=io.StringIO(), highlight=False, markup=False)
    picture.print(table, "")  # rich would define no clip path for the last line
    what = "A worker is killed in the middle of a task, and another does it"
    picture.save_svg(path, title=what, code_format=SVG, unique_id="demo")


class Stage:
    """The consoles, and what of theirs has been shown."""

    def __init__(self, broker):
        self.broker = broker
        self.consoles = {}  # each console's title
        self.shown = {}  # how many of its lines
        self.workers = []  # those of the consoles 1 and 2
        self.picture = []  # what to draw of the second chapter

    def open(self, title, *argv):
        tell(title, f"$ python {' '.join(argv)}")
        name, *words = argv
        console = Console(sys.executable, ROOT / name, *words, env={"AMQP_URL": self.broker.url()})
        self.consoles[console] = title
        self.shown[console] = 0
        return console

    def start_worker(self, number):
        """Start a worker and wait until it waits, as the first that waits gets the first task."""
        before = sum(one.process.poll() is None for one in self.workers)
        worker = self.open(f"console {number}", "worker.py")
        self.show_until(lambda: worker.out, "the worker waits for messages")
        self.show_until(lambda: self.consumers() > before, "RabbitMQ knows the worker")
        return worker

    def consumers(self):
        with self.broker.connect() as connection:
            declared = connection.channel().queue_declare("task_queue", passive=True)
            return declared.method.consumer_count

    def send(self, *tasks):
        for task in tasks:
            sent = self.open("console 3", "new_task.py", *task.split())
            self.show_until(lambda sent=sent: sent.process.poll() is not None, "the task is sent")
            assert sent.wait() == 0 and sent.out == [f" [x] Sent {task}"], sent.transcript

    def show(self):
        """Show the lines that have come since the last time, in the order they came."""
        news = []
        for console, title in self.consoles.items():
            lines = list(console.lines)
            news += [(line.at, title, line.text) for line in lines[self.shown[console] :]]
            self.shown[console] = len(lines)
        for _, title, text in sorted(news):
            tell(title, text)

    def show_until(self, condition, what, timeout=30):
        def met():
            self.show()
            return condition()

        wait_until(met, what, timeout)
        self.show()

    def show_until_done(self, *tasks, timeout=30):
        """Wait until the workers have done these tasks."""
        self.show_until(
            lambda: set(tasks) <= set(done(*self.workers)), f"all are done: {tasks}", timeout
        )

    def close(self):
        for console in self.consoles:
            console.close()


# --- The chapters: each plays, and returns what was seen ---


def round_robin(stage):
    """Round-robin dispatching: two workers get five tasks in turn"""
    for number in (1, 2):
        stage.workers.append(stage.start_worker(number))
    names = (
        "First message.",
        "Second message..",
        "Third message...",
        "Fourth message....",
        "Fifth message.....",
    )
    stage.send(*names)
    stage.show_until_done(*names)
    first, second = (received(worker) for worker in stage.workers)
    assert (first, second) == (list(names[::2]), list(names[1::2])), (first, second)
    return f"console 1 had {len(first)}, console 2 had {len(second)}, in turn"


def acknowledgment(stage):
    """Message acknowledgment: a worker is killed in mid-task, and the other has its task"""
    task = "A long one....."
    stage.send(task)
    stage.show_until(lambda: task in received(*stage.workers), "a worker has it")
    killed = next(one for one in stage.workers if task in received(one))
    number = stage.workers.index(killed)
    tell(stage.consoles[killed], "$ kill -9")
    killed.signal(signal.SIGKILL)
    began = time.monotonic()
    sent = next(one for one in stage.consoles if task in one.name)
    other = stage.workers[1 - number]
    stage.show_until(lambda: task in received(other), "the other worker has it")
    moved = time.monotonic() - began
    stage.show_until(lambda: task in done(other), "the other worker has done it")
    stage.picture = [
        ("one worker", [*shown(killed, task), (began, "Killed")]),
        ("another worker", shown(other, task)),
        ("producer", shown(sent, task)),
    ]
    stage.workers[number] = stage.start_worker(number + 1)
    return f"the other had it after {moved:.1f} s, and did it"


def shown(console, task):
    """Return how a console began, and what it showed of `task`: (seconds, text)."""
    lines = [line for line in list(console.lines) if "*" in line.text or task in line.text]
    if task in done(console):
        lines.append(console.lines[-1])
    command = (console.started, f"$ python {console.name.removeprefix(f'{ROOT}/')}")
    return [command, *((line.at, line.text) for line in lines)]


def durability(stage):
    """Message durability: RabbitMQ restarts with a task waiting, and the workers are still there"""
    tasks = "In hand.....", "In hand, too.....", "Waits."
    stage.send(*tasks)
    began = time.monotonic()
    tell("RabbitMQ", "restarts")
    with ThreadPoolExecutor() as pool:  # what the workers show meanwhile is shown as it happens
        restarted = pool.submit(stage.broker.restart)
        stage.show_until(restarted.done, "RabbitMQ is back", timeout=150)
        restarted.result()
    tell("RabbitMQ", f"is back after {time.monotonic() - began:.0f} s")
    stage.show_until(lambda: stage.consumers() == 2, "both workers are back", timeout=60)
    stage.show_until_done(*tasks, timeout=60)
    assert all(worker.process.poll() is None for worker in stage.workers), "a worker has ended"
    lines = [line for worker in stage.workers for line in list(worker.lines)]
    taken = min(line.at for line in lines if line.text == " [x] Received Waits.")
    back = min(line.at for line in lines if line.at > began and "[*] Waiting" in line.text)
    assert taken > back, "the third task did not wait until RabbitMQ was back"
    return "both workers came back, and all three tasks were done"


def fair_dispatch(stage):
    """Fair dispatch: no light task waits behind a heavy one"""
    tasks = "heavy......", *(f"light {number}" for number in range(1, 5))
    stage.send(*tasks)
    stage.show_until_done(*tasks)
    had = sorted(len(set(tasks) & set(received(worker))) for worker in stage.workers)
    assert had == [1, 4], f"one worker had {had[0]} of the five tasks, the other {had[1]}"
    return "one worker had the heavy task, the other all four light ones"


def play(stage):
    """Play all chapters; return a line for each, and raise AssertionError where one fails."""
    lines = []
    for number, chapter in enumerate((round_robin, acknowledgment, durability, fair_dispatch), 1):
        terminal.print(f"\n{number}. {chapter.__doc__}\n", style="bold")
        began = time.monotonic()
        seen = chapter(stage)
        took = time.monotonic() - began
        lines.append(f"{number}. {chapter.__doc__}. Seen: {seen} ({took:.0f} s).")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", metavar="FILE", help="draw the second chapter")
    path = parser.parse_args().svg
    kind = brokers.choose()
    terminal.print(f"Starting RabbitMQ ({kind.__name__}); the first time takes longer ...")
    started = time.monotonic()
    broker = kind()
    stage = Stage(broker)
    try:
        broker.start()
        ready = time.monotonic() - started
        terminal.print(f"... which took {ready:.0f} s. It listens on port {broker.port}.")
        lines = play(stage)
        if path:
            draw(path, *stage.picture)
    except AssertionError as error:
        stage.show()
        terminal.print(f"\nNot seen: {error}", style="bold red")
        return 1
    finally:
        try:
            stage.close()
        finally:
            broker.close()
    terminal.print("\n" + "\n".join(lines), style="bold")
    terminal.print("\nEverything that was started is stopped.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
