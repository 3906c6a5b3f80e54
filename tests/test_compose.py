"""What Docker makes of docker-compose.yml. (Not collected where the broker is the local one.)"""

import json
import re
import shutil
import uuid
from pathlib import Path

import pika
import pytest

from tests.harness import reaper
from tests.harness.brokers import ROOT, docker, run
from tests.harness.readmes import block, blocks, commands, edited, steps
from tests.harness.scripts import WORKER, received_line
from tests.harness.waiting import wait_until

UP, DOWN, COUNT, RESTART = (
    "up --detach --wait",
    "down",
    "exec rabbitmq rabbitmqctl --quiet list_queues name messages_ready messages_unacknowledged",
    "restart --timeout 60",
)


def test_the_readmes_commands_keep_the_tasks_and_volumes_deletes_them(
    own_broker, queue, new_task, start
):
    """`up --wait` returns when RabbitMQ takes connections: the scripts can run at once."""

    def compose(words):
        assert f"docker compose {words}" in commands("README.md", "docker compose "), words
        return own_broker.compose(*words.split())

    new_task("Restarted")
    compose(RESTART)
    console = start(WORKER)  # Docker's proxy takes connections long before RabbitMQ does
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
    assert volumes(own_broker)
    compose(f"{DOWN} --volumes")
    assert not volumes(own_broker)


def test_it_starts_on_the_ports_of_the_readme():
    (start, _), (url, _) = steps(block("console", "RABBITMQ_PORT="))
    config = json.loads(run("bash", "-c", edited(start, {UP: "config --format json"})))
    published = [port["published"] for port in config["services"]["rabbitmq"]["ports"]]
    ports = re.findall(r"PORT=(\d+)", start)
    assert sorted(published) == sorted(ports)
    assert url == f"export AMQP_URL=amqp://localhost:{ports[0]}"


@pytest.fixture
def worker_image(broker, tmp_path):
    """The image of the README's Dockerfile, but for what needs a network: its base, and pip."""
    [dockerfile] = blocks("README.md", "dockerfile")
    base = inspect(broker, "rabbitmq")["Config"]["Image"]
    without_network = {
        "FROM python:3.14-slim\n": f"FROM {base}\nUSER root\n"
        'ENTRYPOINT []\nRUN ln -s "$(command -v python3)" /usr/local/bin/python\n',
        "RUN pip install --no-cache-dir -r /worker/requirements.txt\n": "COPY pika /worker/pika/\n",
    }
    (tmp_path / "Dockerfile").write_text(edited(dockerfile, without_network))
    for name in ("worker.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(Path(pika.__file__).parent, tmp_path / "pika")
    name = f"work-queue-worker-{uuid.uuid4().hex}"
    remove = reaper.at_exit("docker", "rmi", "--force", name)
    docker("build", "--quiet", "--tag", name, str(tmp_path))
    yield name
    remove()


def inspect(broker, service):
    """Return what Docker says of the container of a service."""
    return json.loads(docker("inspect", f"{broker.project}-{service}-1"))[0]


@pytest.fixture
def service(broker, worker_image, tmp_path):
    """Run commands of the README for its service, which stands beside RabbitMQ's here."""
    [yaml] = blocks("README.md", "yaml")
    file = tmp_path / "worker.yml"
    file.write_text(edited(yaml, {"build: .": f"image: {worker_image}"}))
    given = "".join(commands("README.md", "docker compose "))
    assert "docker compose up --detach --build worker" in given  # built it is already

    def compose(words, more=""):
        assert f"docker compose {words}" in given
        return docker(*both, *words.split(), *more.split(), env=broker.env)

    both = ["compose", "--project-directory", ROOT, "--project-name", broker.project]
    both += ["--file", ROOT / broker.file, "--file", file]
    try:
        yield compose
    finally:
        docker(*both, "rm", "--force", "--stop", "worker", env=broker.env)
        docker("volume", "rm", "--force", f"{broker.project}_work")


def test_a_worker_in_a_container_gets_sigterm_and_ends_when_its_task_is_done(
    broker, queue, service
):
    """It may write where it works, and is killed and started as the README says."""

    def log():
        shown = service("logs --timestamps --tail 50 worker")
        return re.sub(r"^\S+ +\| \S+ ", "", shown, flags=re.MULTILINE)

    service("up --detach", "--no-deps worker")
    wait_until(lambda: "Waiting" in log(), "it waits for messages")
    container = f"{broker.project}-worker-1"
    docker("exec", container, "touch", "written")
    queue.publish(b"task...")
    wait_until(lambda: "Received" in log(), "it has the task")
    docker("stop", container)
    assert log().endswith(" [x] Received task...\n [x] Done\n")
    assert inspect(broker, "worker")["State"]["ExitCode"] == 0
    wait_until(lambda: queue.ready() == 0, "nothing is left")
    service("start worker")
    wait_until(lambda: queue.consumers() == 1, "it consumes again")
    [restart] = commands("README.md", "docker restart ")
    docker(*edited(restart, {"NAME": container}).split()[1:])
    wait_until(lambda: log().count("Waiting") == 3, "it was killed and runs again")
    service("up --detach --scale worker=2", "--no-deps worker")
    wait_until(lambda: queue.consumers() == 2, "two consume")
    service("kill worker")
    wait_until(lambda: queue.consumers() == 0, "none consumes")


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
    published = inspect(broker, "rabbitmq")["NetworkSettings"]["Ports"].values()
    assert {binding["HostIp"] for some in published for binding in some or []} == {"127.0.0.1"}


def test_it_has_a_bounded_number_of_file_descriptors(broker):
    assert int(broker.compose("exec", "-T", "rabbitmq", "sh", "-c", "ulimit -n")) <= 65536
