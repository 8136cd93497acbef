"""What the environment says: the one place that reads `MCP_PG_EVENTS_*`.

The command line passes what its options say, which wins; the library itself reads no environment, and takes a DSN as an
argument. The values go to `migrate.py`, `store.py` and the embedded database.
"""

from __future__ import annotations

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from mcp_pg_events.schema import DEFAULT_SCHEMA

__all__ = ["Settings"]


class Settings(BaseSettings):
    """MCP_PG_EVENTS_DSN, MCP_PG_EVENTS_LISTEN_DSN and MCP_PG_EVENTS_SCHEMA; an empty one counts as absent."""

    model_config = SettingsConfigDict(env_prefix="MCP_PG_EVENTS_", env_ignore_empty=True)

    # Secret, so that no repr and no validation error shows a password.
    dsn: SecretStr | None = None
    listen_dsn: SecretStr | None = None
    schema_name: str = Field(default=DEFAULT_SCHEMA, validation_alias="MCP_PG_EVENTS_SCHEMA")

    @classmethod
    def given(cls, *, dsn: str | None = None, schema: str | None = None) -> Settings:
        """Return the settings with what an option said in place of what the environment says; None is not said."""
        settings = cls()
        update: dict[str, object] = {}
        if dsn is not None:
            update["dsn"] = SecretStr(dsn)
        if schema is not None:
            update["schema_name"] = schema
        return settings.model_copy(update=update)

    @property
    def database(self) -> str | None:
        """The DSN in clear, to connect with; never to print."""
        return self.dsn.get_secret_value() if self.dsn is not None else None
