"""Where messages go, one module for each way."""
