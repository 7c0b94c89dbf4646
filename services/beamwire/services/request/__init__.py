"""The Request service: data requests, and what became of them."""
