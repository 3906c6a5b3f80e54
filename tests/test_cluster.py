"""Three nodes, as tests/cluster makes them: any of them may go away, and no task goes with it.

tests/run -n 0 -m cluster runs them; without -m they are deselected, since three nodes beside the
brokers of the other tests are too many for a small machine.
"""

import re
from functools import partial

import pytest

from tests.harness import brokers
from tests.harness.flow import Feeder, Flow
from tests.harness.queues import Queue
from tests.harness.readmes import commands
from tests.harness.scripts import NEW_TASK, done, only_told_in_lines, received_line
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.cluster

NODES = list(brokers.Cluster.nodes)


@pytest.fixture(scope="module")
def broker():
    """One cluster for all the tests here."""
    if brokers.choose() is not brokers.DockerBroker:
        pytest.skip("the nodes are containers: TEST_BROKER=docker runs this")
    cluster = brokers.Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def own_broker(broker):
    """The cluster, for tests that stop nodes: it is kept, and whole again when they end."""
    yield broker
    if not broker.answers():
        broker.start()


class ClusterFlow(Flow):
    """Tasks that flow through every node.

    The scripts choose a node at random, so there are as many workers as it takes for each node to
    have one. A producer chooses for its batch, and goes on at another node when it loses that one.
    They notice within 14 seconds that a node is silent.
    """

    def __init__(self, cluster, start):
        super().__init__()
        self.cluster, self.start = cluster, start
        self.urls = dict(zip(NODES, cluster.url(query="heartbeat=2").split(","), strict=True))

    def begin(self, worker):
        while not all(map(self.at, NODES)):
            self.workers += [worker(url=",".join(self.urls.values())) for _ in range(4)]
        for _ in range(3):
            self.feed(NODES)

    def feed(self, nodes):
        """Have one more feeder send to these nodes."""
        url = ",".join(self.urls[node] for node in nodes)

        def producer(lines):
            return self.start(NEW_TASK, "-", stdin=lines, url=url)

        self.feeders.append(Feeder(f"feeder {len(self.feeders)}", producer))

    def at(self, node):
        """Return the workers that are connected to `node`."""
        shown = self.cluster.ctl("list_connections", "pid", "client_properties")
        pids = re.findall(rf'^<rabbit@{node}\..*"worker\.py \S+ (\d+)"', shown, re.MULTILINE)
        return [worker for worker in self.workers if str(worker.process.pid) in pids]

    def goes_on(self, but=()):
        """Wait until each worker and feeder has shown ten lines more, but for those in `but`.

        Each chance of a dead node costs them a pause, of a silent one ten seconds more.
        """
        before = {one: len(one.out) for one in self.workers + self.feeders if one not in but}
        wait_until(
            lambda: all(len(one.out) >= lines + 10 for one, lines in before.items()),
            f"all workers and producers go on, but {len(but)}",
            timeout=180,
        )

    def goes_on_without(self, leader, struck, left_behind=False):
        """Wait until another node leads the queue, and all goes on there.

        The `struck`, which were connected to the old one, come over, unless they are `left_behind`:
        then each producer that chooses the old one stays there, so one more feeder does not.
        """
        others = [node for node in NODES if node != leader]
        wait_until(lambda: self.cluster.leader(asked=others[0]) in others, "another leads")
        if left_behind:
            struck = struck + self.feeders
            self.feed(others)
            self.goes_on(but=struck)
        else:
            self.goes_on(but=struck)
            self.goes_on()
            assert all(worker.err for worker in struck), "one noticed nothing"

    def account(self):
        """Fail if a task was lost, or done and never given, or a worker is not as it should be."""
        self.end()
        # Where it took many feeders to have one on each node, they have given work for minutes.
        wait_until(lambda: not self.lost(), "every confirmed task is done", timeout=300)
        assert not self.unexpected()
        for worker in self.workers:
            assert worker.process.poll() is None
            only_told_in_lines(worker)


