"""What a run costs, needs and shows."""
