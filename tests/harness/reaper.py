"""Ends what this process has started once it is gone, however it went: `kill -9` is no exception.

A small process of its own is told through a pipe what there is to end, and what was ended already.
When the pipe ends, so has its writer, and the reaper runs the commands that are left, newest first.
"""

import itertools
import json
import signal
import subprocess
import sys

keys = itertools.count()
reaper = None


def tell(*what):
    global reaper
    if reaper is None:
        reaper = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
    reaper.stdin.write(json.dumps(what) + "\n")
    reaper.stdin.flush()


def at_exit(*command):
    """Have `command` run when this process is gone; return a key by which to forget it."""
    key = next(keys)
    tell(key, [str(word) for word in command])
    return key


def forget(key):
    """Have the command of this key not run: what it would end has ended."""
    tell(key, None)


def main():
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    commands = {}
    for line in sys.stdin:
        key, command = json.loads(line)
        if command:
            commands[key] = command
        else:
            commands.pop(key, None)
    for command in reversed(commands.values()):
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)


if __name__ == "__main__":
    main()
