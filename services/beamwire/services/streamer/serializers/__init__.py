"""How batches become bytes, one module for each format."""
