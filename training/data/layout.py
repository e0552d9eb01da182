"""What is where in a picture: an index image of the same size, for a loss on every patch.

Pixel 0 is nothing that has a name; other values name the kind of thing that is there, and the
colour of a drawn scene's background.
"""

from __future__ import annotations

from training.data.scene import BACKGROUNDS, COLOURS, SHAPES, Object

SHAPE_NAMES, COLOUR_NAMES, GROUND_NAMES = tuple(SHAPES), tuple(COLOURS), tuple(BACKGROUNDS)
NUM_OBJECT_KINDS = len(SHAPE_NAMES) * len(COLOUR_NAMES) * 2


def object_kind(thing: Object) -> int:
    """1 … NUM_OBJECT_KINDS, by shape, colour and size, size changing fastest."""
    look = SHAPE_NAMES.index(thing.shape) * len(COLOUR_NAMES) + COLOUR_NAMES.index(thing.colour)
    return 1 + 2 * look + thing.is_large


def ground_kind(background: str) -> int:
    """The kinds that come next: a scene's background, where no object is."""
    return 1 + NUM_OBJECT_KINDS + GROUND_NAMES.index(background)


def character_kind(number: int) -> int:
    """The last kinds: the character that is `number` among those that texts are made of."""
    return 1 + NUM_OBJECT_KINDS + len(GROUND_NAMES) + number
