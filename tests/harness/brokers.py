"""The two RabbitMQs that the tests start: a container, or a private node of the installed server.

Both have one interface: start, launch, stop, kill, frozen, ctl, log and close. A broker listens on
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
from tests.harness.consoles import ROOT, Console
from tests.harness.waiting import wait_until

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


def run(*argv, env=None, cwd=ROOT, typed=""):
    """Run a command to its end, with `typed` as its input; return its output, fail if it did."""
    done = subprocess.run(
        argv,
        env=env,
        cwd=cwd,
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,  # Ctrl+C is for the tests, which must still end the broker
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Broker:
    """What both brokers share: where they listen, and how to see that they do."""

    host = inner_host = "127.0.0.1"
    in_docker = False
    shell_env = {}  # what a user's console needs, beside a way to RabbitMQ

    def __init__(self, ports):
        self.ports, self.port = ports, ports[0]  # of the nodes
        # It has the data of the broker or, for a container, at least its name.
        # It names containers and images, too, which may not have every _ that mkdtemp() puts in.
        self.folder = Path(tempfile.gettempdir(), f"work-queue-broker-{uuid.uuid4().hex}")
        self.folder.mkdir(mode=0o700)
        self.remove_folder = reaper.at_exit("rm", "-rf", self.folder)

    def ctl(self, *words):
        """Run rabbitmqctl; return what it printed."""
        return self.tool("rabbitmqctl", "-q", *words)

    def url(self, userinfo="guest:guest", vhost="%2F", port=None, query=""):
        """Return the AMQP URL of `port`, or those of all nodes, separated by commas."""
        return ",".join(
            f"amqp://{userinfo}@{self.host}:{one}/{vhost}{query and '?'}{query}"
            for one in ([port] if port else self.ports)
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

    def start(self):
        """Start it, on the same ports and data as before, and wait until it answers."""
        self.launch()
        wait_until(lambda: self.answers() or self.check_alive(), "the broker answers", timeout=120)
        self.ctl("await_startup")  # it takes connections before it takes commands

    def check_alive(self):
        """Raise if the broker ended instead of starting."""

    def kill_when_settled(self, *nodes):
        """End it at once, as a crash would, but not before its queues are written down.

        Mnesia, where RabbitMQ keeps queues unless it has Khepri, writes a new one with a delay of
        up to two seconds: a broker killed before that forgets it, with the tasks it confirmed.
        """
        self.ctl("eval", "catch mnesia:sync_log().")
        self.kill(*nodes)

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
    def vhost(self, name, *options):
        """Make a vhost that is guest's, and remove it in the end; give its URL."""
        self.ctl("add_vhost", name, *options)
        try:
            self.ctl("set_permissions", "--vhost", name, "guest", ".*", ".*", ".*")
            yield self.url(vhost=name)
        finally:
            self.ctl("delete_vhost", name)


