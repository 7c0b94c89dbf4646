"""Where jobs run: the interface of a backend, and one module for each."""
