"""Reference sets: the training pictures that a model may be replaying, and the search for the nearest of them."""
