"""Ends what this process has started once it is gone, however it went: `kill -9` is no exception.

A small process of its own is told through a pipe what there is to end, and what was ended already.
When the pipe ends, so has its writer, and the reaper runs the commands that are left, newest first.
"""

import functools
import itertools
import json
import signal
import subprocess
import sys

keys = itertools.count()


@functools.cache
def reaper():
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, text=True, start_new_session=True
    )


def tell(*what):
    reaper().stdin.write(json.dumps(what) + "\n")
    reaper().stdin.flush()


def run(command):
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)


def at_exit(*command):
    """Have `command` run when this process is gone; return a function that runs it before."""
    key, command = next(keys), [str(word) for word in command]

    def run_now():
        run(command)
        tell(key, None)

    tell(key, command)
    return run_now


def main():
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    commands = {}
    for line in sys.stdin:
        key, commands[key] = json.loads(line)
    for command in reversed(commands.values()):
        if command:
            run(command)


if __name__ == "__main__":
    main()
