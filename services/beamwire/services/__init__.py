"""The services of a facility: Request, Job, Buffer, Certificate, and the streamer that a job runs."""
