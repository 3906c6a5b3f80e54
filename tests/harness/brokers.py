"""The two RabbitMQs that the tests start: a container, or a private node of the installed server.

Both have one interface: start, stop, kill, freeze, thaw, ctl, log and close. A broker listens on
free ports of 127.0.0.1 and keeps them and its data from one start to the next, until close().
A cluster of containers has the same, for all of its nodes or those named.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from pathlib import Path

import pika
import port_for

from tests.harness import reaper
from tests.harness.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
DEBIAN = Path("/usr/lib/rabbitmq/bin")  # its wrappers in /usr/sbin change the user


claims = []  # the sockets of free_ports()


def free_ports(count):
    """Return `count` TCP ports that are free on 127.0.0.1.

    port_for leaves out those that the system gives to outgoing connections, which could take the
    port of a broker that is stopped. As a broker needs seconds until it listens, a UDP socket,
    which leaves the TCP port free, shows other runs of these tests that the port is taken.
    """
    ports = []
    while len(ports) < count:
        claim = socket.socket(type=socket.SOCK_DGRAM)
        with contextlib.suppress(OSError):  # another has claimed it
            claim.bind(("127.0.0.1", port_for.select_random()))
            claims.append(claim)
            ports.append(claim.getsockname()[1])
    return ports


def new_folder():
    """Make the folder of a broker, which has its data or, for a container, at least its name."""
    return Path(tempfile.mkdtemp(prefix="work-queue-broker-"))


def run(*argv, env=None, cwd=ROOT):
    """Run a command to its end; return what it printed, and fail if it did."""
    process = subprocess.Popen(
        argv,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl+C is for the tests, which must still end the broker
    )
    with process:
        try:
            out, err = process.communicate(timeout=300)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            raise
    assert process.returncode == 0, out + err
    return out


class Broker:
    """What both brokers share: where they listen, and how to see that they do."""

    host = inner_host = "127.0.0.1"

    def url(self, userinfo="guest:guest", vhost="%2F", port=None, query=""):
        """Return the AMQP URL of this broker; `query` comes after a question mark."""
        return f"amqp://{userinfo}@{self.host}:{port or self.port}/{vhost}" + (
            query and f"?{query}"
        )

    def parameters(self):
        """Return pika's parameters for each node."""
        return [pika.URLParameters(url) for url in self.url().split(",")]

    def connect(self):
        """Return a pika connection of the tests' own."""
        return pika.BlockingConnection(self.parameters())

    def answers(self):
        """Whether a client can connect now, to each node."""
        try:
            for one in self.parameters():
                pika.BlockingConnection(one).close()
        except (pika.exceptions.AMQPError, OSError):
            return False
        return True

    def wait_until_it_answers(self):
        wait_until(lambda: self.answers() or self.check_alive(), "the broker answers", timeout=90)
        self.ctl("await_startup")  # it takes connections before it takes commands

    def check_alive(self):
        """Raise if the broker ended instead of starting."""

    def set(self, key, erlang_value):
        """Set one of RabbitMQ's settings while it runs (until its next start)."""
        self.ctl("eval", f"application:set_env(rabbit, {key}, {erlang_value}).")

    @contextlib.contextmanager
    def alarm(self):
        """Raise a memory alarm, and clear it in the end, whatever happens.

        To clients, one of the disk is the same.
        """
        limit = "set_vm_memory_high_watermark"
        try:
            self.ctl(limit, "absolute", "1MB")
            in_force = "rabbit_alarm:get_alarms() =/= []."  # the monitor raises it a little later
            wait_until(lambda: "true" in self.ctl("eval", in_force), "the alarm is in force")
            yield
        finally:
            self.ctl(limit, "0.4")

    @contextlib.contextmanager
    def frozen(self, *nodes):
        """Freeze the broker, and thaw it in the end, whatever happens."""
        self.freeze(*nodes)
        try:
            yield
        finally:
            self.thaw(*nodes)

    def restart(self, *nodes):
        self.stop(*nodes)
        self.start()

    def settle(self):
        """Have the broker write down its queues now, as it has their tasks.

        Mnesia, where RabbitMQ keeps queues unless it has Khepri, writes a new one with a delay of
        up to two seconds: a broker killed before that forgets it, with the tasks it confirmed.
        """
        self.ctl("eval", "catch mnesia:sync_log().")

    def renew(self):
        """If it was killed or does not run, take a new one, on other ports and without its data."""
        if self.killed or not self.answers():
            self.close()
            self.__init__()
            self.start()


