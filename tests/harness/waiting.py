"""Waiting for conditions, never for guessed times."""

import time


class NotSeen(AssertionError):
    """What was waited for has not happened."""


def wait_until(condition, what, timeout=60.0, poll=0.05):
    """Return the first true value of `condition()`; fail naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise NotSeen(f"after {timeout:g} s still not: {what}")
        time.sleep(poll)
