"""The fabric of a facility: identities, calls, streams, stores. It knows no service."""
