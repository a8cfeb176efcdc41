"""What raybert uses of Ray beyond its public API. Nothing outside of this package does.

`core` has Ray's own records of nodes, jobs, actors and placement groups, `data` and `train` what Ray Data and Ray
Train lack, `names` what Ray calls its variables, files, processes and errors. Each entry says which public API is
missing and with which versions of Ray it was run. `tests/unit/test_ray_internals.py` has a test for each, which says in
a sentence what a new Ray has moved.
"""
