"""Reference sets: the training images that a model may be replaying, and the search for the nearest of them."""
