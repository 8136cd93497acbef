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
    """This machine and a namespace, with a switch between them that is a namespace too.

    The switch has no address, so that nothing which arrives at an unplugged port can reach this machine by another way.
    The addresses are of 198.18.0.0/15, which is set aside for tests (RFC 2544) and routed nowhere.
    """

    def __init__(self) -> None:
        self._ip = require_tool("ip", "run `apt-get install iproute2`.")
        name, subnet = secrets.token_hex(3), f"198.18.{secrets.randbelow(256)}"
        self.host = f"{subnet}.1"
        """This machine's address."""
        self.guest = f"{subnet}.2"
        """The namespace's."""
        self._namespace, self._switch, self._cable = f"guest-{name}", f"switch-{name}", f"near{name}"

    @property
    def command(self) -> tuple[str, ...]:
        """What runs a command in the namespace."""
        return (self._ip, "netns", "exec", self._namespace)

    def __enter__(self) -> Self:
        try:
            self._run(f"netns add {self._namespace}")
            self._run(f"netns add {self._switch}")
            self._run(f"-n {self._switch} link add bridge type bridge")
            self._run(f"-n {self._switch} link set bridge up")
            self._run(f"link add {self._cable} type veth peer name one netns {self._switch}")
            self._run(f"-n {self._namespace} link add far type veth peer name two netns {self._switch}")
            for port in ("one", "two"):
                self._run(f"-n {self._switch} link set {port} master bridge up")
            self._run(f"addr add {self.host}/24 dev {self._cable}")
            self._run(f"link set {self._cable} up")
            self._run(f"-n {self._namespace} addr add {self.guest}/24 dev far")
            self._run(f"-n {self._namespace} link set far up")
            self._run(f"-n {self._namespace} link set lo up")
        except subprocess.CalledProcessError as error:
            self._remove()
            allow_skip(f"Network namespaces cannot be made here: {error.stderr.strip()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for words in (f"link del {self._cable}", f"netns del {self._namespace}", f"netns del {self._switch}"):
            subprocess.run([self._ip, *words.split()], capture_output=True, check=False)

    def cut(self) -> None:
        """Pull the namespace's cable out of the switch. Its device stays up, so that neither side is told."""
        self._run(f"-n {self._switch} link set two nomaster")

    def restore(self) -> None:
        """Put it back."""
        self._run(f"-n {self._switch} link set two master bridge")

    def _run(self, words: str) -> None:
        subprocess.run([self._ip, *words.split()], capture_output=True, text=True, check=True)
