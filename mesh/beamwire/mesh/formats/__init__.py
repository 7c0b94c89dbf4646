"""Formats of others that more than one part of Beamwire writes."""
