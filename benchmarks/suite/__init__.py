"""The benchmark suite: what a mixture costs against the frozen model and every peer, and how that grows.

`machine` says where, `cases` verifies and takes times, `search`, `mixture`, `model`, `serve` and `quality`
are the sections, `page` draws, `command` is the command line: `python -m benchmarks`.
"""
