"""Run both scripts where nothing listens, on any system: python tests/no_broker.py

It needs pika alone, and so runs on macOS and Windows, where the other tests do not.
"""

import os
import subprocess
import sys

env = {**os.environ, "AMQP_URL": "amqp://localhost:1"}
given = {"env": env, "capture_output": True, "timeout": 30}

sent = subprocess.run([sys.executable, "new_task.py", "task"], **given)
line = sent.stderr.decode().strip()
print(line)
assert line.startswith("new_task.py: cannot send to localhost:1: nothing listens there;")
assert line.endswith("(tasks confirmed: 0)") and "\n" not in line
assert (sent.returncode, sent.stdout) == (1, b"")

try:
    raise AssertionError(subprocess.run([sys.executable, "worker.py"], **given))
except subprocess.TimeoutExpired as ended:  # as it should be: it tries again and again
    lines = ended.stderr.decode().splitlines()
print(*lines, sep="\n")
assert len(lines) >= 2
for line in lines:
    assert line.startswith("worker.py: cannot consume from localhost:1: nothing listens there;")
    assert line.endswith("; trying again")
