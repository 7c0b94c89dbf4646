"""The steps of the pipeline: what happens to events between reading and sending."""
