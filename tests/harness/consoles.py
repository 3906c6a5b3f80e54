"""Programs started as a user starts them, each in a console of its own that can be read."""

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tests.harness import reaper
from tests.harness.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent


class Line(NamedTuple):
    """A line that a console showed: on which stream, what, and when (monotonic seconds)."""

    stream: str
    text: str
    at: float


class Console:
    """A running program, what it has printed, and the ways to end it.

    `on_line` is called with each Line as it comes, from one thread for each stream.
    """

    def __init__(
        self, *argv, env=None, stdin=subprocess.DEVNULL, cwd=ROOT, name=None, on_line=None
    ):
        self.name = name or " ".join(str(word) for word in argv[1:])
        self.lines, self.on_line = [], on_line
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            argv,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.duty = reaper.at_exit("kill", "-KILL", "--", f"-{self.process.pid}")
        self.stdin = self.process.stdin
        self.readers = [
            threading.Thread(target=self._read, args=(stream, pipe), daemon=True)
            for stream, pipe in (("out", self.process.stdout), ("err", self.process.stderr))
        ]
        for reader in self.readers:
            reader.start()

    def _read(self, stream, pipe):
        for raw in pipe:
            text = raw.decode(errors="surrogateescape").removesuffix("\n")
            line = Line(stream, text, time.monotonic())
            self.lines.append(line)
            if self.on_line:
                self.on_line(line)
        pipe.close()

    def texts(self, stream):
        return [line.text for line in list(self.lines) if line.stream == stream]

    @property
    def out(self):
        """The lines of standard output so far."""
        return self.texts("out")

    @property
    def err(self):
        """The lines of standard error so far."""
        return self.texts("err")

    @property
    def transcript(self):
        """All that the console showed, for a failing test's report."""
        shown = "".join(
            f"{line.at - self.started:8.2f} {line.stream} {line.text}\n"
            for line in list(self.lines)
        )
        return f"--- {self.name} (exit status {self.process.poll()})\n{shown}"

    def wait_for_line(self, pattern, timeout=60.0, count=1):
        """Return the `count`-th line that matches `pattern`; fail once it cannot come."""

        def found():
            ended = self.process.poll() is not None
            if ended:
                for reader in self.readers:
                    reader.join()
            hits = [line for line in list(self.lines) if re.fullmatch(pattern, line.text)]
            if len(hits) >= count:
                return hits[count - 1]
            if ended:
                raise AssertionError(f"ended without {pattern!r}:\n{self.transcript}")
            return None

        try:
            return wait_until(found, f"line {count} like {pattern!r}", timeout, poll=0.01)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.transcript}") from None

    def wait(self, timeout=90.0):
        """Wait until the program ends by itself; return its exit status."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:g} s\n{self.transcript}") from None
        for reader in self.readers:
            reader.join()
        reaper.forget(self.duty)
        return status

    def signal(self, signum):
        self.process.send_signal(signum)

    def ctrl_c(self):
        self.signal(signal.SIGINT)

    def kill(self):
        """End the program as `kill -9` does, thawed or frozen, and everything it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()

    def close(self):
        self.kill()
        if self.stdin:
            self.stdin.close()
