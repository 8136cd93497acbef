"""A proxy to PostgreSQL that loses notifications and passes everything else.

So behaves a pooler in transaction mode: LISTEN works, and nothing ever comes. The notifications are told from other
messages by the protocol (PostgreSQL manual, "Message Formats"), which has to be in clear text: `dsn_through`.
"""

from __future__ import annotations

from collections.abc import Callable

from psycopg.conninfo import conninfo_to_dict

from tests.support.postgres import dsn_url
from tests.support.tcp_proxy import TcpProxy


class DeafProxy(TcpProxy):
    """`deaf` loses every notification from now on; `lost` counts them."""

    deaf = False
    lost = 0

    def editor(self) -> Callable[[bytes], bytes]:
        pending = bytearray()

        def edit(piece: bytes) -> bytes:
            pending.extend(piece)
            passed = bytearray()
            # One byte says the message's type, four its length without that byte.
            while len(pending) >= 5 and len(pending) > (length := int.from_bytes(pending[1:5], "big")):
                if self.deaf and pending[:1] == b"A":
                    self.lost += 1
                else:
                    passed += pending[: length + 1]
                del pending[: length + 1]
            return bytes(passed)

        return edit


def target_of(dsn: str) -> tuple[str, int]:
    """Host and port that `dsn` names, for a proxy to stand before."""
    parts = conninfo_to_dict(dsn)
    return str(parts["host"]), int(parts["port"] or 5432)


def dsn_through(proxy: TcpProxy, dsn: str) -> str:
    """`dsn` by way of a proxy, in clear text."""
    return dsn_url(dsn, host="127.0.0.1", port=proxy.port, sslmode="disable", gssencmode="disable")