class LocalBroker(Broker):
    """A private node of the rabbitmq-server on this machine, with an epmd of its own."""

    def __init__(self):
        self.port, self.dist_port, self.epmd_port = free_ports(3)
        self.killed = False
        self.folder = new_folder()
        self.duties = [reaper.at_exit("rm", "-rf", self.folder)]
        self.bin = DEBIAN if DEBIAN.exists() else Path(shutil.which("rabbitmq-server")).parent
        (self.folder / "rabbitmq.conf").write_text(f"listeners.tcp.local = 127.0.0.1:{self.port}\n")
        (self.folder / "plugins").write_text("[].")
        self.env = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.folder),  # the Erlang cookie is there
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"tests-{uuid.uuid4().hex[:8]}@localhost",
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        # Without one of our own the node would start an epmd that outlives it.
        self.epmd = subprocess.Popen(
            [shutil.which("epmd") or "epmd", "-port", str(self.epmd_port)],
            env=self.env,
            start_new_session=True,  # Ctrl+C is for the tests, which end it after the node
        )
        self.duties.append(reaper.at_exit("kill", "-KILL", self.epmd.pid))
        self.server = None

    @staticmethod
    def why_not():
        """Return why it cannot be had, or None."""
        there = DEBIAN.exists() or shutil.which("rabbitmq-server")
        return None if there else "there is no rabbitmq-server (rabbitmq.com/docs/download)"

    def start(self):
        """Start the node (on the same port and data as before) and wait until it answers."""
        self.launch()
        self.wait_until_it_answers()

    def launch(self):
        """Start the node and return while it boots."""
        self.server = subprocess.Popen(
            [self.bin / "rabbitmq-server"],
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the starter is a shell: signals go to its whole group
        )
        self.duty = reaper.at_exit("kill", "-KILL", "--", f"-{self.server.pid}")

    def check_alive(self):
        if self.server.poll() is not None:
            raise AssertionError(f"the broker ended:\n{self.log()}")

    def states(self):
        """Return the state of each process of the node, as ps shows it."""
        rows = [row.split() for row in run("ps", "-eo", "pgid=,stat=").splitlines()]
        return [state for group, state in rows if group == str(self.server.pid)]

    def signal(self, signum):
        """Signal every process of the node; raise ProcessLookupError if there is none."""
        os.killpg(self.server.pid, signum)

    def end(self, signum):
        self.signal(signum)
        self.server.wait(timeout=60)
        wait_until(lambda: not self.states(), "every process of the broker has ended")
        reaper.forget(self.duty)
        self.server = None

    def stop(self):
        """Stop the node in an orderly way."""
        self.end(signal.SIGTERM)

    def kill(self):
        """End the node at once, as a crash would, when its queues are written down."""
        self.settle()
        self.killed = True
        self.end(signal.SIGKILL)

    def freeze(self):
        """Freeze; a process goes on for a while where others hold the processors."""
        self.signal(signal.SIGSTOP)
        wait_until(
            lambda: all(state.startswith("T") for state in self.states()),
            "every process of the broker has stopped",
        )

    def thaw(self):
        self.signal(signal.SIGCONT)

    def ctl(self, *words):
        """Run rabbitmqctl; return what it printed."""
        return run(self.bin / "rabbitmqctl", "-q", *words, env=self.env, cwd=self.folder)

    def log(self):
        """Return what the broker has logged since it was made."""
        return "".join(path.read_text() for path in sorted((self.folder / "log").glob("*.log")))

    def close(self):
        """End everything that was started, and remove its data."""
        if self.server:
            with contextlib.suppress(ProcessLookupError):
                self.end(signal.SIGKILL)
        self.epmd.kill()
        self.epmd.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        for duty in self.duties:
            reaper.forget(duty)


def docker(*words, env=None):
    """Run docker in the project's folder; return what it printed."""
    return run("docker", *words, env=env)


DOWN = ("down", "--volumes", "--remove-orphans", "--timeout", "0")


