"""What several tests share: PostgreSQL, worker processes, an HTTP client that can misbehave, a faulty proxy."""
