"""A machine of its own for a worker, as far as the network goes: a Linux network namespace whose cable can be pulled.

    with Network() as network:
        server = await start_server(listen_addresses=f"127.0.0.1,{network.host}")
        worker = await workers.add(host=network.guest, inside=network.command)
        network.cut()       # both sides go on sending, and nothing arrives
        network.restore()

It takes root and `ip`; where namespaces are not permitted the test is skipped with a sentence.
"""

from __future__ import annotations

import secrets
import subprocess
from types import TracebackType
from typing import Self

from tests.support.tools import allow_skip, require_tool


class Network:
    """A bridge on this machine, and a namespace that hangs on it.

    The addresses are of 198.18.0.0/15, which is set aside for tests (RFC 2544) and routed nowhere.
    """

    def __init__(self) -> None:
        self._ip = require_tool("ip", "run `apt-get install iproute2`.")
        name, subnet = secrets.token_hex(3), f"198.18.{secrets.randbelow(256)}"
        self.host = f"{subnet}.1"
        """This machine's address."""
        self.guest = f"{subnet}.2"
        """The namespace's."""
        self._namespace, self._bridge = f"guest-{name}", f"br{name}"
        self._near, self._far = f"near{name}", f"far{name}"

    @property
    def command(self) -> tuple[str, ...]:
        """What runs a command in the namespace."""
        return (self._ip, "netns", "exec", self._namespace)

    def __enter__(self) -> Self:
        try:
            self._run("netns", "add", self._namespace)
        except subprocess.CalledProcessError as error:
            allow_skip(f"Network namespaces cannot be made here: {error.stderr.strip()}")
        try:
            self._run("link", "add", self._bridge, "type", "bridge")
            self._run("addr", "add", f"{self.host}/24", "dev", self._bridge)
            self._run("link", "set", self._bridge, "up")
            self._run("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self._namespace)
            self._run("link", "set", self._near, "master", self._bridge, "up")
            self._run("-n", self._namespace, "addr", "add", f"{self.guest}/24", "dev", self._far)
            self._run("-n", self._namespace, "link", "set", self._far, "up")
            self._run("-n", self._namespace, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            allow_skip(f"Network devices cannot be made here: {error.stderr.strip()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for words in (
            ("link", "del", self._near),
            ("link", "del", self._bridge),
            ("netns", "del", self._namespace),
        ):
            subprocess.run([self._ip, *words], capture_output=True, check=False)

    def cut(self) -> None:
        """Pull the cable out of the switch: the devices stay up, so that neither side is told."""
        self._run("link", "set", self._near, "nomaster")

    def restore(self) -> None:
        """Put it back."""
        self._run("link", "set", self._near, "master", self._bridge)

    def _run(self, *words: str) -> None:
        subprocess.run([self._ip, *words], capture_output=True, text=True, check=True)
