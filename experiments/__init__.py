"""What we did: the commands. `python -m experiments.train --config=configs/tiny.py --workdir=DIR`."""