class LocalBroker(Broker):
    """A private node of the rabbitmq-server on this machine, with an epmd of its own."""

    bin = DEBIAN if DEBIAN.exists() else Path(shutil.which("rabbitmq-server") or "").parent

    def __init__(self):
        port, dist_port, epmd_port = free_ports(3)
        super().__init__([port])
        (self.folder / "rabbitmq.conf").write_text(f"listeners.tcp.local = 127.0.0.1:{port}\n")
        (self.folder / "plugins").write_text("[].")
        self.env = {
            **os.environ,
            "LANG": "C.UTF-8",
            "HOME": str(self.folder),  # the Erlang cookie is there
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"{self.folder.name}@localhost",
            "RABBITMQ_DIST_PORT": str(dist_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_LOGS": str(self.folder / "log/node.log"),  # an image's may be "-"
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        # Without one of our own the node would start an epmd that outlives it.
        self.epmd = self.open("epmd", "-port", str(epmd_port))
        self.server = None

    def open(self, *argv):
        return Console(*argv, env=self.env, cwd=self.folder)

    def launch(self):
        """Start the node and return while it boots."""
        self.server = self.open(self.bin / "rabbitmq-server")

    def check_alive(self):
        assert self.server.process.poll() is None, f"the broker ended:\n{self.server}"

    def signal(self, signum):
        """Signal every process of the node: the first is a shell."""
        os.killpg(self.server.process.pid, signum)

    def states(self):
        """Return the state of each process of the node, as ps shows it."""
        rows = [row.split() for row in run("ps", "-eo", "pgid=,stat=").splitlines()]
        return [state for group, state in rows if group == str(self.server.process.pid)]

    def wait_until_gone(self):
        self.server.wait()
        wait_until(lambda: not self.states(), "every process of the broker has ended")

    def stop(self):
        """Stop the node in an orderly way."""
        self.signal(signal.SIGTERM)
        self.wait_until_gone()
        self.kill()

    def kill(self):
        """End the node at once, if it has not ended."""
        self.server.close()
        self.wait_until_gone()
        self.server = None

    @contextlib.contextmanager
    def frozen(self):
        """Freeze the node, and thaw it in the end, whatever happens."""
        self.signal(signal.SIGSTOP)
        try:
            wait_until(  # a process goes on for a while where others hold the processors
                lambda: all(state.startswith("T") for state in self.states()),
                "every process of the broker has stopped",
            )
            yield
        finally:
            self.signal(signal.SIGCONT)

    def tool(self, program, *words, typed=""):
        """Run a program of RabbitMQ's, with `typed` as its input; return what it printed."""
        return run(self.bin / program, *words, env=self.env, cwd=self.folder, typed=typed)

    def log(self):
        """Return what the broker has logged since it was made."""
        return "".join(path.read_text() for path in sorted((self.folder / "log").glob("*.log")))

    def close(self):
        """End everything that was started, and remove its data."""
        if self.server:
            self.kill()
        self.epmd.close()
        self.remove_folder()


def docker(*words, **options):
    """Run docker in the project's folder; return what it printed."""
    return run("docker", *words, **options)


DOWN = ("down", "--volumes", "--remove-orphans", "--timeout", "0")


class DockerBroker(Broker):
    """The project's own docker-compose.yml, under a project name and on ports of its own."""

    file = "docker-compose.yml"
    nodes = {"rabbitmq": ""}  # the services, and how the variables of their ports end
    in_docker = True

    def __init__(self):
        super().__init__(free_ports(len(self.nodes)))
        self.project = self.folder.name
        self.argv = ["compose", "--file", ROOT / self.file, "--project-name", self.project]
        self.remove = reaper.at_exit("docker", *self.argv, *DOWN)
        self.env = {**os.environ, "COMPOSE_PROJECT_NAME": self.project}
        for end, port in zip(self.nodes.values(), self.ports, strict=True):
            self.env[f"RABBITMQ_PORT{end}"] = str(port)
            self.env[f"RABBITMQ_MANAGEMENT_PORT{end}"] = str(*free_ports(1))
        self.shell_env = self.env

    def compose(self, *words, typed=""):
        return docker(*self.argv, *words, env=self.env, typed=typed)

    def launch(self):
        """Start the container and return while RabbitMQ boots."""
        self.compose("up", "--detach")

    def stop(self):
        self.compose("stop", "--timeout", "60")

    def kill(self, *nodes):
        self.compose("kill", "--signal", "SIGKILL", *nodes)

    def freeze(self):
        """Return whether it is; the kernel refuses while a process starts in there, as a check."""
        try:
            self.compose("pause")
        except AssertionError as error:
            if "unable to freeze" not in str(error):
                raise
            return False
        return True

    @contextlib.contextmanager
    def frozen(self):
        """Freeze the container, and thaw it in the end, whatever happens."""
        wait_until(self.freeze, "the container is frozen")
        try:
            yield
        finally:
            self.compose("unpause")

    def tool(self, *words, typed=""):
        node = next(iter(self.nodes))
        return self.compose("exec", "-T", node, *words, typed=typed)

    @property
    def inner_host(self):
        """The container's own address, where all of its ports can be reached on Linux."""
        return self.compose("exec", "-T", "rabbitmq", "hostname", "-i").strip()

    def log(self):
        return self.compose("logs", "--no-color", "--no-log-prefix")

    def close(self):
        self.remove()
        self.remove_folder()


class Cluster(DockerBroker):
    """The three nodes of tests/cluster. It answers when they all do, and see each other."""

    file = "tests/cluster/docker-compose.yml"
    nodes = {f"rabbit-{number}": f"_{number}" for number in (1, 2, 3)}

    def start(self):
        super().start()
        self.ctl("await_online_nodes", str(len(self.nodes)))

    def leader(self):
        """Return the node that leads `task_queue`, or None."""
        leaders = self.ctl("list_queues", "name", "leader")
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


@functools.cache
def choose():
    """Return the kind of broker that TEST_BROKER names, which setup.sh has seen to.

    It is unset where pytest was started without tests/run.
    """
    ask = "docker version && docker compose version"
    no_engine = subprocess.run(ask, shell=True, capture_output=True).returncode
    default = "local" if no_engine else "docker"
    return {"docker": DockerBroker, "local": LocalBroker}[os.environ.get("TEST_BROKER") or default]
