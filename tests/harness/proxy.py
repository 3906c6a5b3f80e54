"""A TCP proxy between the scripts and a broker: network faults without privileges.

The two ways through it are named for where the bytes go: "to broker" and "to client".
"""

import asyncio
import contextlib
import functools
import math
import socket
import struct
import threading

WAYS = ("to broker", "to client")


@functools.cache
def loop():
    """Return the event loop of all proxies, which runs in a thread of its own."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True).start()
    return made


def in_loop(coroutine):
    """Run `coroutine` in that thread, so that nothing needs a lock; return its result."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop()).result()


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes everything on to `port`, and back."""

    def __init__(self, port):
        self.target = port
        self.connections = []  # pairs of StreamWriter
        self.held = ()  # the ways on which nothing gets through
        self.pace = math.inf  # bytes per second
        self.fatal = None  # bytes that end a connection instead of passing
        self.server = in_loop(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self.server.sockets[0].getsockname()[1]

    async def _serve(self, from_client, to_client):
        with contextlib.closing(to_client), contextlib.suppress(OSError):  # no broker listens
            from_broker, to_broker = await asyncio.open_connection("127.0.0.1", self.target)
            pair = to_client, to_broker
            self.connections.append(pair)
            await asyncio.gather(
                self._pass(from_client, to_broker, "to broker", pair),
                self._pass(from_broker, to_client, "to client", pair),
            )
            self.connections.remove(pair)

    async def _pass(self, source, sink, way, pair):
        with contextlib.suppress(OSError):  # one end has reset it: so the other is told
            while data := await source.read(int(min(1 << 16, self.pace / 20))):
                await asyncio.sleep(len(data) / self.pace)
                await self._while_held(way)
                if self.fatal and self.fatal in data:
                    break
                sink.write(data)
                await sink.drain()
        await self._while_held(way)
        for writer in pair:
            writer.close()

    async def _while_held(self, way):
        while way in self.held:
            await asyncio.sleep(0.01)

    async def _reset(self):
        for pair in self.connections:
            for writer in pair:
                one = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):  # it has ended
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()

    def reset(self):
        """End every connection as a network does that has forgotten it (RST)."""
        in_loop(self._reset())

    @contextlib.contextmanager
    def black_hole(self, *ways):
        """Let nothing through, not even an end; all flows again in the end, whatever happens."""
        self.held = ways or WAYS
        try:
            yield
        finally:
            self.held = ()

    @contextlib.contextmanager
    def slow(self, pace):
        """Let through `pace` bytes per second in each connection and way."""
        self.pace = pace
        try:
            yield
        finally:
            self.pace = math.inf

    def close(self):
        """End all that it has opened."""
        self.held = ()
        loop().call_soon_threadsafe(self.server.close)
        self.reset()
