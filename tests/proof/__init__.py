"""Campaigns that try to make a backup lose something; `make crash` runs them all.

Each is a module with a `main`, run as `python -m proof.NAME`, whose outcome is kept as JSON in
`results` and published in `docs/durability.md` by `python -m proof.publish`. The tests run each of
them in small.
"""
