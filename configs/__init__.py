"""Runs to train, one page each. `base` holds what every run shares, `sizes` the published networks."""
