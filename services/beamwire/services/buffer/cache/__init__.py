"""The cache process behind a buffer: takes frames from producers, holds them, gives them to consumers."""
