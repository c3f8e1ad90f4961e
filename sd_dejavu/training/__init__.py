"""Training: what a trainer leaves out of its loss, and a fine-tuning that does so."""
