"""w8a8: int8 weights, and activations rounded to int8 row by row while they are multiplied.

The weights are those of int8.py, in files too. Rounding x costs some precision and lets the
integer units do the whole product, which pays where many rows are computed at once.
"""

from __future__ import annotations

from glimt.quant.int8 import Int8

FORMATS = (Int8("w8a8", quantises_x=True),)