@pytest.fixture
def flow(own_broker, worker, start):
    flow = ClusterFlow(own_broker, start)
    try:
        flow.begin(worker)
        flow.goes_on()
        yield flow
    finally:
        for feeder in flow.feeders:
            feeder.close()  # else it would start another producer when this one is ended


# --- What the cluster makes of the scripts' plain declare ---


def test_each_task_is_on_every_node(broker, new_task):
    new_task("task")
    shown = broker.ctl("list_queues", "name", "type", "members")
    for name in ("task_queue", "parked_tasks"):
        members = re.search(rf"^{name}\tquorum\t(.*)$", shown, re.MULTILINE)[1]
        assert set(re.findall(r"rabbit@([\w-]+)", members)) == set(NODES)


def test_a_task_that_kills_every_worker_is_parked_and_the_others_are_done(
    broker, queue, new_task, worker_of
):
    """RabbitMQ gives a task to 21 workers; unparked it would be gone then."""
    parked = Queue(broker, "parked_tasks")
    for task in ("before", "deadly", "after"):
        new_task(task)
    workers = []
    while not parked.ready():
        assert len(workers) < 30, "it is not parked"
        workers.append(worker_of('if body == b"deadly":\n    os.kill(os.getpid(), 9)'))
        wait_until(lambda: workers[-1].process.poll() or parked.ready(), "it dies, or need not")
    assert sum(one.process.poll() == -9 for one in workers) == 21
    workers.append(worker_of("pass"))
    wait_until(lambda: set(done(*workers)) == {"before", "after"}, "the others are done")
    queue.wait_for_counts(0, 0)
    assert parked.take_all() == [b"deadly"]


# --- A node goes away ---


def test_the_readmes_commands_kill_a_node_and_start_it_again(own_broker, new_task, worker):
    place = "docker compose --file tests/cluster/docker-compose.yml "
    up, look, kill, start, count, down = (
        partial(own_broker.compose, *line.removeprefix(place).split())
        for line in commands("tests/README.md", place)
    )
    up()
    console = worker()
    seen = rf'^<rabbit@rabbit-\d\..*"worker\.py \S+ {console.process.pid}"'
    assert re.search(seen, look(), re.MULTILINE)
    kill()
    new_task("with two of three")
    console.wait_for_line(received_line("with two of three"))
    start()
    wait_until(own_broker.answers, "all three answer")
    wait_until(lambda: "task_queue\t0\n" in count() and "parked_tasks\t0\n" in count(), "it counts")
    assert down.args == ("down", "--volumes")  # as the cluster is removed when all is done


@pytest.fixture
def leader(flow, own_broker):
    """The node that leads the queue, and so the worst to lose."""
    return wait_until(own_broker.leader, "a node leads")


@pytest.fixture
def struck(flow, leader):
    """The workers that are connected to the leader."""
    return flow.at(leader)


def test_the_leader_of_the_queue_is_killed(flow, leader, struck, own_broker):
    own_broker.kill_when_settled(leader)
    flow.goes_on_without(leader, struck)
    own_broker.start()
    flow.goes_on()
    flow.account()


def test_the_leader_freezes(flow, leader, struck, own_broker):
    with own_broker.frozen(leader):
        flow.goes_on_without(leader, struck)
    flow.account()


def test_the_leader_is_cut_off_from_the_other_nodes_but_not_from_its_clients(
    flow, leader, struck, own_broker
):
    """It stops serving, so they go elsewhere; with Khepri (4.2 by default) they wait with it."""
    khepri = re.search(r"^khepri_db\tenabled", own_broker.ctl("list_feature_flags"), re.M)
    with own_broker.cut_off(leader):
        flow.goes_on_without(leader, struck, left_behind=khepri)
    flow.goes_on()
    flow.account()


def test_each_node_is_restarted_in_turn(flow, own_broker):
    for node in NODES:
        own_broker.restart(node)
        flow.goes_on()
    flow.account()
