"""The steps of a run, one module each; every module gives its units of work."""
