"""Tests that drive real server processes over HTTP."""
