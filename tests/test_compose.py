"""What Docker makes of docker-compose.yml. (Not collected where the broker is the local one.)"""

import json
import os
import re
import shutil
import uuid
from pathlib import Path

import pika
import pytest

from tests.harness import reaper
from tests.harness.brokers import ROOT, docker
from tests.harness.readmes import block, blocks, commands, steps
from tests.harness.scripts import received_line
from tests.harness.waiting import wait_until

README = (ROOT / "README.md").read_text()
UP, DOWN, COUNT, RESTART = (
    "up --detach --wait",
    "down",
    "exec rabbitmq rabbitmqctl --quiet list_queues name messages_ready messages_unacknowledged",
    "restart --timeout 60",
)


def test_the_readmes_commands_keep_the_tasks_and_volumes_deletes_them(
    running_broker, queue, new_task, worker
):
    """`up --wait` returns when RabbitMQ takes connections: the scripts can run at once."""

    def compose(words):
        assert f"docker compose {words}" in commands("README.md", "docker compose "), words
        return running_broker.compose(*words.split())

    new_task("Restarted")
    compose(RESTART)
    console = worker(waiting=False)  # Docker's proxy takes connections long before RabbitMQ does
    console.wait_for_line(received_line("Restarted"), timeout=150)
    queue.wait_for_counts(0, 0)
    assert f"$ docker compose {COUNT}\n{compose(COUNT)}" == block("console", COUNT)
    console.kill()
    new_task("Outlives.")
    compose(DOWN)
    compose(UP)
    new_task("At once.")
    wait_until(lambda: "task_queue\t2\t0\n" in compose(COUNT), "it counts both")
    queue.delete()
    assert volumes(running_broker)
    compose(f"{DOWN} --volumes")
    assert not volumes(running_broker)


def test_it_starts_on_the_ports_of_the_readme():
    (start, _), (url, _) = steps(block("console", "RABBITMQ_PORT="))
    *variables, docker_, compose, up, detach, wait = start.split()
    assert [docker_, compose, up, detach, wait] == ["docker", "compose", *UP.split()]
    env = {**os.environ, **dict(variable.split("=") for variable in variables)}
    config = json.loads(docker("compose", "config", "--format", "json", env=env))
    published = {port["published"] for port in config["services"]["rabbitmq"]["ports"]}
    assert published == {variable.split("=")[1] for variable in variables}
    assert url == f"export AMQP_URL=amqp://localhost:{env['RABBITMQ_PORT']}"


@pytest.fixture
def worker_image(broker, tmp_path):
    """The image of the README's Dockerfile, but for what needs a network: its base, and pip."""
    [dockerfile] = blocks("README.md", "dockerfile")
    [container] = broker.compose("ps", "--quiet").split()
    base = json.loads(docker("inspect", container))[0]["Config"]["Image"]
    for old, new in {
        "FROM python:3.14-slim\n": f"FROM {base}\nUSER root\n"
        'ENTRYPOINT []\nRUN ln -s "$(command -v python3)" /usr/local/bin/python\n',
        "RUN pip install --no-cache-dir -r /worker/requirements.txt\n": "COPY pika /worker/pika/\n",
    }.items():
        assert old in dockerfile
        dockerfile = dockerfile.replace(old, new)
    (tmp_path / "Dockerfile").write_text(dockerfile)
    for name in ("worker.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(Path(pika.__file__).parent, tmp_path / "pika")
    name = f"work-queue-worker-{uuid.uuid4().hex}"
    duty = reaper.at_exit("docker", "rmi", "--force", name)
    docker("build", "--quiet", "--tag", name, str(tmp_path))
    yield name
    docker("rmi", "--force", name)
    reaper.forget(duty)


def test_a_worker_in_a_container_gets_sigterm_and_ends_when_its_task_is_done(
    broker, queue, worker_image, tmp_path
):
    """As the README's service beside that of docker-compose.yml, and where the work may write."""
    [service] = blocks("README.md", "yaml")
    assert "    build: .\n" in service
    file, project = tmp_path / "worker.yml", broker.project
    file.write_text(service.replace("build: .", f"image: {worker_image}"))
    both = ["compose", "--project-directory", str(ROOT), "--file", str(ROOT / broker.file)]
    both += ["--file", str(file), "--project-name", project]

    def compose(*words):
        return docker(*both, *words, env=broker.env)

    def log():
        shown = compose("logs", "--no-color", "--no-log-prefix", "worker")
        return shown.replace("\x1b[2K", "")  # compose's, before each line

    try:
        given = "".join(commands("README.md", "docker compose "))
        # As below, but for the number, the build and the other service.
        for words in ("--scale worker=2", "--build worker"):
            assert f"docker compose up --detach {words}" in given
        compose("up", "--detach", "--no-deps", "worker")
        wait_until(lambda: "Waiting" in log(), "it waits for messages")
        compose("exec", "-T", "worker", "touch", "written")
        queue.publish(b"task...")
        wait_until(lambda: "Received" in log(), "it has the task")
        [container] = compose("ps", "--quiet", "worker").split()
        for words in ("kill worker", "start worker", "logs --timestamps --tail 50 worker"):
            assert f"docker compose {words}" in given
        assert "Waiting" in compose("logs", "--timestamps", "--tail", "50", "worker")
        restart = commands("README.md", "docker restart ")[0].split()[1:-1]
        compose("stop", "worker")
        assert log().endswith(" [x] Received task...\n [x] Done\n")
        assert json.loads(docker("inspect", container))[0]["State"]["ExitCode"] == 0
        wait_until(lambda: queue.ready() == 0, "nothing is left")
        compose("start", "worker")
        wait_until(lambda: queue.consumers() == 1, "it consumes again")
        docker(*restart, container)
        wait_until(lambda: log().count("Waiting") == 3, "it was killed and runs again")
        compose("kill", "worker")
    finally:
        compose("rm", "--force", "--stop", "worker")
        docker("volume", "rm", "--force", f"{project}_work")


def volumes(broker):
    label = f"label=com.docker.compose.project={broker.project}"
    return docker("volume", "ls", "--quiet", "--filter", label).split()


def test_the_clusters_address_in_the_readme_has_its_ports():
    [address] = commands("tests/README.md", "export AMQP_URL=")
    config = docker("compose", "--file", "tests/cluster/docker-compose.yml", "config")
    published = re.findall(r'target: 5672\n\s+published: "(\d+)"', config)
    assert re.findall(r"localhost:(\d+)", address) == published
    assert len(published) == 3


def test_its_ports_are_published_on_this_machine_alone(broker):
    container = broker.compose("ps", "--quiet").strip()
    published = json.loads(docker("inspect", container))[0]["NetworkSettings"]["Ports"]
    hosts = {binding["HostIp"] for bindings in published.values() for binding in bindings or []}
    assert hosts == {"127.0.0.1"}


def test_it_has_a_bounded_number_of_file_descriptors(broker):
    assert int(broker.compose("exec", "-T", "rabbitmq", "sh", "-c", "ulimit -n")) <= 65536
