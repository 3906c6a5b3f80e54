"""docker-compose.yml, read as Compose reads it, and the container that comes of it.

What it says of ports, names and limits is read with `docker compose config`, which needs no
engine; where the client has no compose plugin there is nothing to ask, and the file's text is.
"""

import re

from tests.harness.brokers import ROOT, DockerBroker

TEXT = (ROOT / "docker-compose.yml").read_text()


def test_ports_are_published_on_this_machine_alone_and_can_be_moved():
    ports = re.findall(r"- (\S+:\d+)$", TEXT, re.MULTILINE)
    assert ports == [
        "127.0.0.1:${RABBITMQ_PORT:-5672}:5672",
        "127.0.0.1:${RABBITMQ_MANAGEMENT_PORT:-15672}:15672",
    ]


def test_the_clusters_ports_too():
    text = (ROOT / "tests/cluster/docker-compose.yml").read_text()
    ports = re.findall(r"- (\S+:\d+)$", text, re.MULTILINE)
    assert ports == [
        f"127.0.0.1:${{RABBITMQ_{name}_{node}:-{port + node - 1}}}:{port}"
        for node in (1, 2, 3)
        for name, port in (("PORT", 5672), ("MANAGEMENT_PORT", 15672))
    ]
    image = r"^ +image: .*$"
    assert re.findall(image, text, re.M)[0].strip() == re.findall(image, TEXT, re.M)[0].strip()


def test_the_image_is_pinned_to_a_minor_version_and_replaceable():
    assert re.search(r"image: \$\{RABBITMQ_IMAGE:-rabbitmq:\d+\.\d+-management\}$", TEXT, re.M)


def test_nothing_keeps_two_projects_from_running_side_by_side():
    assert "container_name" not in TEXT
    assert not re.search(r"^name:", TEXT, re.MULTILINE)


def test_tasks_outlive_down_and_up(running_broker, queue, new_task):
    """With Docker, the container is removed and made anew; without, the node stops and starts."""
    new_task("Outlives.")
    if isinstance(running_broker, DockerBroker):
        running_broker.compose("down")
        running_broker.compose("up", "--detach", "--wait")
        new_task("At once.")  # --wait returned: the scripts can run
        assert queue.ready() == 2
    else:
        running_broker.restart()
        assert queue.ready() == 1
    assert queue.take()[0] == b"Outlives."


def test_the_container_has_a_bounded_number_of_file_descriptors(broker):
    assert re.search(r"nofile: \d+$", TEXT, re.MULTILINE)
    if isinstance(broker, DockerBroker):
        limit = broker.compose("exec", "-T", "rabbitmq", "sh", "-c", "ulimit -n")
        assert int(limit) <= 65536