class DockerBroker(Broker):
    """The project's own docker-compose.yml, under a project name and on ports of its own."""

    file = "docker-compose.yml"
    nodes = {"rabbitmq": ""}  # the services, and how the variables of their ports end

    def __init__(self):
        self.folder = new_folder()
        self.project = self.folder.name
        self.argv = ["compose", "--file", ROOT / self.file, "--project-name", self.project]
        self.duties = [
            reaper.at_exit("rm", "-rf", self.folder),
            reaper.at_exit("docker", *self.argv, *DOWN),
        ]
        self.env, self.ports = dict(os.environ), []
        for end in self.nodes.values():
            port, management_port = free_ports(2)
            self.env[f"RABBITMQ_PORT{end}"] = str(port)
            self.env[f"RABBITMQ_MANAGEMENT_PORT{end}"] = str(management_port)
            self.ports.append(port)
        self.port = self.ports[0]
        self.killed, self.made = False, False

    @staticmethod
    def why_not():
        """Return why it cannot be had, or None."""
        if not shutil.which("docker"):
            return "there is no Docker (docs.docker.com/engine/install)"
        for words in (["version"], ["compose", "version"]):
            asked = subprocess.run(["docker", *words], capture_output=True, text=True)
            if asked.returncode:
                return f"docker {' '.join(words)} says: {asked.stderr.strip()}"
        return None

    def compose(self, *words):
        return docker(*self.argv, *words, env=self.env)

    def start(self):
        """Start the container (on the same ports and volume as before), wait until it answers."""
        if self.made:
            self.launch()
        else:
            self.compose("up", "--detach", "--wait")
            self.made = True
        self.wait_until_it_answers()

    def launch(self):
        """Start the container and return while RabbitMQ boots."""
        self.compose("start")

    def stop(self, *nodes):
        self.compose("stop", "--timeout", "60", *nodes)

    def kill(self, *nodes):
        self.settle()
        self.killed = True
        self.compose("kill", "--signal", "SIGKILL", *nodes)

    def freeze(self, *nodes):
        """Freeze; the kernel refuses it while a process starts in there, such as a health check."""

        def frozen():
            try:
                self.compose("pause", *nodes)
            except AssertionError as error:
                if "unable to freeze" not in str(error):
                    raise
                return False
            return True

        wait_until(frozen, "the container is frozen")

    def thaw(self, *nodes):
        self.compose("unpause", *nodes)

    def ctl(self, *words, node=None):
        node = node or next(iter(self.nodes))
        return self.compose("exec", "-T", node, "rabbitmqctl", "-q", *words)

    @property
    def inner_host(self):
        """The container's own address, where all of its ports can be reached on Linux."""
        return self.compose("exec", "-T", "rabbitmq", "hostname", "-i").strip()

    def log(self):
        return self.compose("logs", "--no-color", "--no-log-prefix")

    def close(self):
        self.compose(*DOWN)
        self.folder.rmdir()
        for duty in self.duties:
            reaper.forget(duty)


class Cluster(DockerBroker):
    """The three nodes of tests/cluster. It answers when they all do, and see each other."""

    file = "tests/cluster/docker-compose.yml"
    nodes = {f"rabbit-{number}": f"_{number}" for number in (1, 2, 3)}

    def url(self, query=""):
        """Return the AMQP URLs of the nodes, separated by commas."""
        return ",".join(Broker.url(self, port=port, query=query) for port in self.ports)

    def wait_until_it_answers(self):
        super().wait_until_it_answers()
        self.ctl("await_online_nodes", str(len(self.nodes)))

    def renew(self):
        """Start what does not run, and keep the rest: quorum queues take a restart as it comes."""
        if not self.answers():
            self.start()

    def leader(self, asked=None):
        """Return the node that leads `task_queue`, as far as the node `asked` knows, or None."""
        leaders = self.ctl("list_queues", "name", "leader", "--no-table-headers", node=asked)
        found = re.search(r"^task_queue\trabbit@(\S+)", leaders, re.MULTILINE)
        return found and found[1]

    @contextlib.contextmanager
    def cut_off(self, node):
        """Take `node` off the network of the nodes, and put it back in the end, whatever happens.

        Its clients still reach it, through a network of their own.
        """
        network = f"{self.project}_nodes"
        container = self.compose("ps", "--quiet", node).strip()
        docker("network", "disconnect", network, container)
        try:
            yield
        finally:
            docker("network", "connect", "--alias", node, network, container)  # as compose does


BROKERS = {"docker": DockerBroker, "local": LocalBroker}


@functools.cache
def choose():
    """Return the kind of broker that TEST_BROKER names; unset, docker where an engine answers."""
    name = os.environ.get("TEST_BROKER") or ("local" if DockerBroker.why_not() else "docker")
    if name not in BROKERS:
        raise SystemExit(f"TEST_BROKER={name} is neither docker nor local")
    if why_not := BROKERS[name].why_not():
        raise SystemExit(f"no RabbitMQ for the tests, with TEST_BROKER={name}: {why_not}")
    return BROKERS[name]


if __name__ == "__main__":
    choose()
