"""What stands in the READMEs, for the tests that run it and compare it."""

import re

from tests.harness.consoles import ROOT


def blocks(name, language):
    """Return the blocks of code of a README in `language`, as their texts."""
    text = (ROOT / name).read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [one.removeprefix(indent).replace(f"\n{indent}", "\n") for indent, one in found]


def block(language, text):
    """Return the one block of README.md in `language` in which `text` stands."""
    [found] = [one for one in blocks("README.md", language) if text in one]
    return found


def steps(console):
    """Return (command, the lines that it prints) for each command of a block of a console."""
    commands = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", console, re.MULTILINE)
    return [(command, shown.splitlines()) for command, shown in commands]


def commands(name, *starts):
    """Return the commands of a README that begin with one of `starts`, each once, on one line.

    They stand behind a `$ ` or between backquotes.
    """
    text = (ROOT / name).read_text()
    found = re.findall(r"^ *\$ (.*)$|(?<!`)`([^`]+)`(?!`)", text, re.MULTILINE)
    found = (" ".join((typed or named).split()) for typed, named in found)
    return list(dict.fromkeys(command for command in found if command.startswith(starts)))


def edited(text, edits):
    """Return `text` with each of `edits` (old text: new text) made; fail if one is not there."""
    for old, new in edits.items():
        assert old in text, old
        text = text.replace(old, new)
    return text
