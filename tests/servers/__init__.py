"""Real MCP servers, which the tests run in processes of their own."""
