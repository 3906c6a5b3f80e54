"""Three nodes, as tests/cluster makes them: any of them may go away, and no task goes with it.

tests/run -n 0 -m cluster runs them; without -m they are deselected, since three nodes beside the
brokers of the other tests are too many for a small machine.
"""

import contextlib
import re
import subprocess
import threading
import time
from functools import partial

import pytest

from tests.harness import brokers
from tests.harness.readmes import commands
from tests.harness.scripts import done, only_told_in_lines, received_line
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


class Feeder:
    """Gives numbered tasks to a producer, and to a new one whenever that has ended."""

    def __init__(self, name, start_producer):
        self.name, self.start_producer = name, start_producer
        self.given, self.producers, self.stop = [], [], threading.Event()
        self.thread = threading.Thread(target=self.feed)
        self.thread.start()

    def feed(self):
        while not self.stop.is_set():
            producer = self.start_producer()
            self.producers.append(producer)
            with contextlib.suppress(BrokenPipeError), producer.stdin:
                while producer.process.poll() is None and not self.stop.wait(0.05):
                    number = len(self.given)  # some are in hand longer than others
                    self.given.append(f"{self.name} {number}" + "." * (number % 50 == 0))
                    producer.stdin.write(f"{self.given[-1]}\n".encode())
                    producer.stdin.flush()

    @property
    def sent(self):
        lines = [line for one in self.producers for line in one.out]
        return [line.removeprefix(" [x] Sent ") for line in lines]

    def close(self):
        self.stop.set()
        self.thread.join()


class Flow:
    """Tasks that flow through every node, and the account of them.

    The scripts choose a node at random, so there are as many as it takes for each node to have a
    worker and a producer. They notice within 14 seconds that a node is silent.
    """

    def __init__(self, cluster, worker, start_new_task):
        self.cluster, self.workers, self.feeders = cluster, [], []
        url = cluster.url(query="heartbeat=2")
        try:
            while not all(self.workers_at(node) for node in NODES):
                self.workers += [worker(url=url) for _ in range(4)]
            while not all(self.feeders_at(node) for node in NODES):
                start = partial(start_new_task, "-", stdin=subprocess.PIPE, url=url)
                numbers = range(len(self.feeders), len(self.feeders) + 4)
                self.feeders += [Feeder(f"feeder {number}", start) for number in numbers]
                wait_until(lambda: all(one.sent for one in self.feeders), "each has sent a task")
        except BaseException:
            self.close()
            raise

    def at(self, node):
        """Return the process ids of the scripts that are connected to `node`."""
        shown = self.cluster.ctl("list_connections", "pid", "client_properties")
        rows = [row for row in shown.splitlines() if row.startswith(f"<rabbit@{node}.")]
        return {int(pid) for row in rows for pid in re.findall(r'"\w+\.py \S+ (\d+)"', row)}

    def workers_at(self, node):
        pids = self.at(node)
        return [one for one in self.workers if one.process.pid in pids]

    def feeders_at(self, node):
        pids = self.at(node)
        return [one for one in self.feeders if one.producers[-1].process.pid in pids]

    def goes_on(self, but=()):
        """Wait until each worker and feeder has got some more done, but for those in `but`.

        Each chance of a dead node costs them a pause, of a silent one ten seconds more.
        """
        workers = [one for one in self.workers if one not in but]
        feeders = [one for one in self.feeders if one not in but]

        def progress():
            return [len(done(one)) for one in workers] + [len(one.sent) for one in feeders]

        before = progress()
        wait_until(
            lambda: all(now - then >= 10 for now, then in zip(progress(), before, strict=True)),
            f"all workers and producers go on, but {len(but)}",
            timeout=180,
        )

    def goes_on_without(self, leader, struck, left_behind=False):
        """Wait until another node leads the queue, and all goes on there.

        The `struck`, which were connected to the old one, come over, unless they are `left_behind`.
        """
        others = [node for node in NODES if node != leader]
        wait_until(lambda: self.cluster.leader(asked=others[0]) in others, "another leads", 60)
        self.goes_on(but=struck)
        if not left_behind:
            self.goes_on()
            assert all(one.err for one in struck if one in self.workers), "one noticed nothing"

    def pauses(self, since, struck):
        """Return for how long each worker was without a task at most, in seconds, as a text."""
        found = {True: [], False: []}
        for worker in self.workers:
            out = [line for line in list(worker.lines) if " [x] " in line.text]
            pairs = [(a.at, b.at) for a, b in zip(out, out[1:], strict=False) if "Rec" in b.text]
            longest = max((until - at for at, until in pairs if until > since), default=0)
            found[worker in struck].append(f"{longest:.2f}")
        return f"its workers {', '.join(found[True])}; the others {', '.join(found[False])}"

    def close(self):
        for feeder in self.feeders:
            feeder.close()

    def account(self):
        """Fail if a task was lost, or done and never given."""
        self.close()
        for feeder in self.feeders:
            for producer in feeder.producers:
                producer.wait(timeout=90)
        sent = {task for feeder in self.feeders for task in feeder.sent}
        given = {task for feeder in self.feeders for task in feeder.given}
        wait_until(lambda: sent <= set(done(*self.workers)), "every confirmed task is done", 90)
        assert set(done(*self.workers)) <= given
        for worker in self.workers:
            assert worker.process.poll() is None
            only_told_in_lines(worker)


