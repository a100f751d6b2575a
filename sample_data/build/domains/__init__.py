"""One module a domain, each with ``rows``: unpacked packages -> rows, in a fixed order."""
