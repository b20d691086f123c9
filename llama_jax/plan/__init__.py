"""What a run needs on a slice that is not there yet: memory, time, collectives."""