@pytest.fixture
def flow(running_broker, queue, worker, start_new_task):
    flow = Flow(running_broker, worker, start_new_task)
    try:
        flow.goes_on()
        yield flow
    finally:
        flow.close()


# --- What the cluster makes of the scripts' plain declare ---


def test_each_task_is_on_every_node(broker, queue, new_task, worker):
    new_task("task")
    shown = broker.ctl("list_queues", "name", "type", "members", "--no-table-headers")
    for name in ("task_queue", "parked_tasks"):
        members = re.search(rf"^{name}\tquorum\t(.*)$", shown, re.MULTILINE)[1]
        assert {f"rabbit@rabbit-{number}" for number in (1, 2, 3)} == set(
            re.findall(r"[\w@-]+", members)
        )
    worker().wait_for_line(r" \[x\] Received task")


def test_a_task_that_kills_every_worker_is_parked_and_the_others_are_done(
    broker, queue, new_task, worker_of
):
    """RabbitMQ gives a task to 21 workers; unparked it would be gone then."""

    def parked():
        declared = queue.do(lambda channel: channel.queue_declare("parked_tasks", passive=True))
        return declared.method.message_count

    for task in ("before", "deadly", "after"):
        new_task(task)
    workers = []
    while not parked():
        workers.append(worker_of('if body == b"deadly":\n    os.kill(os.getpid(), 9)'))
        wait_until(lambda: workers[-1].process.poll() or parked(), "it dies, or need not")
    assert sum(one.process.poll() == -9 for one in workers) == 21
    workers.append(worker_of("pass"))
    wait_until(lambda: set(done(*workers)) == {"before", "after"}, "the others are done")
    queue.wait_for_counts(0, 0)
    method, _, body = queue.do(lambda channel: channel.basic_get("parked_tasks", auto_ack=True))
    assert body == b"deadly"
    assert not parked()


# --- A node goes away ---


def test_the_readmes_commands_kill_a_node_and_start_it_again(
    running_broker, queue, new_task, worker
):
    place = "docker compose --file tests/cluster/docker-compose.yml "
    found = commands("tests/README.md", place)
    up, look, kill, start, count, down = (line.removeprefix(place).split() for line in found)
    running_broker.compose(*up)
    console = worker()
    seen = rf'^<rabbit@rabbit-\d\..*"worker\.py \S+ {console.process.pid}"'
    assert re.search(seen, running_broker.compose(*look), re.MULTILINE)
    running_broker.compose(*kill)
    new_task("with two of three")
    console.wait_for_line(received_line("with two of three"))
    running_broker.compose(*start)
    wait_until(running_broker.answers, "all three answer", 90)
    none = {"task_queue\t0", "parked_tasks\t0"}
    wait_until(lambda: none <= set(running_broker.compose(*count).splitlines()), "it counts none")
    assert down == ["down", "--volumes"]  # as the cluster is removed when all is done


@pytest.fixture
def leader(flow, running_broker):
    """The node that leads the queue, and so the worst to lose."""
    return wait_until(running_broker.leader, "a node leads")


@pytest.fixture
def struck(flow, leader):
    """The workers and feeders that are connected to the leader."""
    return flow.workers_at(leader) + flow.feeders_at(leader)


def test_the_leader_of_the_queue_is_killed(flow, leader, struck, running_broker):
    killed = time.monotonic()
    running_broker.kill(leader)
    flow.goes_on_without(leader, struck)
    print(f"Longest without a task, in s: {flow.pauses(killed, struck)}")  # seen with -rP
    running_broker.start()
    flow.goes_on()
    flow.account()


def test_the_leader_freezes(flow, leader, struck, running_broker):
    with running_broker.frozen(leader):
        flow.goes_on_without(leader, struck)
    flow.account()


def test_the_leader_is_cut_off_from_the_other_nodes_but_not_from_its_clients(
    flow, leader, struck, running_broker
):
    """It stops serving, so they go elsewhere; with Khepri (4.2 by default) they wait with it."""
    khepri = re.search(r"^khepri_db\tenabled", running_broker.ctl("list_feature_flags"), re.M)
    with running_broker.cut_off(leader):
        flow.goes_on_without(leader, struck, left_behind=khepri)
    flow.goes_on()
    flow.account()


def test_each_node_is_restarted_in_turn(flow, running_broker):
    for node in NODES:
        running_broker.restart(node)
        flow.goes_on()
    flow.account()
