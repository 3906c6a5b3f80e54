"""Programs started as a user starts them, each in a console of its own that can be read."""

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tests.harness import reaper
from tests.harness.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent


def file_of(data):
    """Return a file with `data` (bytes), open at its beginning; it goes when it is closed."""
    file = tempfile.TemporaryFile()
    file.write(data)
    file.seek(0)
    return file


class Line(NamedTuple):
    """A line that a console showed: on which stream, what, and when (monotonic seconds)."""

    stream: str
    text: str
    at: float


class Console:
    """A running program, what it has printed, and the ways to end it.

    Its standard input is empty, or holds the bytes `stdin`; with subprocess.PIPE it is open. Each
    line is given to `show` as it comes.
    """

    def __init__(self, *argv, env=None, stdin=b"", cwd=ROOT, show=None):
        self.name = " ".join(str(word) for word in argv[1:])
        self.lines = []
        self.show = show or (lambda text: None)
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            argv,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            stdin=file_of(stdin) if isinstance(stdin, bytes) else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.stdin = self.process.stdin
        self.end_group = reaper.at_exit("kill", "-KILL", "--", f"-{self.process.pid}")
        self.readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in ("out", "err")
        ]
        for reader in self.readers:
            reader.start()

    def _read(self, stream):
        with getattr(self.process, f"std{stream}") as pipe:
            for raw in pipe:
                text = raw.decode(errors="surrogateescape").removesuffix("\n")
                self.show(text)
                self.lines.append(Line(stream, text, time.monotonic()))

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

    def __str__(self):
        """Return all that the console showed, with monotonic seconds."""
        shown = "".join(f"{at:10.2f} {stream} {text}\n" for stream, text, at in list(self.lines))
        return f"--- {self.name} (exit status {self.process.poll()})\n{shown}"

    def wait_for_line(self, pattern, timeout=60.0, count=1):
        """Return the `count`-th line that matches `pattern`; fail once it cannot come."""

        def found():
            ended = self.process.poll() is not None
            if ended:
                self.wait()
            hits = [line for line in list(self.lines) if re.fullmatch(pattern, line.text)]
            assert len(hits) >= count or not ended, f"ended without {pattern!r}"
            return hits[count - 1 : count]

        return wait_until(found, f"line {count} like {pattern!r}", timeout, poll=0.01)[0]

    def wait(self, timeout=90.0):
        """Wait until the program ends by itself, and all it showed is read; return its status.

        What it has started may go on, and hold its streams: so it is read for ten seconds at most.
        """
        status = self.process.wait(timeout)
        for reader in self.readers:
            reader.join(10)
        return status

    def type(self, text):
        """Type `text` into standard input."""
        self.stdin.write(text.encode())
        self.stdin.flush()

    def signal(self, signum):
        self.process.send_signal(signum)

    def ctrl_c(self):
        self.signal(signal.SIGINT)

    def kill(self):
        """End the program as `kill -9` does, thawed or frozen, with everything it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()

    def close(self):
        """End it, and what it has started and left, and close what is open."""
        self.end_group()
        self.wait()
        if self.stdin:
            self.stdin.close()
