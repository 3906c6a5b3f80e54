"""What Docker makes of docker-compose.yml. (Not collected where the broker is the local one.)"""

import json

from tests.harness.brokers import docker


def test_tasks_outlive_down_and_up_and_the_scripts_can_run_at_once(running_broker, queue, new_task):
    """The container is removed and made anew; --wait returns when RabbitMQ takes connections."""
    new_task("Outlives.")
    running_broker.compose("down")
    running_broker.compose("up", "--detach", "--wait")
    new_task("At once.")
    assert [queue.take()[0], queue.take()[0]] == [b"Outlives.", b"At once."]


def test_its_ports_are_published_on_this_machine_alone(broker):
    container = broker.compose("ps", "--quiet").strip()
    published = json.loads(docker("inspect", container))[0]["NetworkSettings"]["Ports"]
    hosts = {binding["HostIp"] for bindings in published.values() for binding in bindings or []}
    assert hosts == {"127.0.0.1"}


def test_it_has_a_bounded_number_of_file_descriptors(broker):
    assert int(broker.compose("exec", "-T", "rabbitmq", "sh", "-c", "ulimit -n")) <= 65536
