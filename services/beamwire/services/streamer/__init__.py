"""The streamer: an MPI program that reads a run, takes what was asked for from each event, and sends frames."""
