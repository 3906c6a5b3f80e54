"""The two RabbitMQs that the tests start: a container, or a private node of the installed server.

Both have one interface: start, stop, kill, freeze, thaw, ctl, log and close. A broker listens on
free ports of 127.0.0.1 and keeps them and its data from one start to the next, until close().
A cluster of containers has the same, for all of its nodes or those named.
"""

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from pathlib import Path

import pika
import psutil

from tests.harness import reaper
from tests.harness.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
DEBIAN = Path("/usr/lib/rabbitmq/bin")  # its wrappers in /usr/sbin change the user


def free_ports(count):
    """Return `count` TCP ports that are free on 127.0.0.1 now.

    They are below those that systems give to outgoing connections, one of which could otherwise
    take the port of a broker that is stopped for a while.
    """
    ports = []
    for port in random.sample(range(10_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("no free ports")


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

    def connect(self):
        """Return a pika connection of the tests' own."""
        return pika.BlockingConnection([pika.URLParameters(url) for url in self.url().split(",")])

    def answers(self):
        """Whether a client can connect now."""
        try:
            self.connect().close()
        except (pika.exceptions.AMQPError, OSError):
            return False
        return True

    def wait_until_it_answers(self):
        wait_until(lambda: self.answers() or self.check_alive(), "the broker answers", timeout=90)
        self.ctl("await_startup")  # it takes connections before it takes commands

    def check_alive(self):
        """Raise if the broker ended instead of starting."""

    def version(self):
        """Return RabbitMQ's version, as a tuple of numbers."""
        return tuple(int(part) for part in self.ctl("version").strip().split("."))

    def set(self, key, erlang_value):
        """Set one of RabbitMQ's settings while it runs (until its next start)."""
        self.ctl("eval", f"application:set_env(rabbit, {key}, {erlang_value}).")

    @contextlib.contextmanager
    def alarm(self, disk=False):
        """Raise a memory (or disk) alarm, and clear it in the end, whatever happens."""
        if disk:
            raised, cleared = ("set_disk_free_limit", "100000GB"), ("set_disk_free_limit", "1MB")
        else:
            limit = "set_vm_memory_high_watermark"
            raised, cleared = (limit, "absolute", "1MB"), (limit, "0.4")
        try:
            self.ctl(*raised)
            in_force = "rabbit_alarm:get_alarms() =/= []."  # the monitors raise it a little later
            wait_until(lambda: "true" in self.ctl("eval", in_force), "the alarm is in force")
            yield
        finally:
            self.ctl(*cleared)

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
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
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
        self.console = (self.folder / "console").open("ab")
        self.server = subprocess.Popen(
            [self.bin / "rabbitmq-server"],
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=self.console,
            stderr=self.console,
            start_new_session=True,  # the starter is a shell: signals go to its whole group
        )
        self.duty = reaper.at_exit("kill", "-KILL", "--", f"-{self.server.pid}")

    def check_alive(self):
        if self.server.poll() is not None:
            raise AssertionError("the broker ended:\n" + (self.folder / "console").read_text())

    def signal(self, signum):
        """Signal every process of the node; raise ProcessLookupError if there is none."""
        os.killpg(self.server.pid, signum)

    def stop(self):
        """Stop the node in an orderly way."""
        self.signal(signal.SIGTERM)
        self.ended()

    def kill(self):
        """End the node at once, as a crash would, when its queues are written down."""
        self.settle()
        self.killed = True
        self.signal(signal.SIGKILL)
        self.ended()

    def ended(self):
        self.server.wait(timeout=60)
        wait_until(lambda: not self.group_lives(), "every process of the broker has ended", 60)
        reaper.forget(self.duty)
        self.console.close()
        self.server = None

    def group_lives(self):
        try:
            self.signal(0)
        except ProcessLookupError:
            return False
        return True

    def freeze(self):
        """Freeze; a process goes on for a while where others hold the processors."""
        self.signal(signal.SIGSTOP)
        wait_until(self.stands_still, "every process of the broker has stopped")

    def stands_still(self):
        starter = psutil.Process(self.server.pid)
        # Programs that the node runs in groups of their own may end under our eyes: look again.
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            return all(
                one.status() == psutil.STATUS_STOPPED
                for one in (starter, *starter.children(recursive=True))
                if os.getpgid(one.pid) == starter.pid
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
                self.signal(signal.SIGKILL)
                self.ended()
        self.epmd.kill()
        self.epmd.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        for duty in self.duties:
            reaper.forget(duty)


def docker(*words, env=None):
    """Run docker in the project's folder; return what it printed."""
    return run("docker", *words, env=env)


class DockerBroker(Broker):
    """The project's own docker-compose.yml, under a project name and on ports of its own."""

    file = "docker-compose.yml"
    nodes = {"rabbitmq": ""}  # the services, and how the variables of their ports end

    def __init__(self):
        self.folder = new_folder()
        self.project = self.folder.name
        down = ("down", "--volumes", "--remove-orphans", "--timeout", "0")
        self.down = ["compose", "--file", ROOT / self.file, "--project-name", self.project, *down]
        self.duties = [
            reaper.at_exit("rm", "-rf", self.folder),
            reaper.at_exit("docker", *self.down),
        ]
        numbers = free_ports(2 * len(self.nodes))
        self.ports = dict(zip(self.nodes, numbers, strict=False))
        self.port = numbers[0]
        self.killed = False
        names = ("RABBITMQ_PORT", "RABBITMQ_MANAGEMENT_PORT")
        variables = [name + end for name in names for end in self.nodes.values()]
        self.env = {**os.environ, **dict(zip(variables, map(str, numbers), strict=True))}
        self.server = None

    @staticmethod
    def why_not():
        """Return why it cannot be had, or None."""
        if not shutil.which("docker"):
            return "there is no Docker (docs.docker.com/engine/install)"
        for words in (["version"], ["compose", "version"]):
            asked = subprocess.run(["docker", *words], capture_output=True, text=True)
            if asked.returncode:
                told = asked.stderr.strip().splitlines() or ["no answer"]
                return f"docker {' '.join(words)} says: {told[0]}"
        return None

    def compose(self, *words):
        return docker(
            "compose", "--file", self.file, "--project-name", self.project, *words, env=self.env
        )

    def start(self):
        """Start the container (on the same ports and volume as before), wait until it answers."""
        if self.server is None:
            self.compose("up", "--detach", "--wait")
            self.server = self.project
        else:
            self.launch()
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
        docker(*self.down, env=self.env)
        self.folder.rmdir()
        for duty in self.duties:
            reaper.forget(duty)


class Cluster(DockerBroker):
    """The three nodes of tests/cluster. It answers when they all do, and see each other."""

    file = "tests/cluster/docker-compose.yml"
    nodes = {f"rabbit-{number}": f"_{number}" for number in (1, 2, 3)}

    def url(self, query=""):
        """Return the AMQP URLs of the nodes, separated by commas."""
        return ",".join(Broker.url(self, port=port, query=query) for port in self.ports.values())

    def answers(self):
        for url in self.url().split(","):
            try:
                pika.BlockingConnection(pika.URLParameters(url)).close()
            except (pika.exceptions.AMQPError, OSError):
                return False
        return True

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
    if BROKERS[name].why_not():
        reasons = {one: kind.why_not() for one, kind in BROKERS.items()}
        asked = [name] if os.environ.get("TEST_BROKER") else reasons
        raise SystemExit("no RabbitMQ for the tests: " + "; ".join(reasons[one] for one in asked))
    return BROKERS[name]


if __name__ == "__main__":
    choose()
