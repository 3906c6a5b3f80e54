"""worker.py with its reader's own work: whatever that does, and however it fails."""

import os
import re
import signal
import subprocess
import time

import pytest

from tests.harness.scripts import DONE, FAILED, RECEIVED, done
from tests.harness.waiting import wait_until

# --- Work that fails ---

FAILURES = {  # what work() raises: how the line shows it
    r"ValueError('a\x1b[2Jb\nc')": r"ValueError: a\\x1b\[2Jb\\nc",
    "open('/no/such/file')": "FileNotFoundError: .*'/no/such/file'",
    "TimeoutError('mine')": "TimeoutError: mine",
    "ConnectionRefusedError('the database')": "ConnectionRefusedError: the database",
    r"UnicodeEncodeError('utf-8', '\udcff', 0, 1, 'mine')": "UnicodeEncodeError: .*mine",
    "KeyboardInterrupt()": "KeyboardInterrupt",
    "SystemExit(3)": "SystemExit: 3",
    "GeneratorExit()": "GeneratorExit",
    "asyncio.CancelledError()": "asyncio.exceptions.CancelledError",
    "MemoryError()": "MemoryError",
    "SyntaxError('m', ('file', 1, 'a', 'text'))": ".*SyntaxError.*",  # Python 3.11 cannot show it
    r"ValueError('a\nworker.py: cannot do the task: b')": r"ValueError: a\\nworker\.py: .*",
    "type('Vain', (Exception,), {'__notes__': property(lambda self: sys.exit())})()": ".*Vain",
    "type('Empty', (Exception,), {'__len__': lambda self: 0})()": ".*Empty",
    "type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()": ".*Mute: .*",
}


def test_work_that_fails_is_told_and_goes_back_and_the_worker_goes_on(worker_of, queue):
    """Whatever it raises: the task it fails once is done the next time."""
    console = worker_of(
        f"if body in vars(work): return\nvars(work)[body] = 'tried'\n"
        f"raise [{', '.join(f'lambda: {one}' for one in FAILURES)}][int(body)]()"
    )
    queue.publish(*(b"%d" % number for number in range(len(FAILURES))))
    console.wait_for_line(DONE, count=len(FAILURES), timeout=60)
    queue.wait_for_counts(0, 0)
    told = [line for line in console.err if re.fullmatch(FAILED, line)]
    for line, shown in zip(told, FAILURES.values(), strict=True):
        assert re.fullmatch(f"worker.py: cannot do the task: {shown}", line), line
    assert "\x1b" not in "".join(console.err)
    assert console.out.count(" [*] Waiting for messages. To exit press CTRL+C") == 1


def test_its_traceback_leads_to_the_line_that_failed(worker_of, queue):
    """The causes as well; no line is longer than others, and there are about a hundred at most."""
    console = worker_of(
        "try:\n    deep(body)\nexcept KeyError as error:\n"
        "    raise ValueError(body.decode() * 9999 + '\\n' * 9999) from error",
        top="def deep(body):\n    return {}[body]",
    )
    queue.publish(b"key")
    console.wait_for_line(rf" *return {re.escape('{}[body]')}")
    console.wait_for_line(" *ValueError: keykey.*")
    console.wait_for_line(RECEIVED, count=3)
    assert max(map(len, console.err)) < 2000 and len(console.err) <= 3 * 102
    assert console.err[1] == "  Traceback (most recent call last):"
    assert "  KeyError: b'key'" in console.err
    assert any(re.fullmatch(r' *File ".*own\.py", line \d+, in deep', line) for line in console.err)


def test_a_long_traceback_lacks_its_middle_and_says_so(worker_of, queue):
    """Its end is where one's own line stands. Python itself shortens only what calls itself."""
    console = worker_of(
        "try:\n    one(90)\nexcept ZeroDivisionError as error:\n    raise RuntimeError from error",
        top="def one(depth): other(depth)\ndef other(depth): one(depth - 1 if depth else 1 / 0)",
    )
    queue.publish(b"task")
    console.wait_for_line(" *RuntimeError")
    assert len(console.err) == 102
    assert console.err[1] == "  Traceback (most recent call last):"
    assert "      raise RuntimeError from error" in console.err[-10:]
    assert any("left out" in line for line in console.err)


@pytest.mark.parametrize(
    "top",
    [
        "async def own(body): pass",
        "def own(body): yield",
        "async def own(body): yield",
        "async def coroutine(body): pass\nown = lambda body: coroutine(body)",
        "own = lambda body: asyncio.Future(loop=asyncio.new_event_loop())",
        "own = lambda body: worker.futures.ThreadPoolExecutor().submit(print)",
        "own = lambda body: map(print, body.split())",
    ],
)
def test_what_only_looks_done_is_told_and_never_acknowledged(worker_of, queue, top):
    console = worker_of("return own(body)", top=top)
    queue.publish(b"task")
    line = console.wait_for_line(FAILED, count=2).text
    assert "plain function" in line and "asyncio.run()" in line
    assert " [x] Done" not in console.out


