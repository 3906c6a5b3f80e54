"""Three nodes, as tests/cluster makes them: any of them may go away, and no task goes with it.

tests/run -n 0 -m cluster runs them; without -m they are deselected, since three nodes beside the
brokers of three test processes are too many for a small machine.
"""

import contextlib
import itertools
import re
import subprocess
import threading
import time

import pytest

from tests.harness import brokers
from tests.harness.scripts import done, only_told_in_lines
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


class Flow:
    """Tasks that flow through every node, and the account of them.

    Each node is the first choice of a worker and of a producer; both notice within 14 seconds
    that it is silent.
    """

    def __init__(self, cluster, worker, start_new_task):
        self.cluster, self.start_new_task = cluster, start_new_task
        self.given, self.stop = set(), threading.Event()
        self.producers = {node: [] for node in NODES}
        urls = {node: cluster.url(first=node, query="heartbeat=2") for node in NODES}
        self.workers = {node: worker(url=url) for node, url in urls.items()}
        self.threads = [threading.Thread(target=self.feed, args=item) for item in urls.items()]
        for thread in self.threads:
            thread.start()

    def feed(self, node, url):
        """Give numbered tasks to a producer, and to a new one when it ends with its node."""
        numbers = itertools.count()
        while not self.stop.is_set():
            producer = self.start_new_task("-", stdin=subprocess.PIPE, url=url)
            self.producers[node].append(producer)
            with contextlib.suppress(BrokenPipeError), producer.stdin:
                while producer.process.poll() is None and not self.stop.wait(0.05):
                    number = next(numbers)
                    task = f"{node} {number}" + "." * (number % 50 == 0)  # some are in hand longer
                    self.given.add(task)
                    producer.stdin.write(f"{task}\n".encode())
                    producer.stdin.flush()

    def sent(self, *nodes):
        lines = [line for node in nodes for one in self.producers[node] for line in one.out]
        return [line.removeprefix(" [x] Sent ") for line in lines]

    def goes_on(self, nodes=NODES):
        """Wait until each worker and producer of `nodes` has got some more done."""

        def progress():
            workers = [len(done(self.workers[node])) for node in nodes]
            return workers + [len(self.sent(node)) for node in nodes]

        before = progress()
        wait_until(
            lambda: all(now - then >= 10 for now, then in zip(progress(), before, strict=True)),
            f"the workers and producers of {', '.join(nodes)} go on",
            timeout=90,
        )

    def goes_on_without(self, leader, left_behind=False):
        """Wait until another node leads the queue, and all goes on there.

        The clients of the old leader have come over, unless they are `left_behind`.
        """
        others = [node for node in NODES if node != leader]
        wait_until(lambda: self.cluster.leader(asked=others[0]) in others, "another leads", 60)
        self.goes_on(others)
        if not left_behind:
            self.goes_on()
            assert self.workers[leader].err, "its worker has noticed nothing"

    def pauses(self, since):
        """Return for how long each worker was without a task at most, in seconds, as a text."""
        found = []
        for node, worker in self.workers.items():
            out = [line for line in list(worker.lines) if " [x] " in line.text]
            pairs = [(a.at, b.at) for a, b in zip(out, out[1:], strict=False) if "Rec" in b.text]
            longest = max((until - at for at, until in pairs if until > since), default=0)
            found.append(f"{node}'s {longest:.2f}")
        return ", ".join(found)

    def close(self):
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def account(self):
        """Fail if a task was lost, or done and never given."""
        self.close()
        for producer in itertools.chain(*self.producers.values()):
            producer.wait(timeout=90)
        sent = set(self.sent(*NODES))
        workers = self.workers.values()
        wait_until(lambda: sent <= set(done(*workers)), "every confirmed task is done", 90)
        assert set(done(*workers)) <= self.given
        for worker in workers:
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


@pytest.fixture
def leader(flow, running_broker):
    """The node that leads the queue, and so the worst to lose."""
    return wait_until(running_broker.leader, "a node leads")


def test_the_leader_of_the_queue_is_killed(flow, leader, running_broker):
    killed = time.monotonic()
    running_broker.kill(leader)
    flow.goes_on_without(leader)
    print(f"{leader} led. Without a task, in s, at most, {flow.pauses(killed)}")  # seen with -rP
    running_broker.start()
    flow.goes_on()
    flow.account()


def test_the_leader_freezes(flow, leader, running_broker):
    with running_broker.frozen(leader):
        flow.goes_on_without(leader)
    flow.account()


def test_the_leader_is_cut_off_from_the_other_nodes_but_not_from_its_clients(
    flow, leader, running_broker
):
    """It stops serving, so they go elsewhere; since Khepri (RabbitMQ 4.3) they wait with it."""
    khepri = re.search(r"^khepri_db\tenabled", running_broker.ctl("list_feature_flags"), re.M)
    with running_broker.cut_off(leader):
        flow.goes_on_without(leader, left_behind=khepri)
    flow.goes_on()
    flow.account()


def test_each_node_is_restarted_in_turn(flow, running_broker):
    for node in NODES:
        running_broker.restart(node)
        flow.goes_on()
    flow.account()
