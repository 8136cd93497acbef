"""What the tables look like: the second account of them, which `alembic check` compares with the database.

The first are the migrations in `migrations/`, so neither changes without the other. Nothing reads or writes rows
through this one: the hot path is the plain SQL of `queries.py`, and a worker never loads SQLAlchemy. Tables carry no
schema's name, because a migration runs with its schema as the `search_path`, and the name is an option of every server.
"""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    text,
)

__all__ = ["METADATA"]

METADATA = MetaData()


def _moment(name: str, *, required: bool = True, comment: str | None = None) -> Column[object]:
    return Column(
        name,
        DateTime(timezone=True),
        nullable=not required,
        server_default=text("now()") if required else None,
        comment=comment,
    )


def _count(name: str, *, comment: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default=text("0"), comment=comment)


Table(
    "settings",
    METADATA,
    Column("singleton", Boolean, primary_key=True, server_default=text("true")),
    Column("partition_interval", Text, nullable=False, comment="Length of a partition of events; UTC bounds."),
    Column("oldest_worker", Text, nullable=False, comment="Workers of an older revision than this refuse to start."),
    Column("timeline", Text, comment="Of the server's write-ahead log; another one means a failover."),
    CheckConstraint("singleton"),
    CheckConstraint("partition_interval IN ('hour', 'day', 'week', 'month')"),
    comment="One row: what holds for the whole schema.",
)

Table(
    "workers",
    METADATA,
    Column("number", BigInteger, Identity(always=True), primary_key=True, comment="Never reused."),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("revision", Text, nullable=False, comment="The newest schema revision that the worker knows."),
    _moment("started_at"),
    _moment("seen_at", comment="Stamped now and then; a worker is dead when its lock is free and this is stale."),
    _count("epoch", comment="Rises when another worker writes finals into its streams; an append names it."),
    _moment("ended_at", required=False),
    Column("ended_reason", Text),
    comment="One row per worker process; every append locks its own row, so that a dead worker cannot append.",
)

Table(
    "sessions",
    METADATA,
    Column("id", Text, primary_key=True, comment="Mcp-Session-Id."),
    Column("server", Text, nullable=False, comment="Name of the server that the session belongs to."),
    Column("owner", Text, comment="Who may use the session, as the server's authentication names them."),
    Column("initialize", Text, comment="The params of initialize as JSON, to restore the session elsewhere."),
    Column("protocol_version", Text),
    Column("log_level", Text, comment="The last logging/setLevel."),
    Column(
        "subscriptions",
        ARRAY(Text),
        nullable=False,
        server_default=text("'{}'::text[]"),
        comment="URIs of the live resources/subscribe.",
    ),
    Column(
        "worker", BigInteger, comment="The worker that the session lives on and ends with; null where any serves it."
    ),
    Column("upstream", Text, comment="The upstream's id of a proxied session; empty where it gave none."),
    _count("told", comment="How often its client has changed what the session remembers of it."),
    _moment("created_at"),
    _moment("seen_at"),
    _moment("ended_at", required=False),
    Column("ended_reason", Text),
    Index("sessions_live", "server", "seen_at", postgresql_where=text("ended_at IS NULL")),
    Index("sessions_ended", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
    Index("sessions_seen", "seen_at", postgresql_where=text("ended_at IS NULL")),
    Index("sessions_created", "created_at", "id"),
    Index("sessions_opened", "created_at", "id", postgresql_where=text("ended_at IS NULL")),
    Index("sessions_owner", "owner", "created_at", "id", postgresql_where=text("owner IS NOT NULL")),
    Index("sessions_bound", "worker", postgresql_where=text("ended_at IS NULL AND worker IS NOT NULL")),
    comment="One row per MCP session.",
)

Table(
    "streams",
    METADATA,
    Column("number", BigInteger, Identity(always=True), primary_key=True, comment="First part of an event id."),
    Column("session_id", Text, nullable=False),
    Column("request_id", Text, comment="The request's id, verbatim JSON; null for the standalone stream."),
    Column("request_key", Text, comment="The same id as the SDK coerces it, for lookups."),
    Column("method", Text, comment="The request's method where it is known, for people."),
    Column(
        "worker",
        BigInteger,
        comment="The worker that runs the request and appends its events; null where several workers append.",
    ),
    Column(
        "reader_worker",
        BigInteger,
        comment="The worker of the newest reader; null if that left before the end of the stream.",
    ),
    _count("reader_generation", comment="Rises with every attach: the newest reader wins."),
    _count(
        "cursor",
        comment="The highest seq that was handed to a reader which left: where one that names no event goes on.",
    ),
    _count(
        "last_seq",
        comment="The highest seq of a stream that several workers append to; 0 where one worker counts by itself.",
    ),
    _count("mark_seq", comment="Every event after this seq was created at mark_at or later."),
    _moment("mark_at", comment="Lower bound on created_at for reads from mark_seq on: spares the older partitions."),
    _count("floor", comment="The highest seq that left with a dropped partition."),
    Column("final_seq", BigInteger, comment="The seq of the final response; null while the stream is open."),
    Column("upstream_id", Text, comment="The first id that an upstream gave in it: another replica can go on with it."),
    _moment("adrift_since", required=False, comment="When the worker that read it from an upstream was gone."),
    _moment("created_at"),
    _moment("ended_at", required=False, comment="When its final was stored; null while the stream is open."),
    Index(
        "streams_in_flight",
        "session_id",
        "request_key",
        unique=True,
        postgresql_where=text("final_seq IS NULL AND request_key IS NOT NULL"),
    ),
    Index("streams_standalone", "session_id", unique=True, postgresql_where=text("request_key IS NULL")),
    Index("streams_session", "session_id"),
    Index("streams_open", "worker", postgresql_where=text("final_seq IS NULL")),
    Index("streams_adrift", "adrift_since", postgresql_where=text("adrift_since IS NOT NULL AND final_seq IS NULL")),
    Index("streams_ended", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
    Index("streams_unsaid", "number", postgresql_where=text("final_seq IS NOT NULL AND ended_at IS NULL")),
    comment="One row per stream: a request's answer, or a session's standalone stream.",
)

Table(
    "events",
    METADATA,
    Column("stream", BigInteger, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, primary_key=True, autoincrement=False, comment="Contiguous in its stream, from 1."),
    Column("created_at", DateTime(timezone=True), primary_key=True, server_default=text("now()")),
    Column(
        "origin",
        Text,
        comment="In a stream that several workers append to: the batch it came in, to find it after a commit of "
        "unknown outcome.",
    ),
    Column("payload", Text, nullable=False, comment="The JSON-RPC message; text, because jsonb refuses U+0000."),
    Column("upstream_id", Text, comment="What an upstream calls the event, where a proxy stored it."),
    comment="Append-only: rows are inserted, and leave with their partition. No default partition, no foreign keys.",
    postgresql_partition_by="RANGE (created_at)",
)

Table(
    "inbox",
    METADATA,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("worker", BigInteger, nullable=False, comment="The worker that the message is for."),
    Column("session_id", Text, nullable=False),
    Column("payload", Text, nullable=False),
    Column("stream", BigInteger, comment="The stream that was opened for it, where the message is a request."),
    _moment("created_at"),
    Index("inbox_worker", "worker", "id"),
    comment="Messages from clients on their way to the worker that runs the call.",
)
