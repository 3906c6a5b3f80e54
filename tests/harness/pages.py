"""What stands in the pages for users, for the tests that type it and compare it."""

import re

from tests.harness.consoles import ROOT

LEARN, USE = (ROOT / "README.md").read_text().split("\n## Use it\n")
JOBS = (ROOT / ".github/jobs.md").read_text()
SERVICE = (ROOT / ".github/service.md").read_text()
PAGES = LEARN + USE + JOBS + SERVICE
CLUSTER = (ROOT / "tests/cluster/README.md").read_text()
NOT_TYPED = (ROOT / "tests/not_typed.txt").read_text().splitlines()

PROGRAMS = (
    "brew choco df docker for free git grep lsof net netstat openssl ping pip py python python3 "
    "rabbitmq-diagnostics rabbitmqctl rm set ss sudo systemctl tasklist tests/ $env: .venv\\ "
    "Set-ExecutionPolicy"
).split() + ["{ echo"]


def blocks(text, language):
    """Return the blocks of code of a page in `language`, as their texts."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [one.removeprefix(indent).replace(f"\n{indent}", "\n") for indent, one in found]


def block(language, words):
    """Return the one block of the pages in `language` in which `words` stand."""
    found = [one for one in blocks(PAGES, language) if words in one]
    assert len(found) == 1, f"{words!r} stands in {len(found)} blocks"
    return found[0]


def steps(console):
    """Return (command, the lines that it prints) for each command of a block of a console."""
    typed = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", console, re.MULTILINE)
    return [(command, shown.splitlines()) for command, shown in typed]


def typed(words):
    """Return the commands of the one console in which `words` stand."""
    return [command for command, _ in steps(block("console", words))]


def commands(text, *programs):
    """Return the commands of a page, or those of `programs`, each once, on one line.

    Each stands behind a `$ `; or between backquotes, if there is more than the name of a program.
    """
    found = re.findall(r"^ *\$ (.*)$|(?<!`)`([^`]+)`(?!`)", text, re.MULTILINE)
    found = [(console, " ".join(named.split())) for console, named in found]
    starts = tuple(name + " " * name[-1].isalnum() for name in programs or PROGRAMS)
    typed = [
        console or named
        for console, named in found
        if (console and not programs) or (console or named).startswith(starts)
    ]
    return list(dict.fromkeys(typed))


def edited(text, edits):
    """Return `text` with each of `edits` (old text: new text) made; fail if one is not there."""
    for old, new in edits.items():
        assert old in text, old
        text = text.replace(old, new)
    return text
