"""The work: each stage is a typed config, a `run` function, and a plain program (`python -m stages.<name>`)."""
