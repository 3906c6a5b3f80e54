"""What Docker makes of docker-compose.yml. (Not collected where the broker is the local one.)"""

import json
import re

from tests.harness.brokers import docker
from tests.harness.readmes import commands
from tests.harness.scripts import received_line
from tests.harness.waiting import wait_until


def test_the_readmes_commands_keep_the_tasks_and_volumes_deletes_them(
    running_broker, queue, new_task, worker
):
    """`up --wait` returns when RabbitMQ takes connections: the scripts can run at once."""
    up, down, count, restart, delete = (
        line.split()[2:] for line in commands("README.md", "docker compose ")
    )
    new_task("Restarted")
    running_broker.compose(*restart)
    console = worker()
    console.wait_for_line(received_line("Restarted"))
    queue.wait_for_counts(0, 0)
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
