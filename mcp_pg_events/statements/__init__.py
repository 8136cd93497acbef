"""The statements of the hot path, by what they are about. Next: `queries.py` puts a schema's name into them."""
