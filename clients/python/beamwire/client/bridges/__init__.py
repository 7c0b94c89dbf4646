"""Bridges: programs that have a way of their own to take data are served from a stream, in that way."""
