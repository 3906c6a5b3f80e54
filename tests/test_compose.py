"""What Docker makes of docker-compose.yml. (Not collected where the broker is the local one.)"""

import json
import re
from pathlib import Path

import pika

from tests.harness import reaper
from tests.harness.brokers import ROOT, docker
from tests.harness.readmes import commands
from tests.harness.scripts import received_line
from tests.harness.waiting import wait_until

README = (ROOT / "README.md").read_text()


def test_the_readmes_commands_keep_the_tasks_and_volumes_deletes_them(
    running_broker, queue, new_task, worker
):
    """`up --wait` returns when RabbitMQ takes connections: the scripts can run at once."""
    up, down, count, restart, delete = (
        line.split()[2:] for line in commands("README.md", "docker compose ")
    )
    new_task("Restarted")
    running_broker.compose(*restart)
    console = worker(waiting=False)  # Docker's proxy takes connections long before RabbitMQ does
    console.wait_for_line(received_line("Restarted"), timeout=150)
    queue.wait_for_counts(0, 0)
    assert running_broker.compose(*count) == README.split(" ".join(count) + "\n")[1].split("```")[0]
    console.kill()
    new_task("Outlives.")
    running_broker.compose(*down)
    running_broker.compose(*up)
    new_task("At once.")
    wait_until(lambda: "task_queue\t2\t0\n" in running_broker.compose(*count), "it counts both")
    running_broker.compose(*delete)
    assert "task_queue" not in running_broker.compose(*count)
    assert volumes(running_broker)
    running_broker.compose(*down, "--volumes")
    assert not volumes(running_broker)


def test_a_worker_in_a_container_gets_sigterm_and_ends_when_its_task_is_done(broker, queue):
    """As the README starts it, but for the script and pika, which are mounted."""
    [command] = re.findall(r"^CMD (\[.*\])$", README, re.MULTILINE)
    [url] = re.findall(r"`AMQP_URL=(amqp:\S+@rabbitmq)`", README)
    [container] = broker.compose("ps", "--quiet").split()
    network = json.loads(docker("inspect", container))[0]["NetworkSettings"]["Networks"]
    image = json.loads(docker("inspect", container))[0]["Config"]["Image"]
    name = f"{broker.project}-worker"
    program, *words = json.loads(command)
    pika_there = Path(pika.__file__).parent
    options = ["--detach", "--name", name, "--network", *network, "--env", f"AMQP_URL={url}"]
    options += ["--env", "PYTHONPATH=/packages", "--workdir", "/scripts", "--entrypoint", "python3"]
    options += ["--volume", f"{ROOT / 'worker.py'}:/scripts/worker.py:ro"]
    options += ["--volume", f"{pika_there}:/packages/pika:ro"]
    assert program == "python"
    duty = reaper.at_exit("docker", "rm", "--force", name)
    try:
        docker("run", *options, image, *words)
        wait_until(lambda: "Waiting" in docker("logs", name), "it waits for messages")
        queue.publish(b"task...")
        wait_until(lambda: "Received" in docker("logs", name), "it has the task")
        docker("stop", "--time", "60", name)
        assert docker("logs", name).endswith(" [x] Received task...\n [x] Done\n")
        assert json.loads(docker("inspect", name))[0]["State"]["ExitCode"] == 0
        wait_until(lambda: queue.ready() == 0, "nothing is left")
    finally:
        docker("rm", "--force", name)
        reaper.forget(duty)


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
