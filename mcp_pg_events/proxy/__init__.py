"""The proxy: the same for servers that cannot be changed."""
