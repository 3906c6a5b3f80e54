"""The commands in the READMEs, for the tests that run them."""

import re

from tests.harness.consoles import ROOT


def commands(name, start):
    """Return the commands of a README that begin with `start`, in its order, each on one line.

    They stand behind a `$ ` or between backquotes. A TEST_BROKER before one is left out: the
    tests have their broker.
    """
    text = re.sub(r"^```.*$", "", (ROOT / name).read_text(), flags=re.MULTILINE)
    found = (a or b for a, b in re.findall(r"^\$ (.*)$|`([^`]*)`", text, re.MULTILINE))
    found = (re.sub(r"^TEST_BROKER=\w+ ", "", " ".join(command.split())) for command in found)
    return [command for command in found if command.startswith(start)]
