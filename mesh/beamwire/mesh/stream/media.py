"""The media types of opaque frames, and the suffixes of files that hold one."""

from __future__ import annotations

from typing import Final

HDF5: Final = "application/x-hdf5"
NPZ: Final = "application/x-npz"
MSGPACK: Final = "application/msgpack"
CBOR: Final = "application/cbor"
"""A message of DECTRIS Stream V2."""
SIMPLON: Final = "application/x-lclstreamer-simplon"

SUFFIXES: Final = {HDF5: "h5", NPZ: "npz", MSGPACK: "msgpack", CBOR: "cbor", SIMPLON: "simplon"}
