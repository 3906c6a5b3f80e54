"""Three nodes, as tests/cluster makes them: one of them may go away, and no task goes with it.

tests/run -n 0 -m cluster runs them; without -m they are deselected, since three nodes beside the
brokers of the other tests are too many for a small machine.
"""

import contextlib
import re
from functools import partial

import pytest

from tests.harness import brokers
from tests.harness.flow import Feeder, Flow
from tests.harness.pages import CLUSTER, commands
from tests.harness.scripts import NEW_TASK, WORKER, only_told_in_lines, received_line
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def broker():
    """One cluster for all the tests here. What one of them stops, it starts again."""
    if brokers.choose() is not brokers.DockerBroker:
        pytest.skip("the nodes are containers: TEST_BROKER=docker runs this")
    with contextlib.closing(brokers.Cluster()) as cluster:
        cluster.start()
        yield cluster


def test_the_readmes_commands_kill_a_node_and_start_it_again(broker, new_task, worker):
    place = "docker compose --file tests/cluster/docker-compose.yml "
    up, look, kill, start, down = (
        partial(broker.compose, *line.removeprefix(place).split())
        for line in commands(CLUSTER, place)
    )
    up()
    console = worker()
    seen = rf'^<rabbit@rabbit-\d\..*"worker\.py \S+ {console.process.pid}"'
    assert re.search(seen, look(), re.MULTILINE)
    kill()
    new_task("with two of three")
    console.wait_for_line(received_line("with two of three"))
    start()
    wait_until(broker.answers, "all three answer")
    assert down.args == ("down", "--volumes")  # as the cluster is removed when all is done


# --- The node goes away that leads the queue, and so is the worst to lose ---


@pytest.fixture
def flow(broker, start, tmp_path):
    """Tasks that flow through every node: each is the first of one worker and of one feeder."""
    (tmp_path / "sitecustomize.py").write_text("import random\nrandom.shuffle = lambda some: None")
    urls = broker.url(query="heartbeat=2").split(",")
    flow = Flow()
    for first in range(3):
        start_here = partial(
            start,
            url=",".join(urls[first:] + urls[:first]),
            env={"PYTHONPATH": str(tmp_path)},
        )
        flow.workers.append(start_here(WORKER))
        flow.feeders.append(Feeder(f"feeder {first}", partial(start_here, NEW_TASK, "-")))
    try:
        goes_on(flow)
        yield flow
    finally:
        for feeder in flow.feeders:
            feeder.close()  # else it would start another producer when this one is ended


def goes_on(flow, but=()):
    """Wait until each worker and feeder has shown ten lines more, but for those in `but`."""
    before = {one: len(one.out) for one in flow.workers + flow.feeders if one not in but}
    wait_until(
        lambda: all(len(one.out) >= lines + 10 for one, lines in before.items()),
        "all workers and producers go on",
        timeout=180,
    )


def heals(flow):
    """Wait until all goes on; fail if a task was lost, or was done and never given."""
    goes_on(flow)
    flow.end()
    wait_until(lambda: not flow.lost(), "every confirmed task is done")
    assert not flow.unexpected()
    for worker in flow.workers:
        assert worker.process.poll() is None
        only_told_in_lines(worker)


@pytest.fixture
def leader(flow, broker):
    return wait_until(broker.leader, "a node leads")


@pytest.fixture
def struck(flow, leader):
    """The worker and the feeder whose first node is the leader."""
    number = list(brokers.Cluster.nodes).index(leader)
    return flow.workers[number], flow.feeders[number]


def test_the_leader_of_the_queue_is_killed(flow, leader, struck, broker):
    broker.kill_when_settled(leader)
    goes_on(flow)
    assert struck[0].err
    broker.start()
    heals(flow)


def test_the_leader_is_cut_off_from_the_other_nodes_but_not_from_its_clients(
    flow, leader, struck, broker
):
    """It stops serving, so they go elsewhere; with Khepri (4.2 by default) they wait with it."""
    khepri = re.search(r"^khepri_db\tenabled", broker.ctl("list_feature_flags"), re.M)
    with broker.cut_off(leader):
        goes_on(flow, but=struck if khepri else ())
    heals(flow)
