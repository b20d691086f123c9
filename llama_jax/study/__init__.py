"""Many runs that differ in one thing each, and what their differences are worth."""
