"""What several commands need: a run in its workdir, its hosts, a trained network and what it is asked."""
