"""The READMEs' commands and transcripts, run and compared, so that they cannot rot.

Those for Docker are run in test_compose.py, those for the cluster in test_cluster.py.
"""

import gzip
import os
import re
import shutil
import subprocess
import sys

import pika
import pytest

from tests.harness.brokers import run
from tests.harness.consoles import ROOT
from tests.harness.readmes import commands
from tests.harness.scripts import DONE, FAILED, WAITING, received_line
from tests.harness.waiting import wait_until

README = (ROOT / "README.md").read_text()
CONSOLES = re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
TEXTS = re.findall(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SCRIPTS = {name: (ROOT / name).read_text() for name in ("new_task.py", "worker.py")}


def test_the_three_consoles_show_what_the_readme_shows(workers, open_console):
    """Every `$ python ...` of the consoles is run in order, and their output compared whole."""
    session = next(block for block in CONSOLES if "new_task.py First" in block)
    waiting = next(block for block in CONSOLES if "$ python worker.py" in block)
    workers = workers(2)
    assert [f"$ python worker.py\n{workers[0].out[0]}\n"] == [waiting]
    seen = ""
    for command in commands("README.md", "python new_task.py")[:5]:
        _, name, *words = command.split()
        console = open_console(sys.executable, ROOT / name, *words)
        assert console.wait() == 0
        seen += f"$ {command}\n" + "".join(f"{line}\n" for line in console.out)
    assert seen == session
    [first] = TEXTS
    wait_until(lambda: len(workers[0].out) >= len(first.splitlines()), "the first worker's lines")
    assert workers[0].out == first.splitlines()


def test_the_long_task_and_the_file_are_sent_as_the_readme_says(worker, open_console, tmp_path):
    """With `python` and the folder of the scripts as a reader has them."""
    long, file = commands("README.md", "python new_task.py")[5:]
    (tmp_path / "tasks.txt").write_text("from a file\nand another\n")
    (tmp_path / "new_task.py").write_bytes((ROOT / "new_task.py").read_bytes())
    console = worker()
    for command in (file, long):
        line = re.sub("^python", sys.executable, command)
        sent = open_console("bash", "-c", line, cwd=tmp_path)
        assert sent.wait() == 0, sent.transcript
    for task in ("from a file", "and another", long.removeprefix("python new_task.py ")):
        console.wait_for_line(received_line(task))


def test_a_line_of_code_in_the_text_is_in_the_scripts():
    found = re.findall(r"`((?:ch|channel|delivery_mode)\b[.=][^`]+)`", README)
    assert len(found) == 5
    for line in found:
        assert any(line in text for text in SCRIPTS.values()), line


@pytest.fixture
def own_work(open_console, tmp_path):
    """worker.py with the README's work() in place of its own, in a folder of its own."""
    [work] = [block for block in PYTHON if "def work" in block]
    imports, work = work.split("\n\n\n")
    text = re.sub(r"def work\(.*?\n\n\n", lambda _: work + "\n\n", SCRIPTS["worker.py"], flags=re.S)
    (tmp_path / "worker.py").write_text(text.replace("import os\n", f"{imports}\nimport os\n"))
    console = open_console(sys.executable, "worker.py", cwd=tmp_path)
    console.wait_for_line(WAITING)
    return console


def test_the_work_of_the_readme_compresses_and_writes_down_what_it_cannot_read(
    own_work, queue, tmp_path
):
    (tmp_path / "a.txt").write_text("something")
    for body in (b"no JSON", rb'{"file": "\u0000"}', b'{"file": "a.txt"}', b'{"file": "late.txt"}'):
        queue.publish(body)
    own_work.wait_for_line(FAILED, count=2)  # that file is not there yet
    (tmp_path / "late.txt").write_text("something")
    own_work.wait_for_line(DONE, count=4)
    assert (tmp_path / "rejected.txt").read_bytes() == b'no JSON\n{"file": "\\u0000"}\n'
    for name in ("a", "late"):
        assert gzip.decompress((tmp_path / f"{name}.txt.gz").read_bytes()) == b"something"


def test_the_lines_that_send_from_ones_own_program_confirm(broker, queue, worker):
    [code] = [block for block in PYTHON if "def send" in block]
    send = {}
    exec(code, send)
    send["send"](broker.url(), b"from a program")
    body, properties = queue.take()
    assert (body, properties.delivery_mode) == (b"from a program", 2)
    with broker.alarm(), pytest.raises(pika.exceptions.AMQPError):
        send["send"](broker.url(query="blocked_connection_timeout=1"), b"in an alarm")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here; CI has it")
def test_the_unit_is_one_that_systemd_takes(tmp_path):
    """But for the place of the worker, which is here."""
    [unit] = re.findall(r"^```ini\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    unit = unit.replace("/opt/worker/.venv/bin/python", sys.executable).replace(
        "/opt/worker", str(ROOT)
    )
    (tmp_path / "worker@.service").write_text(unit)
    (tmp_path / "worker@1.service").symlink_to("worker@.service")
    verified = subprocess.run(
        ["systemd-analyze", "verify", "./worker@1.service"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (verified.stdout, verified.stderr, verified.returncode) == ("", "", 0)


def test_the_table_of_failures_has_every_advice_of_the_scripts():
    table = README.split("## What can go wrong")[1]
    advices = re.findall(r'^ +(?:"[^"]+": )?"([^";,]+)[;,] .*"', SCRIPTS["worker.py"], re.MULTILINE)
    assert len(set(advices)) == 6
    for advice in advices:
        assert f"| `{advice}" in table, advice


def test_the_readmes_settings_are_those_of_the_files():
    text = "".join(SCRIPTS.values()) + (ROOT / "docker-compose.yml").read_text()
    text += "SSL_CERT_FILE"  # OpenSSL's own; test_tls.py uses it
    for name in re.findall(r"`([A-Z]+_[A-Z_]+)`", README):
        assert name in text, name


def test_the_commands_that_install_are_runnable(tmp_path):
    """The by-hand block, but for Docker's line: in a folder with copies of the scripts alone."""
    lines = [*commands("README.md", "python3 "), *commands("README.md", ". .venv")]
    lines += commands("README.md", "pip ")
    for name in ("new_task.py", "worker.py", "requirements.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    lines += ["python worker.py --help", "python new_task.py --help"]
    shown = run("bash", "-ec", "\n".join(lines), cwd=tmp_path)
    assert "usage: worker.py" in shown and "Usage: python new_task.py" in shown


@pytest.mark.parametrize("command", commands("tests/README.md", "tests/run "))
def test_a_command_that_runs_tests_selects_some(command):
    outside = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    run("bash", "-c", f"{command} --collect-only --quiet", env=outside)


@pytest.mark.parametrize("tool", ["soak", "bench"])
def test_the_long_run_and_the_benchmark_take_the_arguments_of_the_readme(tool):
    """Arguments are looked at in their order, and all that stand before --help must be valid."""
    for command in commands("tests/README.md", f"tests/{tool} "):
        run(sys.executable, "-m", f"tests.tools.{tool}", *command.split()[1:], "--help")


def test_the_files_that_the_readmes_name_are_there():
    both = README + (ROOT / "tests/README.md").read_text()
    folders = [ROOT, *(ROOT / "tests" / name for name in ("", "harness", "tools"))]
    for name in re.findall(r"`((?:tests/)?(?:test_)?\w+\.(?:py|txt|yml))`", both):
        assert any((folder / name).exists() for folder in folders) or name == "tasks.txt", name
    for command in re.findall(r"tests/(\w+)\b(?= |$|`)", both, re.MULTILINE):
        assert (ROOT / "tests" / command).exists(), command
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert top >= {
        "new_task.py",
        "worker.py",
        "requirements.txt",
        "README.md",
        "docker-compose.yml",
        "tests",
    }
