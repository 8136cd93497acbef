"""The official conformance suite and the TypeScript SDK's client, against real workers."""
