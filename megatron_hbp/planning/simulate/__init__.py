"""An epoch of a plan on a cluster, second by second."""
