"""The Buffer service: the caches that bulk events flow through."""
