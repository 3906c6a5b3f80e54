"""What Docker makes of docker-compose.yml. (Not collected where the broker is the local one.)"""

import json
import os
import re
import shutil
from pathlib import Path

import pika
import pytest

from tests.harness import reaper
from tests.harness.brokers import ROOT, docker, run
from tests.harness.readmes import block, blocks, commands, edited, steps
from tests.harness.waiting import wait_until

LEARN, USE = (ROOT / "README.md").read_text().split("\n## Use it\n")


# --- The first half: what is not in its consoles, which test_readme.py types ---


@pytest.fixture
def type_in(broker, tmp_path):
    """Run a command in a folder with the compose file; return what it shows."""
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    env = {**broker.env, "COMPOSE_PROJECT_NAME": broker.project}

    def type_command(command, **variables):
        return run("bash", "-c", command, cwd=tmp_path, env={**env, **variables})

    return type_command


def test_down_keeps_the_tasks_and_volumes_deletes_them(own_broker, queue, new_task, type_in):
    """`up --wait` returns when RabbitMQ takes connections: the scripts can run at once."""
    up, down, delete, look = (
        command
        for command in commands(
            "README.md", "docker compose up", "docker compose down", "docker ps"
        )
        if command in LEARN
    )
    new_task("Outlives.")
    assert own_broker.project in type_in(look)
    type_in(down)
    type_in(up)
    new_task("At once.")
    assert queue.take_all() == [b"Outlives.", b"At once."]
    assert volumes(own_broker)
    type_in(delete)
    assert not volumes(own_broker)


def volumes(broker):
    label = f"label=com.docker.compose.project={broker.project}"
    return docker("volume", "ls", "--quiet", "--filter", label).split()


def test_it_starts_on_the_ports_of_the_readme(type_in):
    (export, _), (up, _) = steps(block("console", "RABBITMQ_PORT="))
    config = edited(up, {"up --detach --wait": "config --format json"})
    ports = json.loads(type_in(f"{export}\n{config}"))["services"]["rabbitmq"]["ports"]
    assert [port["published"] for port in ports] == ["5673", "15673"]
    assert export.endswith("AMQP_URL=amqp://localhost:5673")


# --- The second half: a worker as a service ---

SERVICE = [command for command in commands("README.md", "docker ") if command not in LEARN]
GUEST = "guest:guest@rabbitmq"


@pytest.fixture
def service(broker, tmp_path, type_in):
    """Run a command for the service, as the README has it.

    But for what needs a network, or a vhost: the image's base, pip, and who logs in.
    """
    [dockerfile], [yaml] = blocks("README.md", "dockerfile"), blocks("README.md", "yaml")
    base = inspect(f"{broker.project}-rabbitmq-1")["Config"]["Image"]
    here = {
        "FROM python:3.14-slim\n": f"FROM {base}\nUSER root\n"
        'ENTRYPOINT []\nRUN ln -s "$(command -v python3)" /usr/local/bin/python\n',
        "RUN pip install --no-cache-dir -r /worker/requirements.txt\n": "COPY pika /worker/pika/\n",
    }
    (tmp_path / "Dockerfile").write_text(edited(dockerfile, here))
    (tmp_path / "worker.yml").write_text(edited(yaml, {"worker:PASSWORD@rabbitmq/jobs": GUEST}))
    (tmp_path / "take.py").write_text(block("python", "basic_get"))
    for name in ("worker.py", "new_task.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(Path(pika.__file__).parent, tmp_path / "pika")
    files = f"docker-compose.yml{os.pathsep}worker.yml"
    remove_image = reaper.at_exit("docker", "rmi", "--force", f"{broker.project}-worker")
    yield lambda command: type_in(command, COMPOSE_FILE=files)
    type_in("docker compose rm --force --stop worker", COMPOSE_FILE=files)
    docker("volume", "rm", "--force", f"{broker.project}_work")
    remove_image()


def inspect(container):
    return json.loads(docker("inspect", container))[0]


def test_workers_in_containers_are_started_stopped_killed_and_looked_at(broker, queue, service):
    """SIGTERM ends one when its task is done; what take.py takes off is in the volume."""
    start, renew, logs, restart, names, kill, take, start_again, again = SERVICE  # each is run

    def consume(count):
        wait_until(lambda: queue.consumers() == count, f"{count} consume")

    queue.declare()
    service(start)
    consume(2)
    queue.publish(b"task...")
    found = wait_until(lambda: re.search(r"(worker-\d) .* Received", service(logs)), "one has it")
    container = f"{broker.project}-{found[1]}"
    assert container in service(names)
    docker("stop", container)
    shown = [line for line in service(logs).splitlines() if found[1] in line]
    assert shown[-1].endswith(" [x] Done")
    assert inspect(container)["State"]["ExitCode"] == 0
    service("sed -i s,@rabbitmq,@rabbitmq/%2F, worker.yml")
    service(renew)
    consume(2)
    assert "@rabbitmq/%2F" in str(inspect(container)["Config"]["Env"])
    service(edited(restart, {"NAME": container}))
    wait_until(lambda: service(logs).count("Waiting") == 3, "it was killed and runs again")
    service(kill)
    consume(0)
    queue.publish(b"taken")
    file, shown = service(take).split(": ")
    assert shown == "taken\n"
    service(edited(again, {"producer:PASSWORD@rabbitmq/jobs": GUEST, "FILE": file}))
    service(start_again)
    wait_until(lambda: "Received taken" in service(logs), "it was sent again")


# --- The compose file itself ---


def test_its_ports_are_published_on_this_machine_alone(broker):
    container = inspect(f"{broker.project}-rabbitmq-1")
    published = container["NetworkSettings"]["Ports"].values()
    assert {binding["HostIp"] for some in published for binding in some or []} == {"127.0.0.1"}


def test_it_has_a_bounded_number_of_file_descriptors(broker):
    assert int(broker.compose("exec", "-T", "rabbitmq", "sh", "-c", "ulimit -n")) <= 65536
