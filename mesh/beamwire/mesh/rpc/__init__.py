"""Calls between members: servers and channels over mutual TLS, and the one chain that every call passes."""
