"""What native operators are told: `native/layers.hpp`, field by field. Needs no torch."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np


class Record(ctypes.Structure):
    """A structure of the engine; arrays given for pointers are kept alive with it.

    Attributes:
        joined: whether each task of the next record may run right after the same task of this one.
    """

    joined = False

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.keep: list[Any] = []
        for name, value in fields.items():
            self.put(name, value)

    def put(self, name: str, value: Any) -> None:
        """Set a field; an array sets a pointer to its first element and has to be contiguous."""
        if isinstance(value, np.ndarray):
            if not value.flags.c_contiguous:
                raise ValueError(f"{name} is not contiguous")
            self.keep.append(value)
            value = value.ctypes.data if value.size else None
        setattr(self, name, value)


class Stream(Record):
    """Sparse matrix times lane-blocked activations.

    Attributes:
        widths_, positions_: of a convolution, the tiles of one image: vectors, and first pixels.
    """

    kind = 0
    widths_: Any = None
    positions_: Any = None
    _fields_ = [
        ("block", c_int32),
        ("groups", c_int32),
        ("k_blocks", c_int32),
        ("activation", c_int32),
        ("slope", c_float),
        ("tiles", c_int32),
        ("chunks", c_int32),
        ("padding_", c_int32),
        ("rows", c_void_p),
        ("entries", c_void_p),
        ("bias", c_void_p),
        ("y_channel", c_int64),
        ("widths", c_void_p),
        ("x_offsets", c_void_p),
        ("y_offsets", c_void_p),
        ("masks", c_void_p),
        ("chunk", c_void_p),
        ("x", c_void_p),
        ("y", c_void_p),
        ("residual", c_void_p),
    ]


class Copy(Record):
    """Copies between layouts."""

    kind = 1
    _fields_ = [
        ("planes", c_int64),
        ("rows", c_int32),
        ("columns", c_int32),
        ("lanes", c_int32),
        ("padding_", c_int32),
        ("x_plane", c_int64),
        ("y_plane", c_int64),
        ("x_row", c_int64),
        ("y_row", c_int64),
        ("x_step", c_int64),
        ("y_step", c_int64),
        ("x", c_void_p),
        ("y", c_void_p),
    ]


class Window(Record):
    """Sums or maxima over windows."""

    kind = 2
    _fields_ = [
        ("planes", c_int64),
        ("taps", c_int32),
        ("largest", c_int32),
        ("scale", c_float),
        ("tiles", c_int32),
        ("offsets", c_void_p),
        ("x_plane", c_int64),
        ("y_plane", c_int64),
        ("widths", c_void_p),
        ("x_offsets", c_void_p),
        ("y_offsets", c_void_p),
        ("masks", c_void_p),
        ("x", c_void_p),
        ("y", c_void_p),
    ]


class Mean(Record):
    """Mean of every plane."""

    kind = 3
    _fields_ = [
        ("planes", c_int64),
        ("rows", c_int32),
        ("columns", c_int32),
        ("x_plane", c_int64),
        ("x_row", c_int64),
        ("y_plane", c_int64),
        ("lanes", c_int32),
        ("padding_", c_int32),
        ("x", c_void_p),
        ("y", c_void_p),
    ]


class Pointwise(Record):
    """Elementwise arithmetic on planes."""

    kind = 4
    _fields_ = [
        ("planes", c_int64),
        ("op", c_int32),
        ("activation", c_int32),
        ("slope", c_float),
        ("tiles", c_int32),
        ("per_plane", c_int32),
        ("lanes", c_int32),
        ("a_plane", c_int64),
        ("b_plane", c_int64),
        ("y_plane", c_int64),
        ("widths", c_void_p),
        ("offsets", c_void_p),
        ("masks", c_void_p),
        ("a", c_void_p),
        ("b", c_void_p),
        ("y", c_void_p),
    ]


class Transpose(Record):
    """Transposes between rows and tiles."""

    kind = 5
    _fields_ = [
        ("outer", c_int64),
        ("inner", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("x_outer", c_int64),
        ("x_inner", c_int64),
        ("x_row", c_int64),
        ("y_outer", c_int64),
        ("y_inner", c_int64),
        ("y_row", c_int64),
        ("x_tile", c_int64),
        ("y_tile", c_int64),
        ("tile", c_int32),
        ("padding_", c_int32),
        ("x", c_void_p),
        ("y", c_void_p),
    ]


class Gemv(Record):
    """Sparse matrix times few vectors."""

    kind = 6
    _fields_ = [
        ("kernel", c_int32),
        ("half", c_int32),
        ("wide", c_int32),
        ("block", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("batch", c_int32),
        ("chunks", c_int32),
        ("activation", c_int32),
        ("slope", c_float),
        ("x_row", c_int64),
        ("y_row", c_int64),
        ("chunk", c_void_p),
        ("starts", c_void_p),
        ("words", c_void_p),
        ("slots", c_void_p),
        ("values", c_void_p),
        ("indices", c_void_p),
        ("rest_starts", c_void_p),
        ("rest_values", c_void_p),
        ("rest_columns", c_void_p),
        ("order", c_void_p),
        ("bias", c_void_p),
        ("x", c_void_p),
        ("y", c_void_p),
        ("residual", c_void_p),
    ]


class Step(ctypes.Structure):
    """One operator of a program: its kind, whether the next one is joined to it, and its record."""

    _fields_ = [("kind", c_int32), ("joined", c_int32), ("layer", c_void_p)]


RECORDS: tuple[type[Record], ...] = (Stream, Copy, Window, Mean, Pointwise, Transpose, Gemv)

ROW = np.dtype([("group", "<i4"), ("begin", "<i4"), ("end", "<i4")])

ACTIVATIONS = (
    "none",
    "relu",
    "relu6",
    "hardswish",
    "hardsigmoid",
    "silu",
    "gelu",
    "gelu_tanh",
    "sigmoid",
    "tanh",
    "leaky_relu",
)