def test_a_task_that_always_fails_is_tried_without_haste_and_heartbeats_go_on(
    worker_of, broker, queue
):
    console = worker_of("raise ValueError", url=broker.url(query="heartbeat=1"))
    sent = time.monotonic()
    queue.publish(b"bad")
    assert 4 <= console.wait_for_line(RECEIVED, count=5).at - sent < 4 * 3
    console.signal(signal.SIGTERM)
    assert console.wait() == 0
    assert not any("cannot consume" in line for line in console.err)
    wait_until(lambda: queue.ready() == 1, "the task is back")


def test_one_task_that_always_fails_does_not_keep_a_fleet_from_the_others(worker_of, queue):
    fleet = [worker_of("if body == b'bad': raise ValueError\ntime.sleep(0.01)") for _ in range(4)]
    queue.publish(b"bad")
    wait_until(lambda: any(one.err for one in fleet), "one has tried it")
    queue.publish(*(b"good %d" % number for number in range(400)))
    wait_until(lambda: len(done(*fleet)) == 400, "all the others are done")
    assert all(one.process.poll() is None for one in fleet)


# --- What it keeps: files, threads, processes ---


def test_sigterm_ends_an_idle_worker_as_python_ends(worker_of, queue, orderly, tmp_path):
    """What was written is in the file, and RabbitMQ heard a goodbye."""
    log, bye = tmp_path / "log", tmp_path / "bye"
    console = worker_of(
        "LOG.write('done\\n')",
        top=f"import atexit, pathlib\nLOG = open({str(log)!r}, 'a')\n"
        f"atexit.register(pathlib.Path({str(bye)!r}).touch)",
    )
    queue.publish(b"task")
    console.wait_for_line(DONE)
    queue.wait_for_counts(0, 0)
    console.signal(signal.SIGTERM)
    assert console.wait() == 0
    assert (log.read_text(), bye.exists(), console.err) == ("done\n", True, [])
    orderly(console)


def test_a_dead_workers_processes_do_not_keep_its_task(worker_of, worker, queue):
    """They hold no connection: the task is elsewhere long before heartbeats could tell."""
    pool = "from concurrent.futures import ProcessPoolExecutor\nPOOL = ProcessPoolExecutor(1)"
    console = worker_of("POOL.submit(time.sleep, len(body)).result()", top=pool)
    queue.publish(b"")
    console.wait_for_line(DONE)  # the process is there
    queue.publish(b"x" * 60)
    console.wait_for_line(RECEIVED, count=2)
    other = worker()
    killed = time.monotonic()
    os.kill(console.process.pid, signal.SIGKILL)
    moved = other.wait_for_line(RECEIVED).at
    os.killpg(console.process.pid, signal.SIGKILL)  # what a sudden end leaves behind
    assert moved - killed < 8


def test_sigterm_leaves_no_process_of_the_work(worker_of, queue):
    pool = "from concurrent.futures import ProcessPoolExecutor\nPOOL = ProcessPoolExecutor(2)"
    console = worker_of("assert POOL.submit(abs, -1).result() == 1", top=pool)
    queue.publish(b"task")
    console.wait_for_line(DONE)
    console.signal(signal.SIGTERM)
    assert console.wait() == 0
    group = ["pgrep", "-g", str(console.process.pid)]  # multiprocessing's own process is the last
    wait_until(lambda: not subprocess.run(group, capture_output=True).stdout, "all have ended")
    assert console.err == []


def test_its_thread_outlives_the_connection(worker_of, broker, queue):
    """So does what belongs to that thread, such as a SQLite connection."""
    console = worker_of(
        "vars(own).setdefault('here', body)\nprint(own.here)",
        top="import threading\nown = threading.local()",
    )
    for number, task in enumerate((b"first", b"second"), 1):
        queue.publish(task)
        console.wait_for_line(DONE, count=number)
        broker.ctl("close_all_connections", "test")
    assert console.out.count("b'first'") == 2


def test_what_the_top_of_the_file_sets_holds_in_its_thread(worker_of, queue):
    """Context variables, such as decimal's precision; what work() sets holds in the next task."""
    console = worker_of(
        "print(decimal.getcontext().prec)\ndecimal.getcontext().prec += 1",
        top="import decimal\ndecimal.getcontext().prec = 50",
    )
    queue.publish(b"one", b"two")
    console.wait_for_line(DONE, count=2)
    assert [line for line in console.out if line.isdigit()] == ["50", "51"]


# --- What is shown ---


def test_a_large_body_is_shown_in_part_and_costs_little_more_than_its_size(
    worker_of, new_task, queue
):
    """Whole, it would take 50 times its size. RabbitMQ 4 takes 16 MiB."""
    console = worker_of("if b'x' in body: raise ValueError(body)")
    line = os.urandom(16 << 20).translate(bytes.maketrans(b"x\r\n", b"yyy"))
    assert len(new_task("-", stdin=line).out[0]) < 10_100
    queue.publish(b"x" + b"\xff" * 1_000_000)
    console.wait_for_line(FAILED)
    assert console.out.count(" [x] Done") == 1
    assert max(map(len, console.out + console.err)) < 10_100
    assert int(console.status("VmHWM")) < 150 << 10  # KiB
