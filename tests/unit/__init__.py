"""Tests that need neither PostgreSQL nor a server."""
