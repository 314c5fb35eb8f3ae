"""Training whose stacks of blocks live in host memory."""

from layercomb.supervised.offloading.places import MODES, Places, places_of

__all__ = ['MODES', 'Places', 'places_of']
