"""`python -m beamwire.services.streamer`."""

from beamwire.services.streamer.cli import main

if __name__ == "__main__":
    main(prog_name="beamwire-streamer")
