"""Looking at a facility from outside: what is wrong with it, and what it has left behind."""
