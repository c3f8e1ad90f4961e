"""Training clean: the filter for training loops, and the audit of what was trained."""
