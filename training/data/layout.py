"""What is where in a picture: an index image of the same size, for a loss on every patch.

Pixel 0 is no object and no character; other values name the kind of thing that is there.
"""

from __future__ import annotations

from training.data.scene import COLOURS, SHAPES, Object

SHAPE_NAMES, COLOUR_NAMES = tuple(SHAPES), tuple(COLOURS)
NUM_OBJECT_KINDS = len(SHAPE_NAMES) * len(COLOUR_NAMES) * 2


def object_kind(thing: Object) -> int:
    """1 … NUM_OBJECT_KINDS, by shape, colour and size, size changing fastest."""
    look = SHAPE_NAMES.index(thing.shape) * len(COLOUR_NAMES) + COLOUR_NAMES.index(thing.colour)
    return 1 + 2 * look + thing.is_large


def character_kind(number: int) -> int:
    """The kind of the character that is `number` among those that texts are made of."""
    return 1 + NUM_OBJECT_KINDS + number
