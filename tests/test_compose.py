"""What Docker makes of docker-compose.yml. (Skipped where the broker is the local one.)"""

import json
import re
import shutil
from pathlib import Path

import pika
import pytest

from tests.harness import brokers, reaper
from tests.harness.brokers import docker, run
from tests.harness.pages import JOBS, SERVICE, blocks, commands, edited, typed
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.skipif(
    brokers.choose() is not brokers.DockerBroker, reason="TEST_BROKER=docker runs this"
)


@pytest.fixture
def shell(broker, folder):
    """Run a command in a folder with the compose file to its end; return what it shows."""
    return lambda command: run("bash", "-c", command, cwd=folder, env=broker.shell_env)


def test_down_keeps_the_tasks_and_volumes_deletes_them(own_broker, queue, new_task, shell):
    """`up --wait` returns when RabbitMQ takes connections: the scripts can run at once."""
    new_task("Outlives.")
    assert own_broker.project in shell("docker ps")
    shell("docker compose down")
    shell("docker compose up --detach --wait")
    new_task("At once.")
    assert queue.take_all() == [b"Outlives.", b"At once."]
    assert volumes(own_broker)
    shell("docker compose down --volumes")
    assert not volumes(own_broker)


def volumes(broker):
    label = f"label=com.docker.compose.project={broker.project}"
    return docker("volume", "ls", "--quiet", "--filter", label).split()


def test_its_ports_are_those_of_the_readme_and_for_this_machine_alone(shell):
    export, _ = typed("RABBITMQ_PORT=")
    config = json.loads(shell(f"{export}\ndocker compose config --format json"))
    ports = [(one["host_ip"], one["published"]) for one in config["services"]["rabbitmq"]["ports"]]
    assert ports == [("127.0.0.1", "5673"), ("127.0.0.1", "15673")]


# --- A worker as a service ---


def the(words):
    """Return the one command of Docker's on the service's pages that begins with `words`."""
    [found] = [
        one for one in commands(SERVICE + JOBS, "docker") if one.startswith(f"docker {words}")
    ]
    return found


DOCKER = {
    "ports": typed("RABBITMQ_PORT=")[0],
    "up": "docker compose up --detach --wait",
    "down": "docker compose down",
    "delete": "docker compose down --volumes",
    "list": "docker ps",
    "start": "docker compose up --detach --build worker",
    "start both": the("compose up --detach --build worker mails"),
    "renew": the("compose up --detach worker"),
    "look": the("compose logs --timestamps"),
    "count": the("compose logs --since"),
    "names": the("compose ps"),
    "kill": the("restart"),
    "end": the("stop --time 0"),
    "log": the("compose logs --tail"),
    "stop": the("compose stop"),
    "take": the("compose run --rm --no-deps --user"),
    "send": the("compose run --rm --no-deps --no-TTY"),
    "go on": the("compose start"),
}
OVERRIDE = "docker-compose.override.yml"
[WORKERS], [SENDER] = blocks(SERVICE, "yaml"), blocks(JOBS, "yaml")
GUEST = "guest:guest@rabbitmq"


@pytest.fixture
def service(broker, folder, shell):
    """Run a command for the service, as the page has it.

    But for what needs a network, or a vhost: the image's base, pip, and who logs in.
    """
    [dockerfile] = blocks(SERVICE, "dockerfile")
    base = inspect(f"{broker.project}-rabbitmq-1")["Config"]["Image"]
    here = {
        "FROM python:3.14-slim\n": f"FROM {base}\nUSER root\n"
        'ENTRYPOINT []\nRUN ln -s "$(command -v python3)" /usr/local/bin/python\n',
        "RUN pip install --no-cache-dir -r /worker/requirements.txt\n": "COPY pika /worker/pika/\n",
    }
    (folder / "Dockerfile").write_text(edited(dockerfile, here))
    (folder / OVERRIDE).write_text(edited(WORKERS, {"worker:PASSWORD@rabbitmq/jobs": GUEST}))
    shutil.copytree(Path(pika.__file__).parent, folder / "pika")
    remove_image = reaper.at_exit("docker", "rmi", "--force", f"{broker.project}-worker")
    yield lambda name, **edits: shell(edited(DOCKER[name], edits))
    shell("docker compose rm --force --stop worker")
    docker("volume", "rm", "--force", f"{broker.project}_work")
    remove_image()


def inspect(container):
    return json.loads(docker("inspect", container))[0]


def test_workers_in_containers_are_started_stopped_killed_and_looked_at(
    broker, queue, service, folder
):
    """SIGTERM ends one when its task is done; what take.py takes off is in the folder."""

    def consume(count):
        wait_until(lambda: queue.consumers() == count, f"{count} consume")

    def shown():
        return [line for line in service("look").splitlines() if worker in line]

    queue.declare()
    service("start")
    consume(2)
    queue.publish(b"task...")
    seen = wait_until(lambda: re.search(r"(worker-\d) .* Received", service("look")), "one has it")
    worker = seen[1]
    container = f"{broker.project}-{worker}"
    assert container in service("names")
    docker("stop", container)
    assert shown()[-1].endswith(" [x] Done")
    assert inspect(container)["State"]["ExitCode"] == 0
    assert re.fullmatch(r" +1 .* \[x\] Received task...\n", service("count"))
    override = (folder / OVERRIDE).read_text()
    (folder / OVERRIDE).write_text(edited(override, {"@rabbitmq": "@rabbitmq/%2F"}))
    service("renew")
    consume(2)
    assert "@rabbitmq/%2F" in str(inspect(container)["Config"]["Env"])
    service("kill", NAME=container)
    wait_until(lambda: len(shown()) == 2, "it was killed and runs again")
    service("end", NAME=container)
    consume(1)
    service("stop")
    consume(0)
    assert "closing AMQP connection" in service("log")
    queue.publish(b"taken")
    file, task = service("take").split(": ")
    assert task == "taken\n"
    service("send", FILE=file)
    service("go on")
    wait_until(lambda: "Received taken" in service("look"), "it was sent again")


def test_the_sender_of_jobs_is_a_worker_but_for_its_command(folder, shell):
    (folder / OVERRIDE).write_text(edited(WORKERS, {"\nvolumes:": f"{SENDER}\nvolumes:"}))
    services = json.loads(shell("docker compose config --format json"))["services"]
    worker, sender = services["worker"], services["mails"]
    assert sender["command"] == ["python", "/worker/send_jobs.py", "mails"]
    shell(edited(DOCKER["start both"], {"compose": "compose --dry-run"}))
    assert [name for name in worker if worker[name] != sender[name]] == ["command", "scale"]
