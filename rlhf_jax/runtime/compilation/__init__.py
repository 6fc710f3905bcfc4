"""Ahead-of-time compilation for devices that are not there."""

TOPOLOGIES = (
    "v5e:4x4 or v6e:16x16 (chips of a slice in two dimensions), v5p:4x4x8 (in three), local (the "
    "devices of this machine) or cpu:8 (this number of devices on its CPU)"
)
