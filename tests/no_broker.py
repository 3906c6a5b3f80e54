"""Run both scripts where nothing listens, on any system: python tests/no_broker.py

It needs pika alone, and so runs on macOS and Windows, where the other tests do not.
"""

import os
import subprocess
import sys
import threading

env = {**os.environ, "AMQP_URL": "amqp://localhost:1"}

sent = subprocess.run(
    [sys.executable, "new_task.py", "task"], env=env, capture_output=True, text=True, timeout=60
)
print(sent.stderr, end="")
assert (sent.returncode, sent.stdout) == (1, ""), sent
assert sent.stderr.startswith("new_task.py: cannot send to localhost:1: nothing listens there"), (
    sent
)
assert sent.stderr.count("\n") == 1, sent

with subprocess.Popen(
    [sys.executable, "worker.py"], env=env, stderr=subprocess.PIPE, text=True
) as worker:
    limit = threading.Timer(90, worker.kill)  # else one that says nothing would never end
    limit.start()
    for _ in range(2):
        line = worker.stderr.readline()
        print(line, end="")
        assert line.startswith("worker.py: cannot consume from localhost:1: nothing listens"), line
        assert line.endswith("; trying again\n"), line
    worker.terminate()  # runs no handler on Windows
    assert worker.wait(60) == (1 if os.name == "nt" else 0), worker.returncode
    assert worker.stderr.read().count("\n") <= 1  # a try that was under way has failed, too
    limit.cancel()
