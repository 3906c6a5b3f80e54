"""A TCP proxy between the scripts and a broker: network faults without privileges.

The two ways through it are named for where the bytes go: "to broker" and "to client".
"""

import contextlib
import socket
import struct
import threading

WAYS = ("to broker", "to client")


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes everything on to `port`, and back."""

    def __init__(self, port):
        self.target = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sockets = set()
        self.open = {way: threading.Event() for way in WAYS}
        for event in self.open.values():
            event.set()
        self.pace = None  # bytes per second
        self.fatal = None  # bytes that end a connection instead of passing
        self.closing = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client = self.listener.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(client)
            broker = stack.enter_context(socket.create_connection(("127.0.0.1", self.target)))
            pair = {client, broker}
            self.sockets |= pair
            back = threading.Thread(
                target=self._pass, args=(broker, client, "to client"), daemon=True
            )
            back.start()
            self._pass(client, broker, "to broker")
            back.join()
            self.sockets -= pair

    def _pass(self, source, sink, way):
        try:
            while data := source.recv(1 << 16 if self.pace is None else max(1, self.pace // 20)):
                if self.pace is not None:
                    self.closing.wait(len(data) / self.pace)
                self.open[way].wait()
                if self.fatal and self.fatal in data:
                    break
                sink.sendall(data)
        except OSError:
            pass  # one end has reset the connection: so the other is told
        if source not in self.sockets:
            return  # reset() ends it, and not in an orderly way
        self.open[way].wait()
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def reset(self):
        """End every connection as a network does that has forgotten it (RST)."""
        sockets, self.sockets = self.sockets, set()
        for one in sockets:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.shutdown(socket.SHUT_RD)  # wakes the thread that reads, which closes it

    @contextlib.contextmanager
    def black_hole(self, *ways):
        """Let nothing through, not even an end; all flows again in the end, whatever happens."""
        for way in ways or WAYS:
            self.open[way].clear()
        try:
            yield
        finally:
            for way in ways or WAYS:
                self.open[way].set()

    @contextlib.contextmanager
    def slow(self, pace):
        """Let through `pace` bytes per second in each connection and way."""
        self.pace = pace
        try:
            yield
        finally:
            self.pace = None

    def close(self):
        """End all that it has opened."""
        self.closing.set()
        for event in self.open.values():
            event.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.reset()
