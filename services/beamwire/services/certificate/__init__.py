"""The Certificate service: who is a member of the trust domain."""
