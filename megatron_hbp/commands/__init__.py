"""One file a sub-command of `hbp`: read options, call the package, print tables."""
