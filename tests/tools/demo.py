"""Play the tutorial's round-robin section, and show as it happens what its consoles show."""

import sys
import time

from tests.harness import brokers
from tests.harness.consoles import ROOT, Console
from tests.harness.scripts import done, received
from tests.harness.waiting import wait_until

TASKS = [
    ["First", "message."],
    ["Second", "message.."],
    ["Third", "message..."],
    ["Fourth", "message...."],
    ["Fifth", "message....."],
]
COUNTS = ["list_queues", "name", "messages_ready", "messages_unacknowledged"]


def tell(text=""):
    print(text, flush=True)


class Stage:
    """The consoles, and what of theirs has been shown."""

    def __init__(self, broker):
        self.broker = broker
        self.consoles = {}
        self.shown = {}

    def open(self, title, *argv):
        tell(f"{title} | $ python {' '.join(argv)}")
        name, *words = argv
        console = Console(sys.executable, ROOT / name, *words, env={"AMQP_URL": self.broker.url()})
        self.consoles[console] = title
        self.shown[console] = 0
        return console

    def show(self):
        """Show the lines that have come since the last time, in the order they came."""
        news = []
        for console, title in self.consoles.items():
            lines = list(console.lines)
            news += [(line.at, title, line.text) for line in lines[self.shown[console] :]]
            self.shown[console] = len(lines)
        for _, title, text in sorted(news):
            tell(f"{title} | {text}")

    def show_until(self, condition, what):
        def done():
            self.show()
            return condition()

        wait_until(done, what, timeout=60)
        self.show()

    def show_counts(self):
        """Show the queue as rabbitmqctl sees it, which lags behind by some tenths of a second."""
        shown = self.broker.ctl(*COUNTS)
        self.show()
        tell(f"console 3 | $ rabbitmqctl {' '.join(COUNTS)}")
        for row in shown.splitlines():
            tell(f"console 3 | {row}")

    def close(self):
        for console in self.consoles:
            console.close()


def play(stage):
    workers = []
    for number in (1, 2):  # one after the other, since the first that waits gets the first task
        workers.append(stage.open(f"console {number}", "worker.py"))
        stage.show_until(lambda: workers[-1].out, "the worker waits for messages")
    for words in TASKS:
        sent = stage.open("console 3", "new_task.py", *words)
        stage.show_until(lambda sent=sent: sent.process.poll() is not None, "the task is sent")
        if sent.wait() != 0:
            raise AssertionError(sent.transcript)
    stage.show_counts()
    stage.show_until(
        lambda: len(done(*workers)) == len(TASKS),
        "all tasks are done",
    )
    stage.show_counts()
    for worker in workers:
        tell(f"{stage.consoles[worker]} | ^C")
        worker.ctrl_c()
        worker.wait()
    stage.show()
    tell()
    for worker in workers:
        tell(f"{stage.consoles[worker]} got: {', '.join(received(worker))}")


def main():
    kind = brokers.choose()
    tell(f"Starting RabbitMQ ({kind.__name__}) ...")
    started = time.monotonic()
    broker = kind()
    stage = Stage(broker)
    try:
        broker.start()
        tell(
            f"... which took {time.monotonic() - started:.0f} s. It listens on port {broker.port}."
        )
        tell()
        play(stage)
    finally:
        stage.close()
        broker.close()
    tell("Everything that was started is stopped.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
